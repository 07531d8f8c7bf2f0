"""An n-gram model of token ids: what the bundled model has to beat to show that it learnt more than local phrases."""

from collections.abc import Sequence

import numpy as np

DISCOUNT = 0.75


class NGram:
    """Interpolated Kneser-Ney with one discount (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7).

    An n-gram is one int64, its tokens as digits in base V, so V ** order must stay below 2 ** 63.
    """

    def __init__(self, rows: Sequence[Sequence[int]], order: int, vocab_size: int):
        """Counts. Each row opens with BOS, which is repeated as the context of the first tokens."""
        assert vocab_size**order < 2**63
        self.vocab_size = vocab_size
        self.order = order
        self.levels = []  # per order, from 1 up: sorted n-grams, counts, sorted contexts, their totals and distinct tokens
        grams, counts = np.unique(self._grams(rows), return_counts=True)
        for n in range(order, 0, -1):
            contexts, which = np.unique(grams // vocab_size, return_inverse=True)
            self.levels.insert(0, (grams, counts, contexts, np.bincount(which, counts), np.bincount(which)))
            grams, counts = np.unique(grams % vocab_size ** (n - 1), return_counts=True)  # in how many contexts, not how often

    def log_probs(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Natural logarithms of the probability of every token after each row's BOS, in one flat array."""
        return np.log(self._probs(self._grams(rows)))

    def perplexity(self, rows: Sequence[Sequence[int]]) -> float:
        """Per token, BOS given and EOS counted."""
        return float(np.exp(-self.log_probs(rows).mean()))

    def _probs(self, grams: np.ndarray) -> np.ndarray:
        probs = np.full(grams.shape, 1 / self.vocab_size)
        for n, (known, counts, contexts, totals, distinct) in enumerate(self.levels, start=1):
            gram = grams % self.vocab_size**n
            count = _look_up(known, counts, gram)
            total = _look_up(contexts, totals, gram // self.vocab_size)
            types = _look_up(contexts, distinct, gram // self.vocab_size)
            mixed = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * types * probs) / np.maximum(total, 1)
            probs = np.where(total > 0, mixed, probs)  # an unknown context: the shorter one decides
        return probs

    def _grams(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        powers = self.vocab_size ** np.arange(self.order - 1, -1, -1, dtype=np.int64)
        parts = []
        for row in rows:
            padded = np.array([row[0]] * (self.order - 2) + list(row), np.int64)[(self.order == 1) :]
            parts.append(np.lib.stride_tricks.sliding_window_view(padded, self.order) @ powers)
        return np.concatenate(parts)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
