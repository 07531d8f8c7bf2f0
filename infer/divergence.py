"""How far the predictions of two models are apart, token by token.

The first model's logits wait on disk until the second is in memory: weights of one model at a time, and of float64
distributions no more than BLOCK of each.
"""

import dataclasses
import errno
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from infer.windows import windows
from llama_jax.errors import ExitCode, LlamaError

BLOCK = 64  # positions
LIKELIEST = 3  # tokens that are named where the models differ most


class StoredLogits:
    """float32 logits [P, V] in a temporary file, which is gone when the block ends."""

    def __init__(self, vocab_size: int):
        self._row = np.dtype((np.float32, vocab_size))
        self._file = tempfile.TemporaryFile()
        self.count = 0

    def __enter__(self) -> "StoredLogits":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, logits: np.ndarray) -> int:
        """Adds [n, V]; returns the place of the first."""
        try:
            self._file.seek(self.count * self._row.itemsize)
            self._file.write(np.ascontiguousarray(logits, np.float32))
            self._file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LlamaError(
                ExitCode.DISK_FULL,
                f"no room in {tempfile.gettempdir()} for the logits of {self.count + len(logits):,} positions "
                f"({self._row.itemsize:,} bytes each): lower config.max_tokens, or name another folder in TMPDIR",
            ) from None
        self.count += len(logits)
        return self.count - len(logits)

    def read(self, start: int, n: int) -> np.ndarray:
        """[n, V]."""
        self._file.seek(start * self._row.itemsize)
        return np.frombuffer(self._file.read(n * self._row.itemsize), np.float32).reshape(n, -1)


class Position(NamedTuple):
    """Where two models differ much.

    Attributes:
        place: which of all positions.
        likeliest_a, likeliest_b: (token, probability) of each model's likeliest.
    """

    place: int
    likeliest_a: list[tuple[int, float]]
    likeliest_b: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Of P positions, each of which predicts a token of a text from those before it.

    Attributes:
        kl: [P] KL(a || b) of the next token's distribution, nats.
        logprobs_a, logprobs_b: [P] of the text's own token.
        same_argmax: [P] whether both find the same token likeliest.
        largest: where kl is largest, in that order.
    """

    kl: np.ndarray
    logprobs_a: np.ndarray
    logprobs_b: np.ndarray
    same_argmax: np.ndarray
    largest: list[Position]

    def summary(self) -> dict[str, float]:
        return {
            "tokens": len(self.kl),
            "perplexity_a": perplexity(self.logprobs_a),
            "perplexity_b": perplexity(self.logprobs_b),
            "kl_mean": float(self.kl.mean()),
            "kl_median": float(np.median(self.kl)),
            "kl_p99": float(np.percentile(self.kl, 99)),
            "kl_max": float(self.kl.max()),
            "same_argmax": float(self.same_argmax.mean()),
        }


def perplexity(logprobs: np.ndarray) -> float:
    return float(np.exp(min(-logprobs.mean(), 700.0)))


def predictions(llama: Any, rows: Sequence[Sequence[int]], window: int, stride: int) -> Iterator[np.ndarray]:
    """Logits of every token of every row but its first, [n, V] float32 in their order, n at most BLOCK."""
    for row in rows:
        for begin, end, first in windows(len(row), window, stride):
            logits = llama.logits([row[begin:end]])[0, first - 1 - begin : end - 1 - begin]
            for at in range(0, len(logits), BLOCK):
                yield logits[at : at + BLOCK]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis, in float64.

    Raises:
        LlamaError: there are numbers that are none.
    """
    if not np.isfinite(logits).all():
        raise LlamaError(
            ExitCode.NOT_FINITE, "a model's logits are NaN or infinite: nothing can be compared; try another dtype"
        )
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def measure(
    stored: StoredLogits, start: int, second: Iterator[np.ndarray], targets: Sequence[int], num_largest: int
) -> Divergence:
    """Compares what was stored with a second model's `predictions` of the same rows.

    Args:
        start: the first model's first of them in `stored`.
        targets: [P] tokens that are predicted.
        num_largest: how many positions of the largest divergence are kept.
    """
    targets = np.asarray(targets)
    parts, largest, done = [], [], 0
    for block in second:
        a, b = log_softmax(stored.read(start + done, len(block))), log_softmax(block)
        kl = np.maximum(np.sum(np.exp(a) * (a - b), axis=-1), 0.0)  # below 0 only by rounding
        rows, own = np.arange(len(block)), targets[done : done + len(block)]
        parts.append((kl, a[rows, own], b[rows, own], a.argmax(axis=-1) == b.argmax(axis=-1)))
        for i in np.argsort(-kl)[:num_largest]:
            largest.append((kl[i], Position(done + int(i), likeliest(a[i]), likeliest(b[i]))))
        largest = sorted(largest, key=lambda item: -item[0])[:num_largest]
        done += len(block)
    return Divergence(*map(np.concatenate, zip(*parts, strict=True)), [position for _, position in largest])


def likeliest(logprobs: np.ndarray) -> list[tuple[int, float]]:
    """The LIKELIEST tokens of [V] and their probabilities."""
    best = np.argpartition(-logprobs, min(LIKELIEST, len(logprobs)) - 1)[:LIKELIEST]
    return [(int(i), float(np.exp(logprobs[i]))) for i in best[np.argsort(-logprobs[best])]]
