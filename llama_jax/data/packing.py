"""Which documents share a row: an index row -> [(document, start, end)], made once and then read at any place.

Documents are shuffled (seeded, over all of them) and packed within windows of that order, so that a row holds documents from
anywhere and yet the search is small. `best_fit` keeps documents whole: best-fit decreasing, as in Ding et al. 2024
(arXiv:2404.10830), where only what is longer than a row is cut. `concat` joins all and cuts every `length` tokens: no padding
but in the last row, and most rows begin and end inside a document.
"""

import dataclasses
import shutil
import uuid
from pathlib import Path

import numpy as np

from llama_jax.data.order import shuffled
from llama_jax.data.store import read_json, write_json, write_whole

PACKINGS = ("best_fit", "concat")
LONG_DOCUMENTS = ("split", "truncate", "drop")


@dataclasses.dataclass(frozen=True)
class Index:
    """Attributes:
    pieces: [pieces, 3] int64: document, its first token, its last token + 1.
    rows: [rows + 1] int64: row r holds the pieces rows[r] to rows[r + 1].
    """

    pieces: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1

    def padding_share(self, length: int) -> float:
        """Of the rows' positions, how many hold nothing."""
        held = int((self.pieces[:, 2] - self.pieces[:, 1]).sum())
        return 1 - held / (len(self) * length) if len(self) else 0.0


def pack(lengths: np.ndarray, length: int, *, seed: int, packing: str, window: int) -> Index:
    """Rows of at most `length` tokens that hold every token of every document once.

    Args:
        lengths: [documents], tokens of each to pack (from its beginning); 0 for one that is left out.
        length: T.
        seed: of the documents' order.
        packing: best_fit | concat.
        window: documents that are packed together by best_fit.
    """
    order = shuffled(np.arange(len(lengths)), len(lengths), seed, "documents") if len(lengths) else np.empty(0, np.int64)
    order = order[lengths[order] > 0]
    if packing == "concat":
        return _concatenated(lengths[order], order, length)
    pieces, rows = [], [np.zeros(1, np.int64)]
    for first in range(0, len(order), window):
        documents = order[first : first + window]
        cut = _cut(lengths[documents], documents, length)
        row = np.asarray(_best_fit((cut[:, 2] - cut[:, 1]).tolist(), length))
        pieces.append(cut[np.argsort(row, kind="stable")])
        rows.append(rows[-1][-1] + np.cumsum(np.bincount(row)))
    return Index(np.concatenate(pieces or [np.empty((0, 3), np.int64)]), np.concatenate(rows))


def _cut(lengths: np.ndarray, documents: np.ndarray, length: int) -> np.ndarray:
    """Each document in pieces of at most a row: [pieces, 3]."""
    counts = -(-lengths // length)
    of = np.repeat(np.arange(len(documents)), counts)
    start = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return np.stack([documents[of], start, np.minimum(start + length, lengths[of])], axis=1)


def _best_fit(sizes: list[int], length: int) -> list[int]:
    """A row for each piece: the longest first, each into the fullest row that has room for it.

    Bit s of `spaces` says that a row with s free tokens exists: the smallest space from n on is one shift and one bit away.
    """
    row_of = [0] * len(sizes)
    open_rows: list[list[int]] = [[] for _ in range(length)]
    spaces = rows = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        n = sizes[i]
        if fitting := spaces >> n:
            space = n + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row = length, rows
            rows += 1
        row_of[i] = row
        if space > n:
            open_rows[space - n].append(row)
            spaces |= 1 << (space - n)
    return row_of


def _concatenated(lengths: np.ndarray, documents: np.ndarray, length: int) -> Index:
    """All documents one after the other, cut at every row's end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends - lengths, np.arange(0, total, length))  # where pieces begin
    of = np.searchsorted(ends, cuts, "right")
    begin = (ends - lengths)[of]
    until = np.append(cuts[1:], total)[: len(cuts)]
    pieces = np.stack([documents[of], cuts - begin, until - begin], axis=1)
    rows = np.searchsorted(cuts, np.arange(0, total, length))
    return Index(pieces, np.append(rows, len(cuts)))


def save_index(folder: Path, index: Index, counts: dict[str, int]) -> None:
    """Writes the folder whole or not at all; another process may have been faster."""
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir(parents=True)
    try:
        write_whole(beside / "pieces.bin", index.pieces.astype("<i8").tobytes())
        write_whole(beside / "rows.bin", index.rows.astype("<i8").tobytes())
        write_json(beside / "index.json", {"pieces": len(index.pieces), "rows": len(index), "counts": counts})
        if load_index(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
    except OSError:
        if load_index(folder) is None:
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_index(folder: Path) -> tuple[Index, dict[str, int]] | None:
    """A cached index that is whole, or None."""
    info = read_json(folder / "index.json")
    if info is None:
        return None
    shapes = {"pieces.bin": (info["pieces"], 3), "rows.bin": (info["rows"] + 1,)}
    arrays = []
    for name, shape in shapes.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != 8 * int(np.prod(shape)):
            return None
        arrays.append(np.asarray(np.memmap(file, "<i8", "r", shape=shape)))
    return Index(*arrays), info["counts"]
