"""What a user asks for, checked before any work, and the arrays the device reads."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.state import MAX_STOP_IDS, MAX_TOP_LOGPROBS, Controls
from llama_jax.ops.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to continue a prompt. The defaults of temperature and top_p are Meta's (facebookresearch/llama generation.py).

    Attributes:
        max_new_tokens: at most so many tokens; 0 for as many as the context holds.
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest; 0 for all.
        top_p: keep the likeliest that together have this probability, the one that crosses it included.
        min_p: drop what is less likely than this share of the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer; 1 for none.
        frequency_penalty, presence_penalty: subtracted per occurrence, and once, for tokens in the answer; 0 for none.
        logit_bias: token id -> added to its logit.
        seed: the same seed gives the same text, whatever else is in the batch (log-probabilities to the bit, too, unless a
            neighbour needs a longer cache).
        n: answers per prompt; each is drawn independently.
        stop: strings that end the answer; they are not part of it.
        stop_ids: token ids that end the answer, besides those of the tokenizer and chat format.
        ignore_eos: do not stop at the tokenizer's and chat format's ids.
        logprobs: report each token's log-probability, and this many alternatives; -1 for none.
        echo: the text begins with the prompt.
    """

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    n: int = 1
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int = -1
    echo: bool = False

    def __post_init__(self):
        ranges = {
            "max_new_tokens": (0, 2**20),
            "temperature": (0, 1e4),
            "top_k": (0, 2**31 - 1),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (1e-3, 1e3),
            "frequency_penalty": (-1e3, 1e3),
            "presence_penalty": (-1e3, 1e3),
            "seed": (0, 2**64 - 1),
            "n": (1, 2**16),
            "logprobs": (-1, MAX_TOP_LOGPROBS),
        }
        for name, (low, high) in ranges.items():
            value, whole = getattr(self, name), type(getattr(Settings, name)) is int
            kind = numbers.Integral if whole else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                wanted = "a whole number" if whole else "a number"
                raise LlamaError(ExitCode.BAD_REQUEST, f"{name} is {value!r}, expected {wanted} from {low} to {high}")
            object.__setattr__(self, name, int(value) if whole else float(value))
        for name in ("ignore_eos", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise LlamaError(ExitCode.BAD_REQUEST, f"{name} is {getattr(self, name)!r}, expected True or False")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise LlamaError(ExitCode.BAD_REQUEST, f"stop is {self.stop!r}, expected strings that are not empty")
        object.__setattr__(self, "stop", tuple(stops))
        if not isinstance(self.stop_ids, Sequence) or not all(isinstance(token, numbers.Integral) for token in self.stop_ids):
            raise LlamaError(ExitCode.BAD_REQUEST, f"stop_ids are {self.stop_ids!r}, expected token ids")
        if not isinstance(self.logit_bias, Mapping) or not all(map(_is_bias, self.logit_bias.items())):
            raise LlamaError(ExitCode.BAD_REQUEST, f"logit_bias is {self.logit_bias!r}, expected {{token id: finite number}}")

    @property
    def needs_history(self) -> bool:
        """Whether penalties or a bias are used, which need arrays over the vocabulary."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


def _is_bias(item: tuple[object, object]) -> bool:
    token, bias = item
    return isinstance(token, numbers.Integral) and isinstance(bias, numbers.Real) and bool(np.isfinite(bias))


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence to continue.

    Attributes:
        tokens: ids of the prompt, at least one.
        settings: with max_new_tokens resolved to at least 1.
        stop_ids: all ids that end it.
        sample: which of the prompt's `n` answers this is.
    """

    tokens: Sequence[int]
    settings: Settings
    stop_ids: tuple[int, ...]
    sample: int = 0


def make_row(
    tokens: Sequence[int], settings: Settings, stop_ids: Sequence[int], *, vocab_size: int, max_length: int, sample: int = 0
) -> Row:
    """Checks a prompt against model and settings.

    Raises:
        LlamaError: the prompt is empty or too long, or names ids outside the vocabulary; the message has the numbers.
    """
    tokens = list(tokens)
    if not tokens:
        raise LlamaError(
            ExitCode.BAD_REQUEST, "the prompt has no tokens and the tokenizer no beginning-of-sequence: write a prompt"
        )
    for token in (*tokens, *settings.stop_ids, *settings.logit_bias):
        if not 0 <= token < vocab_size:
            raise LlamaError(
                ExitCode.BAD_REQUEST,
                f"token id {token} is outside the vocabulary of {vocab_size:,}: another model's tokenizer?",
            )
    room = max_length - len(tokens)
    new = settings.max_new_tokens
    if room < max(new, 1):
        wanted = f" and max_new_tokens is {new:,}" if new else ""
        excess = f": {len(tokens) + new:,} together" if new else ""
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"prompt has {len(tokens):,} tokens{wanted}{excess}, max_length is {max_length:,}: shorten the prompt, "
            "lower max_new_tokens, or raise config.max_length",
        )
    ends = dict.fromkeys([*settings.stop_ids, *(() if settings.ignore_eos else stop_ids)])
    if len(ends) > MAX_STOP_IDS:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{len(ends)} stop ids, at most {MAX_STOP_IDS}: use stop strings for the others")
    return Row(tokens, dataclasses.replace(settings, max_new_tokens=new or room), tuple(ends), sample)


def to_controls(rows: Sequence[Row], batch: int, vocab_size: int) -> Controls:
    """Arrays for a batch: the rows, then rows that fill it and generate nothing."""

    def column(values: Sequence, dtype: type, fill: float) -> np.ndarray:
        return np.array([*values, *[fill] * (batch - len(rows))], dtype)

    settings = [row.settings for row in rows]
    bias = None
    if any(s.needs_history for s in settings):
        bias = np.zeros((batch, vocab_size), np.float32)
        for b, s in enumerate(settings):
            for token, value in s.logit_bias.items():
                bias[b, token] = value
    stop_ids = np.full((batch, MAX_STOP_IDS), -1, np.int32)
    seed = np.zeros((batch, 3), np.uint32)
    for b, row in enumerate(rows):
        stop_ids[b, : len(row.stop_ids)] = row.stop_ids
        seed[b] = (row.settings.seed >> 32, row.settings.seed & 0xFFFFFFFF, row.sample)
    return Controls(
        sampling=Sampling(
            temperature=column([s.temperature for s in settings], np.float32, 0),
            top_k=column([s.top_k for s in settings], np.int32, 0),
            top_p=column([s.top_p for s in settings], np.float32, 1),
            min_p=column([s.min_p for s in settings], np.float32, 0),
            repetition=column([s.repetition_penalty for s in settings], np.float32, 1),
            frequency=column([s.frequency_penalty for s in settings], np.float32, 0),
            presence=column([s.presence_penalty for s in settings], np.float32, 0),
        ),
        seed=seed,
        max_new=column([s.max_new_tokens for s in settings], np.int32, 0),
        stop_ids=stop_ids,
        rope_length=column([len(row.tokens) + row.settings.max_new_tokens for row in rows], np.int32, 1),
        bias=bias,
    )
