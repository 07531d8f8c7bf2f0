"""A loaded model: generate, stream, chat, score, logits."""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.answer import Answer, Completion
from llama_jax.generation.engine import Engine
from llama_jax.generation.request import Row, Settings, make_row
from llama_jax.generation.speculation import Speculation, SpeculativeState, cache_of
from llama_jax.generation.state import MAX_TOP_LOGPROBS, DecodeState, Output, Prefix
from llama_jax.model import Params
from llama_jax.ops.kernels import Kernels
from llama_jax.text import chat, infill
from llama_jax.text.tokenizer import Tokenizer

STREAM_PACE_SECONDS = 0.1
Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclasses.dataclass
class Session:
    """What a conversation has read so far, so that only what is new is read in its next turn (`chat`, `stream_chat`).

    An answer that its reader leaves is not kept.
    """

    prefix: Prefix | None = None


class Llama:
    """A model with its tokenizer, ready to generate.

    Attributes:
        config: what the model computes.
        params: its weights, a tree of arrays (llama_jax.model). On a GPU `load` fuses its layers, unless in float32; those that
            are not (llama_jax.generation.layout.laid_out) generate more slowly there.
        tokenizer: None when the checkpoint has none; prompts are then token ids.
        chat_format: "" for a base model.
        max_length: tokens of prompt and answer together.
        batch_size: the most sequences generated at once.
        mesh: what params lie on; None for one device.
        engine: the loop around the compiled programs, with `kernels`, `guesses` and `cache_dtype`.

    Args:
        kernels: which of the platform's kernels programs may use (llama_jax.ops.kernels.probe.choose_kernels).
        guesses: how several tokens a step are made (llama_jax.generation.speculation); None for one.
        cache_dtype: of keys and values, one of llama_jax.choices.CACHE_DTYPES; score and logits read rounded ones, as decoding.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        chat_format: str = "",
        max_length: int | None = None,
        batch_size: int = 16,
        mesh: Mesh | None = None,
        kernels: Kernels = True,
        guesses: Speculation | None = None,
        cache_dtype: str = "auto",
    ):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.max_length = max_length or config.max_length
        self.batch_size = batch_size
        self.mesh = mesh
        self.engine = Engine(config, params, self.max_length, mesh, kernels=kernels, guesses=guesses, cache_dtype=cache_dtype)

    def prefill(self, prompt: Prompt) -> Prefix:
        """Reads what several prompts begin with, once: `generate(prompts, prefix=llama.prefill(shared))`.

        Raises:
            LlamaError: it is empty or longer than max_length, or keys depend on the length of the whole (`dynamic` RoPE).
        """
        tokens = self._encode(prompt)
        if self.config.rope_type == "dynamic":
            raise LlamaError(
                ExitCode.BAD_REQUEST,
                "dynamic RoPE rotates keys by the length of prompt and answer together: no prefix can be reused",
            )
        if not 1 <= len(tokens) <= self.max_length:
            raise LlamaError(
                ExitCode.BAD_REQUEST, f"{len(tokens):,} tokens to read, expected 1 to max_length ({self.max_length:,})"
            )
        return self.engine.prefix(tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: Settings | Sequence[Settings] | None = None,
        *,
        prefix: Prefix | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Continues prompts.

        Args:
            prompts: texts, or token ids (which are taken as they are, with no beginning-of-sequence put before them); whole,
                also with a prefix.
            settings: for all prompts, or one for each.
            prefix: from `prefill`; as many of its tokens as all prompts of a batch begin with are not read again.
            **changes: fields of Settings to set, e.g. `temperature=0, max_new_tokens=100`.

        Returns:
            settings.n completions per prompt, in the order of the prompts.

        Raises:
            LlamaError: a setting or prompt cannot be honoured; before any work is done.
        """
        answers = self._answers(prompts, settings, changes)
        for first in range(0, len(answers), self.batch_size):
            for _ in self._run(answers[first : first + self.batch_size], prefix=prefix):
                pass
        return [self._completion(answer) for answer in answers]

    def stream(self, prompt: Prompt, settings: Settings | None = None, **changes: Any) -> Iterator[str]:
        """Continues one prompt, yielding text as it is made; the pieces together are `generate`'s text."""
        changes["n"] = 1
        for _, piece in self.stream_all([prompt], settings, **changes):
            yield piece

    def stream_all(
        self,
        prompts: Sequence[Prompt],
        settings: Settings | Sequence[Settings] | None = None,
        *,
        prefix: Prefix | None = None,
        **changes: Any,
    ) -> Iterator[tuple[int, str]]:
        """Continues prompts together, yielding (index, text) as text is made; indices as in the list `generate` returns."""
        self._need_tokenizer()
        answers = self._answers(prompts, settings, changes)
        for first in range(0, len(answers), self.batch_size):
            batch = answers[first : first + self.batch_size]
            for b, answer in enumerate(batch):
                if answer.row.settings.echo:
                    yield first + b, self._prompt_text(answer.row)
            for b, piece in self._run(batch, STREAM_PACE_SECONDS, prefix):
                yield first + b, piece

    def chat(
        self, messages: Sequence[Message], settings: Settings | None = None, *, session: Session | None = None, **changes: Any
    ) -> Completion:
        """Answers a conversation: [{"role": "system" | "user" | "assistant", "content": text}, ...], the user's turn last.

        Args:
            session: of this conversation; what it has read before is not read again, and this turn is added to it.

        Raises:
            LlamaError: this is a base model, or the roles are out of order.
        """
        answer = self._chat_answer(messages, _settings(settings, changes))
        for _ in self._run_chat(answer, session):
            pass
        return self._completion(answer)

    def stream_chat(
        self, messages: Sequence[Message], settings: Settings | None = None, *, session: Session | None = None, **changes: Any
    ) -> Iterator[str]:
        """Answers a conversation as `chat` does, yielding text as it is made."""
        answer = self._chat_answer(messages, _settings(settings, changes))
        for _, piece in self._run_chat(answer, session, STREAM_PACE_SECONDS):
            yield piece

    def stream_infill(
        self, text: str, settings: Settings | None = None, *, suffix_first: bool = False, **changes: Any
    ) -> Iterator[str]:
        """Fills the one <FILL_ME> of a text (Code Llama), yielding prefix, middle and suffix as they are known.

        Args:
            suffix_first: the SPM order of Code Llama's paper instead of PSM.

        Raises:
            LlamaError: the text has no or several <FILL_ME>, or the tokenizer no infilling tokens.
        """
        tokenizer = self._need_tokenizer()
        prefix, suffix = infill.split_fill_me(text)
        tokens = infill.encode_infill(tokenizer, prefix, suffix, suffix_first)
        settings = dataclasses.replace(_settings(settings, changes), n=1, echo=False)
        stops = (infill.infill_stop_id(tokenizer), *self._stop_ids(""))
        answer = self._answer(tokens, settings, stops, continued=True)
        yield prefix
        for _, piece in self._run([answer], STREAM_PACE_SECONDS):
            yield piece
        yield suffix

    def infill(self, text: str, settings: Settings | None = None, **options: Any) -> str:
        """The whole text with its <FILL_ME> filled; options as in `stream_infill`."""
        return "".join(self.stream_infill(text, settings, **options))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the answer begins."""
        tokenizer = self._need_tokenizer()
        return chat.encode_chat(tokenizer, messages, self.chat_format, tokenizer.chat_template)

    def score(self, tokens: Sequence[int], num_top: int = 0) -> Output:
        """How likely each token is after those before it.

        Args:
            tokens: T ids, at least 2, at most max_length.
            num_top: alternatives to report, at most 20.

        Returns:
            Output of NumPy arrays for tokens[1:]: tokens, logprobs [T - 1], top_ids, top_logprobs [T - 1, num_top].
        """
        tokens = self._check_ids(tokens)
        T = len(tokens)
        if not 0 <= num_top <= MAX_TOP_LOGPROBS:
            raise LlamaError(ExitCode.BAD_REQUEST, f"num_top is {num_top}, expected 0 to {MAX_TOP_LOGPROBS}")
        if not 2 <= T <= self.max_length:
            raise LlamaError(ExitCode.BAD_REQUEST, f"{T:,} tokens to score, expected 2 to max_length ({self.max_length:,})")
        return self.engine.score(tokens, num_top)

    def logits(self, tokens: Any) -> np.ndarray:
        """Logits after every token: int [B, T] -> float32 [B, T, V]. T is at most max_length."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not 1 <= tokens.shape[1] <= self.max_length:
            came = f"{tokens.dtype} {list(tokens.shape)}"
            raise LlamaError(
                ExitCode.BAD_REQUEST, f"tokens are {came}, expected integers [B, T] with T from 1 to {self.max_length:,}"
            )
        self._check_ids(tokens.reshape(-1))
        return self.engine.logits(tokens)

    def _run(
        self, answers: Sequence[Answer], pace_seconds: float | None = None, prefix: Prefix | None = None
    ) -> Generator[tuple[int, str], None, DecodeState | SpeculativeState]:
        """Generates a batch; yields (index, new text) for rows with news, and returns the state in the end."""
        halt = np.zeros(len(answers), bool)
        outputs = self.engine.run([answer.row for answer in answers], halt, pace_seconds, prefix)
        while True:
            try:
                output = next(outputs)
            except StopIteration as end:
                return end.value
            for b, answer in enumerate(answers):
                piece = "" if answer.finish_reason else answer.push(output, b)
                halt[b] = bool(answer.finish_reason)
                if piece:
                    yield b, piece

    def _run_chat(
        self, answer: Answer, session: Session | None, pace_seconds: float | None = None
    ) -> Iterator[tuple[int, str]]:
        if session is None or self.config.rope_type == "dynamic":  # whose keys depend on the length of the whole
            yield from self._run([answer], pace_seconds)
            return
        state = yield from self._run([answer], pace_seconds, session.prefix)
        session.prefix = self.engine.kept(cache_of(state), [*answer.row.tokens, *answer.completion().tokens])

    def _chat_answer(self, messages: Sequence[Message], settings: Settings) -> Answer:
        settings = dataclasses.replace(settings, n=1, echo=False)
        return self._answer(self.encode_chat(messages), settings, self._stop_ids(self.chat_format), continued=False)

    def _answers(
        self, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings] | None, changes: Mapping[str, Any]
    ) -> list[Answer]:
        """Checked and ready to run: settings.n for each prompt."""
        _check_prompts(prompts)
        each = [settings] * len(prompts) if settings is None or isinstance(settings, Settings) else settings
        if len(each) != len(prompts):
            raise LlamaError(
                ExitCode.BAD_REQUEST, f"{len(each)} settings for {len(prompts)} prompts: give one for all or one each"
            )
        stops, special = self._stop_ids(""), self.tokenizer.special_ids if self.tokenizer else ()
        answers = []
        for prompt, own in zip(prompts, each, strict=True):
            own, tokens = _settings(own, changes), self._encode(prompt)
            continued = any(token not in special for token in tokens)  # then a leading space belongs to the answer
            answers += [self._answer(tokens, own, stops, continued=continued, sample=i) for i in range(own.n)]
        return answers

    def _answer(
        self, tokens: Sequence[int], settings: Settings, stop_ids: Sequence[int], *, continued: bool, sample: int = 0
    ) -> Answer:
        if settings.stop:
            self._need_tokenizer()
        row = make_row(tokens, settings, stop_ids, vocab_size=self.config.vocab_size, max_length=self.max_length, sample=sample)
        return Answer(row, self.tokenizer, continued=continued)

    def _completion(self, answer: Answer) -> Completion:
        row, echo = answer.row, answer.row.settings.echo
        logprobs = None
        if echo and row.settings.logprobs >= 0:
            logprobs = self.score(row.tokens).logprobs.tolist() if len(row.tokens) > 1 else []
        return answer.completion(self._prompt_text(row) if echo else "", logprobs)

    def _prompt_text(self, row: Row) -> str:
        return self.tokenizer.decode(row.tokens) if self.tokenizer else ""

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return self._check_ids(prompt)
        tokenizer = self._need_tokenizer()
        return tokenizer.encode(prompt, bos=tokenizer.adds_bos and tokenizer.bos_id is not None)

    def _stop_ids(self, chat_format: str) -> tuple[int, ...]:
        return chat.stop_ids(self.tokenizer, chat_format) if self.tokenizer else ()

    def _check_ids(self, tokens: Sequence[int]) -> list[int]:
        """A row of token ids as Python ints, all in the vocabulary."""
        try:
            ids = np.asarray(tokens)
        except ValueError:  # lists of different lengths
            ids = np.asarray(tokens, object)
        last = self.config.vocab_size - 1
        if ids.ndim == 1 and not ids.size:
            return []
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() > last:
            raise LlamaError(ExitCode.BAD_REQUEST, f"tokens are {tokens!r:.200}, expected a row of ids from 0 to {last}")
        return ids.astype(int).tolist()

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise LlamaError(
                ExitCode.BAD_TOKENIZER,
                "this checkpoint has no tokenizer: pass its file (--config.tokenizer=FILE, or tokenizer= in Python), or give "
                "token ids",
            )
        return self.tokenizer


def _settings(settings: Settings | None, changes: Mapping[str, Any]) -> Settings:
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(changes.keys() - known):
        raise LlamaError(ExitCode.BAD_REQUEST, f"no such setting: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return dataclasses.replace(settings or Settings(), **changes)


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise LlamaError(ExitCode.BAD_REQUEST, f"prompts are {prompts!r}, expected a list of texts or of lists of token ids")
