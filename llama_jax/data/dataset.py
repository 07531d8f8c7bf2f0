"""Rows of packed documents, by number, and the endless stream of them that a run trains on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.data.batch import Batch
from llama_jax.data.order import shuffled
from llama_jax.data.packing import Index
from llama_jax.data.store import Documents
from llama_jax.errors import ExitCode, LlamaError

MIXTURE_ROWS = 4096  # in which the sources of a mixture have their shares, to one row


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a dataset holds; `str` of it is what a program prints.

    Attributes:
        documents, tokens: in the sources.
        learnt_tokens: targets that count in an epoch.
        rows: of an epoch.
        padding_share: of the rows' positions, how many hold nothing.
        skipped: bad records left out.
        split, truncated, dropped: documents longer than a row that were cut into several, lost their end, were left out (those
            count as well of which the end would have been all that is learnt).
        sources: of a mixture, for each: pattern, share, tokens, rows.
    """

    documents: int
    tokens: int
    learnt_tokens: int
    rows: int
    padding_share: float
    skipped: int
    split: int
    truncated: int
    dropped: int
    sources: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.learnt_tokens:,} learnt in an epoch of {self.rows:,} "
            f"rows ({self.padding_share:.2%} padding)"
        )
        happened = {
            "bad records skipped": self.skipped,
            "documents longer than a row cut into several": self.split,
            "documents longer than a row truncated": self.truncated,
            "documents dropped, longer than a row (or all that is learnt lies beyond it)": self.dropped,
        }
        return "; ".join([text, *(f"{count:,} {name}" for name, count in happened.items() if count)])


class Part:
    """Documents that are packed together: all of a dataset's, or one source of a mixture."""

    def __init__(self, name: str, documents: Documents, index: Index, counts: dict[str, int], fingerprint: str):
        self.name, self.documents, self.index, self.counts, self.fingerprint = name, documents, index, counts, fingerprint

    def pieces(self, row: int) -> list[list[int]]:
        """[document, start, end] of what the row holds."""
        return self.index.pieces[self.index.rows[row] : self.index.rows[row + 1]].tolist()

    def fill(self, row: int, batch: Batch, b: int) -> None:
        """Writes a row into row b of arrays that hold zeros."""
        tokens, targets, weights, positions, segments = batch
        at = 0
        for segment, (document, start, end) in enumerate(self.pieces(row), 1):
            shard, first, last = self.documents.place(document)
            n = end - start
            known = min(n, last - first - start - 1)  # tokens that another token of the document follows
            first += start
            until = at + n
            tokens[b, at:until] = shard.tokens[first : first + n]
            targets[b, at : at + known] = shard.tokens[first + 1 : first + 1 + known]
            weights[b, at : at + known] = shard.learnt(first + 1, first + 1 + known)
            positions[b, at:until] = np.arange(n, dtype=np.int32)
            segments[b, at:until] = segment
            at = until


class PackedDataset:
    """Rows of packed documents, each the same whenever it is asked for; safe to use from several threads.

    Attributes:
        length: T.
        statistics: what it holds.
        fingerprint: hash of tokens, packing and mixture: two datasets that share it train alike.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float] | None, length: int):
        self.length = length
        self._parts = tuple(parts)
        self._sizes = np.array([len(part.index) for part in parts])
        self._offsets = np.cumsum([0, *self._sizes])
        self._schedule = mixture_schedule(weights or [1.0])
        counts = np.bincount(self._schedule, minlength=len(parts))
        self._counts = counts
        self._ranks = np.empty_like(self._schedule)
        for part in range(len(parts)):
            self._ranks[self._schedule == part] = np.arange(counts[part])
        digest = json.dumps([[part.fingerprint for part in parts], counts.tolist() if weights else []])
        self.fingerprint = hashlib.sha256(digest.encode()).hexdigest()
        total = {name: sum(part.counts[name] for part in parts) for name in parts[0].counts}
        held = sum((1 - part.index.padding_share(length)) * len(part.index) for part in parts)
        shares = counts / counts.sum()
        sources = tuple(
            dict(source=part.name, share=float(share), tokens=part.counts["tokens"], rows=len(part.index))
            for part, share in zip(parts, shares, strict=True)
        )
        rows = int(self._offsets[-1])
        self.statistics = Statistics(**total, rows=rows, padding_share=1 - held / rows, sources=sources if weights else ())

    def __len__(self) -> int:
        """Rows in an epoch; of a mixture, the rows that all sources have together."""
        return int(self._offsets[-1])

    def row(self, i: int) -> Batch:
        """Row i as arrays [T]."""
        return Batch(*(array[0] for array in self.rows([i])))

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers as arrays [B, T]; -1 stands for a row of padding."""
        shape = (len(numbers), self.length)
        tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
        batch = Batch(tokens, targets, np.zeros(shape, np.float32), positions, segments)
        for b, number in enumerate(numbers):
            if number >= 0:
                part, row = self._find(int(number))
                part.fill(row, batch, b)
        return batch

    def documents_of(self, i: int) -> list[str]:
        """Where the documents of row i come from: `FILE:RECORD`, records (lines) counted from 1."""
        part, row = self._find(i)
        return [part.documents.name(document) for document, _, _ in part.pieces(row)]

    def _find(self, i: int) -> tuple["Part", int]:
        """The part that row i belongs to, and its number there."""
        p = int(np.searchsorted(self._offsets, i, "right")) - 1
        return self._parts[p], i - int(self._offsets[p])

    def stream_rows(self, places: np.ndarray, seed: int) -> np.ndarray:
        """The rows at these places of the endless stream, in which every source is shuffled anew for each of its epochs."""
        period, slot = np.divmod(places, len(self._schedule))
        part = self._schedule[slot]
        epoch, at = np.divmod(period * self._counts[part] + self._ranks[slot], self._sizes[part])
        rows = np.empty(len(places), np.int64)
        for p, e in set(zip(part.tolist(), epoch.tolist(), strict=True)):
            own = (part == p) & (epoch == e)
            rows[own] = self._offsets[p] + shuffled(at[own], int(self._sizes[p]), seed, "rows", p, e)
        return rows


def mixture_schedule(weights: Sequence[float]) -> np.ndarray:
    """Which source has its turn at each of MIXTURE_ROWS rows, after which all begins anew; turns are spread evenly.

    Every source has at least one row; the others are shared out by largest remainders.
    """
    if len(weights) == 1:
        return np.zeros(1, np.int64)
    if len(weights) > MIXTURE_ROWS // 4:
        raise LlamaError(ExitCode.BAD_CONFIG, f"{len(weights)} sources with weights, at most {MIXTURE_ROWS // 4} are possible")
    exact = np.asarray(weights) / sum(weights) * (MIXTURE_ROWS - len(weights))
    counts = 1 + np.floor(exact).astype(np.int64)
    counts[np.argsort(-(exact - np.floor(exact)), kind="stable")[: MIXTURE_ROWS - counts.sum()]] += 1
    source = np.repeat(np.arange(len(weights)), counts)
    turn = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return source[np.argsort(turn, kind="stable")]
