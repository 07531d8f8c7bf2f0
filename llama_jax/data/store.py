"""Token documents on disk: `DIR/{manifest.json, shard-00000.bin, shard-00000.json, ...}`.

A shard holds the documents of one unit of a source in one file that is mapped and never read whole: where each document ends,
which record it was, all tokens one after the other, a bit for each that is learnt. Its .json follows when it is complete, the
manifest when all are. Everything is written under another name first and then renamed; what is written depends on nothing
but the source, so that several processes may write the same folder.
"""

import bisect
import dataclasses
import errno
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.documents import Document
from llama_jax.errors import ExitCode, LlamaError

FORMAT, VERSION = "llama_jax tokens", 1
MANIFEST = "manifest.json"
REQUEST = "request.json"  # written first: whose shards these are


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """What a shard's .json says.

    Attributes:
        path: of the source's file; `first` is the number of its first record, from 0 (known when the folder is complete).
        records, documents, tokens, learnt_tokens: counts; records include blank ones and those that were skipped.
        skipped: bad records that were left out; first_skipped says what was wrong with one of them.
        kinds: documents of each kind of record.
        max_token: the largest id, -1 without tokens.
        dtype: of the tokens, uint16 or uint32.
        nbytes, sha256: of the .bin.
    """

    path: str
    first: int
    records: int
    documents: int
    tokens: int
    learnt_tokens: int
    skipped: int
    first_skipped: str
    kinds: Mapping[str, int]
    max_token: int
    dtype: str
    nbytes: int
    sha256: str


class Shard:
    """The documents of a shard, mapped.

    Attributes:
        ends: [documents] int64, where each ends in `tokens`.
        records: [documents] int64, which record of its unit each was, from 0.
        tokens: [tokens] uint16 or uint32.
    """

    def __init__(self, file: Path, info: ShardInfo):
        self._data = np.asarray(np.memmap(file, np.uint8, "r")) if info.nbytes else np.empty(0, np.uint8)
        n = 8 * info.documents
        width = np.dtype(info.dtype).itemsize
        self.ends = self._data[:n].view("<i8")
        self.records = self._data[n : 2 * n].view("<i8")
        self.tokens = self._data[2 * n : 2 * n + info.tokens * width].view(np.dtype(info.dtype).newbyteorder("<"))
        self._bits = self._data[2 * n + info.tokens * width :]

    def learnt(self, start: int, end: int) -> np.ndarray:
        """uint8 0 or 1 for the tokens [start, end)."""
        first = start // 8
        return np.unpackbits(self._bits[first : -(-end // 8)])[start - 8 * first : end - 8 * first]


def write_shard(file: Path, documents: Sequence[Document], records: Sequence[int], dtype: str) -> dict[str, Any]:
    """Writes the .bin; returns what its ShardInfo says about the contents."""
    tokens = np.concatenate(
        [np.asarray(d.ids, f"<{dtype[0]}{np.dtype(dtype).itemsize}") for d in documents] or [np.empty(0, dtype)]
    )
    learnt = np.concatenate([np.asarray(d.learnt, bool) for d in documents] or [np.empty(0, bool)])
    ends = np.cumsum([len(d.ids) for d in documents], dtype="<i8")
    parts = [part.tobytes() for part in (ends, np.asarray(records, "<i8"), tokens, np.packbits(learnt))]
    content = b"".join(parts)
    write_whole(file, content)
    kinds = [d.kind for d in documents]
    return dict(
        documents=len(documents),
        tokens=len(tokens),
        learnt_tokens=int(learnt.sum()),
        kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        max_token=int(tokens.max(initial=0)) if len(tokens) else -1,
        dtype=dtype,
        nbytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power cut."""
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(beside, file)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LlamaError(
            ExitCode.DISK_FULL, f"the disk of {file.parent} is full: make room and run the same command again, it goes on"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_whole(file, (json.dumps(value, indent=1) + "\n").encode())


def read_json(file: epath.Path) -> dict[str, Any] | None:
    """The object in a file that we wrote, or None when there is no such file or it is damaged."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_token_folder(path: epath.Path) -> bool:
    """Whether a folder was begun by prepare; it may not be complete."""
    return (read_json(path / REQUEST) or {}).get("format") == FORMAT


class TokenStore:
    """A complete folder.

    Attributes:
        folder: where it is.
        manifest: the object in manifest.json.
        shards: what each shard holds.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.shards = tuple(ShardInfo(**shard) for shard in manifest["shards"])
        self._open = functools.cache(lambda i: Shard(shard_file(folder, i), self.shards[i]))

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Raises:
        LlamaError: the folder is not complete, of another version, or damaged.
        """
        manifest = read_json(folder / MANIFEST)
        if manifest is None or manifest.get("format") != FORMAT:
            raise LlamaError(
                ExitCode.NO_DATA,
                f"{folder} has no complete {MANIFEST}: run the same prepare command again, it goes on where it stopped",
            )
        if manifest["version"] != VERSION:
            raise LlamaError(
                ExitCode.NO_DATA,
                f"{folder} has format version {manifest['version']}, this llama_jax reads version {VERSION}: prepare it again",
            )
        store = cls(folder, manifest)
        for i, info in enumerate(store.shards):
            file = shard_file(folder, i)
            size = file.stat().st_size if file.exists() else -1
            if size != info.nbytes:
                came = "is missing" if size < 0 else f"has {size:,} bytes, expected {info.nbytes:,}"
                raise LlamaError(
                    ExitCode.TRUNCATED, f"{file} {came}: run the command that made it again, it repairs the folder"
                )
        return store

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens, whatever the files they came from are called."""
        return self.manifest["content"]

    def shard(self, i: int) -> Shard:
        return self._open(i)


class Documents:
    """The documents of several stores, numbered through."""

    def __init__(self, stores: Sequence[TokenStore]):
        self.stores = tuple(stores)
        self._places = [(store, i) for store in stores for i in range(len(store.shards))]
        infos = [store.shards[i] for store, i in self._places]
        self._first = np.cumsum([0, *(info.documents for info in infos)])
        self._first_list = self._first.tolist()
        self.max_token = max((info.max_token for info in infos), default=-1)

    def __len__(self) -> int:
        return int(self._first[-1])

    def lengths(self) -> np.ndarray:
        """[documents] int64, tokens of each."""
        shards = [store.shard(i) for store, i in self._places]
        return np.concatenate([np.diff(shard.ends, prepend=0) for shard in shards] or [np.empty(0, np.int64)])

    def place(self, document: int) -> tuple[Shard, int, int]:
        """The shard of a document, and its first and last + 1 token there."""
        at = bisect.bisect_right(self._first_list, document) - 1
        store, i = self._places[at]
        shard = store.shard(i)
        local = document - self._first_list[at]
        return shard, int(shard.ends[local - 1]) if local else 0, int(shard.ends[local])

    def name(self, document: int) -> str:
        """`FILE:RECORD`, counted from 1: the line of a JSONL file."""
        at = bisect.bisect_right(self._first_list, document) - 1
        store, i = self._places[at]
        local = document - self._first_list[at]
        return f"{store.shards[i].path}:{store.shards[i].first + int(store.shard(i).records[local]) + 1}"

    def first_above(self, limit: int) -> tuple[int, int]:
        """The first document with a token of `limit` or above, and that token."""
        for at, (store, i) in enumerate(self._places):
            if store.shards[i].max_token >= limit:
                shard = store.shard(i)
                place = int(np.argmax(shard.tokens >= limit))
                return self._first_list[at] + int(np.searchsorted(shard.ends, place, "right")), int(shard.tokens[place])
        raise ValueError(f"no token is {limit} or above")


def shard_file(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.bin"
