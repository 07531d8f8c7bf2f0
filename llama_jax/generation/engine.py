"""The host's side of generation: buckets, chunks, and the loop that keeps the device one chunk ahead."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.generation import programs
from llama_jax.generation.request import Row, Settings, to_controls
from llama_jax.generation.state import MAX_TOP_LOGPROBS, DecodeState, Output
from llama_jax.model import Params

MIN_PROMPT_BUCKET = 16
SHARED_CHUNK = 8  # tokens between two looks at a stream, on several processes


def bucket(n: int, largest: int, smallest: int = 1) -> int:
    """The smallest power of two that holds n, between the two bounds: programs are compiled per bucket, not per size."""
    size = smallest
    while size < n:
        size *= 2
    return min(size, largest)


class Engine:
    """Token ids in, token ids out, for one set of parameters.

    Attributes:
        max_length: tokens a sequence may have, prompt and answer together.
        mesh: what the parameters lie on; None for one device. Every process of it makes the same calls.
        kernels: whether attention may use the platform's kernel (llama_jax.ops.kernels.probe.choose_attention).
        cache_dtype: of keys and values, one of llama_jax.model.CACHE_DTYPES.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        max_length: int,
        mesh: Mesh | None = None,
        *,
        kernels: bool = True,
        cache_dtype: str = "auto",
    ):
        self.cfg = cfg
        self.params = params
        self.max_length = max_length
        self.mesh = mesh
        self.kernels = kernels
        self.cache_dtype = cache_dtype

    def run(self, rows: Sequence[Row], halt: np.ndarray, pace_seconds: float | None = None) -> Iterator[Output]:
        """Continues all rows as one batch.

        Args:
            rows: the sequences.
            halt: [len(rows)] bool; set an entry between two yields and the row ends before its next chunk.
            pace_seconds: how often a reader wants news; chunks are as long as possible when not given.

        Yields:
            Output of NumPy arrays [len(rows), m]: the next m tokens of every row, -1 after its end.
        """
        batch = self._batch(len(rows))
        num_top = MAX_TOP_LOGPROBS if any(row.settings.logprobs > 0 for row in rows) else 0
        state, output = self._prefill(rows, batch, num_top)
        # The last token chosen is never fed back, so the cache holds one less than prompt and answer.
        prompts = np.array([len(row.tokens) for row in rows])
        limits = prompts + np.array([row.settings.max_new_tokens for row in rows]) - 1
        steps, made, read = int((limits - prompts).max()), 0, 0
        ended = np.zeros(len(rows), bool)
        waiting = collections.deque([(output, 1)])
        chunk, last_read = programs.CHUNK if pace_seconds is None else 1, None
        shared = jax.process_count() > 1  # clocks differ, and all processes must ask for the same steps
        while not (ended | halt).all():
            # The device works on the next chunk while this one is read; but a reader sees the first token at once.
            ahead = 1 if pace_seconds is not None and last_read is None else 2
            while made < steps and len(waiting) < ahead:
                n = min(chunk, steps - made)
                made += n
                state = self._with_room(state, int(np.minimum(prompts + made, limits).max()))
                stop = np.zeros(batch, bool)
                stop[: len(rows)] = halt
                state, output = self._on_mesh(programs.decode, self.cfg, self.params, state, stop, np.int32(n), num_top=num_top)
                waiting.append((output, n))
            output, n = waiting.popleft()
            output = Output(*(np.asarray(part)[: len(rows), :n] for part in output))
            now, read = time.monotonic(), read + n
            if shared and pace_seconds is not None:
                chunk = SHARED_CHUNK
            elif pace_seconds is not None and last_read is not None:
                chunk = int(np.clip(pace_seconds * n / max(now - last_read, 1e-6), 1, programs.CHUNK))
            last_read = now
            for b, row in enumerate(rows):
                last = output.tokens[b, -1]
                ended[b] |= last < 0 or last in row.stop_ids or read >= row.settings.max_new_tokens
            yield output

    def score(self, tokens: Sequence[int], num_top: int = 0) -> Output:
        """Log-probabilities of tokens[1:], each after those before it: Output of [T - 1] and [T - 1, num_top]."""
        T = len(tokens)
        padded, lengths = self._pad([tokens], self._batch(1))
        top = MAX_TOP_LOGPROBS if num_top else 0
        options = dict(kernels=self.kernels, cache_dtype=self.cache_dtype)
        output = self._on_mesh(programs.score, self.cfg, self.params, padded, lengths, num_top=top, **options)
        output = Output(*(np.asarray(part)[0, : T - 1] for part in output))
        return output._replace(top_ids=output.top_ids[:, :num_top], top_logprobs=output.top_logprobs[:, :num_top])

    def logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """[B, longest row, V] float32 of rows of tokens; after a row's end they mean nothing."""
        padded, lengths = self._pad(rows, self._batch(len(rows)))
        options = dict(kernels=self.kernels, cache_dtype=self.cache_dtype)
        found = self._on_mesh(programs.all_logits, self.cfg, self.params, padded, lengths, **options)
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(found, tiled=True)
        return np.asarray(found)[: len(rows), : max(map(len, rows)), : self.cfg.vocab_size]

    def warm_up(self, batch_size: int = 1, *, logprobs: bool = False, history: bool = False) -> None:
        """Compiles every program that requests up to this batch size can need; nothing is compiled after.

        Args:
            logprobs: also for requests with log-probabilities of the prompt and of alternatives.
            history: also for requests with penalties or a bias.
        """
        for num_top in (0, MAX_TOP_LOGPROBS) if logprobs else (0,):
            for penalty in (0.0, 1.0) if history else (0.0,):
                for batch in dict.fromkeys(map(self._batch, _powers(1, batch_size))):
                    self._warm_up_batch(batch, num_top, Settings(max_new_tokens=1, presence_penalty=penalty))
        for length in _powers(MIN_PROMPT_BUCKET, self.max_length) if logprobs else ():
            self.score([0] * length)

    def _warm_up_batch(self, batch: int, num_top: int, settings: Settings) -> None:
        for length in _powers(MIN_PROMPT_BUCKET, self.max_length):
            state, _ = self._prefill([Row([0] * length, settings, ())] * batch, batch, num_top)
            if length > MIN_PROMPT_BUCKET:
                continue
            nothing, none = np.zeros(batch, bool), np.int32(0)
            while True:
                state, _ = self._on_mesh(programs.decode, self.cfg, self.params, state, nothing, none, num_top=num_top)
                if _capacity(state) >= self.max_length:
                    break
                state = self._with_room(state, _capacity(state) + 1)

    def _prefill(self, rows: Sequence[Row], batch: int, num_top: int) -> tuple[DecodeState, Output]:
        tokens, lengths = self._pad([row.tokens for row in rows], batch)
        return self._on_mesh(
            programs.prefill,
            self.cfg,
            self.params,
            tokens,
            lengths,
            to_controls(rows, batch, self.cfg.vocab_size),
            cache_length=bucket(tokens.shape[1] + programs.CHUNK, self.max_length, MIN_PROMPT_BUCKET),
            num_top=num_top,
            kernels=self.kernels,
            cache_dtype=self.cache_dtype,
        )

    def _pad(self, rows: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [batch, bucket] and lengths [batch]; rows that only fill the batch are one token long."""
        tokens = np.zeros((batch, bucket(max(map(len, rows)), self.max_length, MIN_PROMPT_BUCKET)), np.int32)
        lengths = np.ones(batch, np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
            lengths[b] = len(row)
        return tokens, lengths

    def _batch(self, rows: int) -> int:
        """Rows of the programs that so many sequences run in: a bucket that the mesh divides."""
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return shards * bucket(-(-rows // shards), 2**20)

    def _on_mesh(self, program: Callable, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return program(*args, **kwargs)

    def _with_room(self, state: DecodeState, length: int) -> DecodeState:
        """The state with a cache for at least `length` tokens a row."""
        while _capacity(state) < length:
            state = self._on_mesh(programs.grow, state, cache_length=min(2 * _capacity(state), self.max_length))
        return state


def _capacity(state: DecodeState) -> int:
    return state.cache[0].k.shape[2]


def _powers(first: int, last: int) -> Iterator[int]:
    """first, twice first, ..., and last."""
    while first < last:
        yield first
        first *= 2
    yield last
