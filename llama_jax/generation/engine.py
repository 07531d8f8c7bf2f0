"""The host's side of generation: buckets, chunks, and the loop that keeps the device one chunk ahead."""

import collections
import time
from collections.abc import Generator, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.generation import programs, speculation
from llama_jax.generation.reading import MIN_PROMPT_BUCKET, Reader
from llama_jax.generation.request import Row, Settings
from llama_jax.generation.speculation import Speculation, SpeculativeState, cache_of
from llama_jax.generation.state import MAX_TOP_LOGPROBS, DecodeState, Output, Prefix
from llama_jax.model import Params, num_slots
from llama_jax.ops.kernels import Kernels

SHARED_CHUNK = 8  # tokens between two looks at a stream, on several processes


class Engine(Reader):
    """Token ids in, token ids out, for one set of parameters. Every process of a mesh makes the same calls.

    Attributes:
        guesses: how tokens are guessed, several of which are then checked in one step; None for one token a step.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        max_length: int,
        mesh: Mesh | None = None,
        *,
        kernels: Kernels = True,
        guesses: Speculation | None = None,
        cache_dtype: str = "auto",
    ):
        slack = speculation.SLACK if guesses else 0
        super().__init__(cfg, params, max_length, mesh, kernels=kernels, slack=slack, cache_dtype=cache_dtype)
        self.guesses = guesses

    def run(
        self, rows: Sequence[Row], halt: np.ndarray, pace_seconds: float | None = None, prefix: Prefix | None = None
    ) -> Generator[Output, None, DecodeState | SpeculativeState]:
        """Continues all rows as one batch.

        Args:
            rows: the sequences.
            halt: [len(rows)] bool; set an entry between two yields and the row ends before its next chunk.
            pace_seconds: how often a reader wants news; chunks are as long as possible when not given.
            prefix: what has been read before; as much of it as all rows begin with is not read again.

        Yields:
            Output of NumPy arrays [len(rows), m]: the next tokens of every row, -1 after them.

        Returns:
            The state in the end.
        """
        batch = self.batch(len(rows))
        num_top = MAX_TOP_LOGPROBS if any(row.settings.logprobs > 0 for row in rows) else 0
        state, output = self.prefill(rows, batch, num_top, prefix)
        if self.guesses and not any(row.settings.needs_history for row in rows):
            state = self._speculative(state, rows)
        width, most = self._pace(state)
        # The last token chosen is never fed back, so the cache holds one less than prompt and answer.
        prompts = np.array([len(row.tokens) for row in rows])
        limits = prompts + np.array([row.settings.max_new_tokens for row in rows]) - 1
        steps, made, read = int((limits - prompts).max()), 0, np.zeros(len(rows), int)
        ended = np.zeros(len(rows), bool)
        waiting = collections.deque([(output, 1)])
        chunk, last_read = most if pace_seconds is None else 1, None
        shared = jax.process_count() > 1  # clocks differ, and all processes must ask for the same steps
        while not (ended | halt).all():
            # The device works on the next chunk while this one is read; but a reader sees the first token at once.
            ahead = 1 if pace_seconds is not None and last_read is None else 2
            while made < steps and len(waiting) < ahead:
                n = min(chunk, steps - made)
                made += n
                unread = width * (n + sum(n for _, n in waiting))
                state = self._with_room(state, int(np.minimum(prompts + read + unread, limits).max()) + width - 1)
                stop = np.zeros(batch, bool)
                stop[: len(rows)] = halt
                state, output = self._advance(state, stop, n, num_top)
                waiting.append((output, n))
            output, n = waiting.popleft()
            output = Output(*(np.asarray(part)[: len(rows), : n * width] for part in output))
            now, counts = time.monotonic(), np.sum(output.tokens >= 0, axis=1)
            read += counts
            if shared and pace_seconds is not None:
                chunk = min(SHARED_CHUNK, most)
            elif pace_seconds is not None and last_read is not None:
                chunk = int(np.clip(pace_seconds * n / max(now - last_read, 1e-6), 1, most))
            last_read = now
            for b, row in enumerate(rows):
                ended[b] |= read[b] >= row.settings.max_new_tokens or not set(row.stop_ids).isdisjoint(output.tokens[b])
            yield output
        return state

    def score(self, tokens: Sequence[int], num_top: int = 0) -> Output:
        """Log-probabilities of tokens[1:], each after those before it: Output of [T - 1] and [T - 1, num_top]."""
        T = len(tokens)
        padded, lengths = self.pad([tokens], self.batch(1))
        top = MAX_TOP_LOGPROBS if num_top else 0
        options = dict(kernels=self.kernels, cache_dtype=self.cache_dtype)
        output = self.on_mesh(programs.score, self.cfg, self.params, padded, lengths, num_top=top, **options)
        output = Output(*(np.asarray(part)[0, : T - 1] for part in output))
        return output._replace(top_ids=output.top_ids[:, :num_top], top_logprobs=output.top_logprobs[:, :num_top])

    def logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """[B, longest row, V] float32 of rows of tokens; after a row's end they mean nothing."""
        padded, lengths = self.pad(rows, self.batch(len(rows)))
        options = dict(kernels=self.kernels, cache_dtype=self.cache_dtype)
        found = self.on_mesh(programs.all_logits, self.cfg, self.params, padded, lengths, **options)
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(found, tiled=True)
        return np.asarray(found)[: len(rows), : max(map(len, rows)), : self.cfg.vocab_size]

    def warm_up(self, batch_size: int = 1, *, logprobs: bool = False, history: bool = False) -> None:
        """Compiles every program that requests up to this batch size can need, but for prefixes; nothing is compiled after.

        Args:
            logprobs: also for requests with log-probabilities of the prompt and of alternatives.
            history: also for requests with penalties or a bias.
        """
        for num_top in (0, MAX_TOP_LOGPROBS) if logprobs else (0,):
            for penalty in (0.0, 1.0) if history else (0.0,):
                for batch in dict.fromkeys(map(self.batch, _powers(1, batch_size))):
                    self._warm_up_batch(batch, num_top, Settings(max_new_tokens=1, presence_penalty=penalty))
        for length in _powers(MIN_PROMPT_BUCKET, self.max_length) if logprobs else ():
            self.score([0] * length)

    def _warm_up_batch(self, batch: int, num_top: int, settings: Settings) -> None:
        for length in _powers(MIN_PROMPT_BUCKET, self.max_length):
            rows = [Row([0] * length, settings, ())] * batch
            state, _ = self.prefill(rows, batch, num_top)
            if self.guesses and not settings.needs_history:
                state = self._speculative(state, rows)
            if length > MIN_PROMPT_BUCKET:
                continue
            while True:
                state, _ = self._advance(state, np.zeros(batch, bool), 0, num_top)
                if num_slots(cache_of(state)) >= self.most_slots:
                    break
                state = self._with_room(state, num_slots(cache_of(state)) + 1)

    def _speculative(self, state: DecodeState, rows: Sequence[Row]) -> SpeculativeState:
        batch = len(state.done)
        tokens, _ = self.pad([row.tokens for row in rows], batch)
        draft = self.guesses.draft
        cache = draft.prefill(rows, batch, 0)[0].cache if draft else None
        return self.on_mesh(speculation.start, state, tokens, cache)

    def _pace(self, state: DecodeState | SpeculativeState) -> tuple[int, int]:
        """The most tokens of a step, and the most steps of a chunk."""
        if isinstance(state, DecodeState):
            return 1, programs.CHUNK
        return self.guesses.num_draft + 1, speculation.steps_of(self.guesses.num_draft)

    def _advance(
        self, state: DecodeState | SpeculativeState, stop: np.ndarray, n: int, num_top: int
    ) -> tuple[DecodeState | SpeculativeState, Output]:
        program, options = programs.decode, {"num_top": num_top, "kernels": self.kernels}
        if isinstance(state, SpeculativeState):
            program, draft = speculation.speculate, self.guesses.draft
            options |= {"num_draft": self.guesses.num_draft}
            options |= {"draft_cfg": draft.cfg, "draft_params": draft.params} if draft else {}
        return self.on_mesh(program, self.cfg, self.params, state, stop, np.int32(n), **options)

    def _with_room(self, state: DecodeState | SpeculativeState, length: int) -> DecodeState | SpeculativeState:
        """The state with a cache for at least `length` tokens a row."""
        grow = programs.grow if isinstance(state, DecodeState) else speculation.grow
        while num_slots(cache_of(state)) < length:
            state = self.on_mesh(grow, state, cache_length=min(2 * num_slots(cache_of(state)), self.most_slots))
        return state


def _powers(first: int, last: int) -> Iterator[int]:
    """first, twice first, ..., and last."""
    while first < last:
        yield first
        first *= 2
    yield last
