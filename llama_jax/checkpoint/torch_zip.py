"""Files of `torch.save`: a zip archive whose entries are stored as they are, so that tensors can be mapped.

Layout (llama-facts 3.2): `X/data.pkl` describes the tensors, `X/data/KEY` holds the bytes of one storage. The directory of the
archive is parsed here (PKWARE APPNOTE.TXT 6.3.9, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3): Python's zipfile gives no
offsets of data and raises a dozen kinds of exception on damaged files.
"""

import dataclasses
import struct
from pathlib import Path, PurePosixPath

from llama_jax.checkpoint.files import MappedFile, fail, shown
from llama_jax.checkpoint.lazy import LazyArray, mapped
from llama_jax.checkpoint.torch_pickle import Tensor, read_state_dict
from llama_jax.errors import ExitCode

MAX_PICKLE = 16 * 2**20  # a shard of 405B needs 0.2 MB
# Pickled 0x1950a86a20f9469cfc6c, the magic number of the old format; before it, \x80 and the protocol.
OLD_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file in the archive: its bytes are file[start : start + size]."""

    start: int
    size: int


def is_torch(head: bytes) -> bool:
    """Whether the first bytes of a file are those of `torch.save`, old or new."""
    return head[:4] == b"PK\x03\x04" or head[2 : 2 + len(OLD_MAGIC)] == OLD_MAGIC


def open_torch(path: Path) -> dict[str, LazyArray]:
    """The tensors of a torch file by name; nothing but the directory and the pickle is read.

    Raises:
        LlamaError: OLD_TORCH for the format before torch 1.6, TRUNCATED, BAD_HEADER, BAD_OFFSET, UNSAFE_NAME, UNSAFE_PICKLE,
            LFS_POINTER, NO_WEIGHTS when it cannot be opened.
    """
    file = MappedFile(path)
    entries = read_directory(file)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        fail(
            ExitCode.BAD_HEADER,
            f"{path} is a zip archive with {len(roots)} entries called data.pkl, expected one: not a file of torch.save",
        )
    root = roots[0]
    pickle = entries[root + "data.pkl"]
    if pickle.size > MAX_PICKLE:
        fail(
            ExitCode.BAD_HEADER,
            f"{path}: data.pkl has {pickle.size} bytes, expected at most {MAX_PICKLE}: not a model's weights",
        )
    order = entries.get(root + "byteorder")
    if order is not None and file.data[order.start : order.start + min(order.size, 8)] != b"little":
        fail(ExitCode.BAD_HEADER, f"{path} was written on a big-endian machine: save it again on a little-endian one")
    tensors = read_state_dict(file.data[pickle.start : pickle.start + pickle.size], f"{path}: {root}data.pkl")
    return {name: _open_tensor(file, entries, root, name, tensor) for name, tensor in tensors.items()}


def _open_tensor(file: MappedFile, entries: dict[str, Entry], root: str, name: str, tensor: Tensor) -> LazyArray:
    storage = tensor.storage
    width = storage.dtype.itemsize
    entry = entries.get(f"{root}data/{storage.key}")
    if entry is None:
        fail(
            ExitCode.BAD_OFFSET,
            f"{file.path}: tensor {shown(name)} lies in data/{shown(storage.key)}, which the archive lacks: download it again",
        )
    if entry.size < storage.count * width:
        fail(
            ExitCode.BAD_OFFSET,
            f"{file.path}: tensor {shown(name)} lies in {storage.count} values of {width} bytes, the entry "
            f"data/{shown(storage.key)} has only {entry.size} bytes: download it again",
        )
    strides = [n * width for n in tensor.strides]
    return mapped(file, entry.start + tensor.offset * width, tensor.shape, storage.dtype, strides)


def read_directory(file: MappedFile) -> dict[str, Entry]:
    """Entries of a zip archive by name, each checked to lie inside the file, uncompressed, under a harmless name."""
    path = file.path
    head = file.data[:32]
    if head[2 : 2 + len(OLD_MAGIC)] == OLD_MAGIC:
        fail(
            ExitCode.OLD_TORCH,
            f"{path} is in torch's format from before version 1.6 (2020): load it there and save it again with a newer torch",
        )
    if head[:4] != b"PK\x03\x04":
        fail(ExitCode.BAD_HEADER, f"{path} begins with {head[:4]!r}, expected b'PK\\x03\\x04', a file of torch.save")
    begin, end, count = _find_directory(file)
    entries: dict[str, Entry] = {}
    at = begin
    for _ in range(count):
        if at + _ENTRY.size > end:
            fail(
                ExitCode.BAD_HEADER,
                f"{path}: the archive's directory names {count} entries and holds {len(entries)}: it is damaged",
            )
        name, entry, at = _read_entry(file, at, begin, end)
        if name in entries:
            fail(
                ExitCode.BAD_HEADER, f"{path}: the archive has two entries called {shown(name)}: torch.save writes no such file"
            )
        entries[name] = entry
    return entries


def _find_directory(file: MappedFile) -> tuple[int, int, int]:
    """Where the central directory begins and ends, and its number of entries."""
    at = file.data.rfind(b"PK\x05\x06", max(0, file.size - _END.size - 0xFFFF))
    if at < 0 or at + _END.size > file.size:
        fail(
            ExitCode.TRUNCATED,
            f"{file.path} ({file.size} bytes) has no zip directory at its end: the download is incomplete, get it again",
        )
    *_, count, size, begin, comment = _END.unpack_from(file.data, at)
    end = at
    locator = at - _END64_LOCATOR.size
    if locator >= 0 and file.data[locator : locator + 4] == b"PK\x06\x07":
        end = _END64_LOCATOR.unpack_from(file.data, locator)[2]
        if end + _END64.size > locator or file.data[end : end + 4] != b"PK\x06\x06":
            fail(
                ExitCode.BAD_OFFSET,
                f"{file.path}: the zip64 directory is said to lie at {end}, where it is not: download it again",
            )
        *_, count, size, begin = _END64.unpack_from(file.data, end)
    if begin + size > end or count * _ENTRY.size > size or at + _END.size + comment > file.size:
        fail(
            ExitCode.BAD_OFFSET,
            f"{file.path}: the zip directory ({count} entries, {size} bytes at {begin}) does not fit before {end}: "
            "download it again",
        )
    return begin, begin + size, count


def _read_entry(file: MappedFile, at: int, limit: int, end: int) -> tuple[str, Entry, int]:
    """One entry of the central directory at `at`; data must lie before `limit`. Returns name, entry and the next position."""
    fields = _ENTRY.unpack_from(file.data, at)
    signature, flags, method, stored, size = fields[0], fields[3], fields[4], fields[8], fields[9]
    name_size, extra_size, comment_size, header = fields[10], fields[11], fields[12], fields[16]
    names = at + _ENTRY.size
    following = names + name_size + extra_size + comment_size
    if signature != b"PK\x01\x02" or following > end:
        fail(ExitCode.BAD_HEADER, f"{file.path}: the zip directory is damaged at byte {at}: download it again")
    raw = file.data[names : names + name_size]
    name = _safe_name(file.path, raw)
    stored, size, header = _zip64(file.data[names + name_size : names + name_size + extra_size], stored, size, header)
    if method != 0 or flags & 1 or stored != size:
        fail(
            ExitCode.BAD_HEADER,
            f"{file.path}: entry {shown(name)} is compressed or encrypted (method {method}): torch.save stores entries as they "
            "are; pack the archive again without compression",
        )
    start = header + _LOCAL.size + name_size
    if start > limit or file.data[header : header + 4] != b"PK\x03\x04":
        fail(
            ExitCode.BAD_OFFSET,
            f"{file.path}: entry {shown(name)} is said to begin at {header}, where none does: download it again",
        )
    *_, local_name_size, local_extra_size = _LOCAL.unpack_from(file.data, header)
    if file.data[start - name_size : start] != raw or local_name_size != name_size:
        fail(ExitCode.BAD_HEADER, f"{file.path}: entry {shown(name)} has another name where its data begins: download it again")
    start += local_extra_size
    if start + size > limit:
        fail(
            ExitCode.BAD_OFFSET,
            f"{file.path}: entry {shown(name)} is said to be bytes {start} to {start + size}, the data ends at {limit}: "
            "download it again",
        )
    return name, Entry(start, size), following


def _safe_name(path: Path, raw: bytes) -> str:
    name = raw.decode("utf-8", errors="replace")
    inner = PurePosixPath(name)
    if not name or inner.is_absolute() or ".." in inner.parts or any(c in name for c in "\\:\0\ufffd"):
        fail(
            ExitCode.UNSAFE_NAME,
            f"{path}: an entry of the archive is called {shown(name)}, which points outside it: do not use it",
        )
    return name


def _zip64(extra: bytes, stored: int, size: int, header: int) -> tuple[int, int, int]:
    """The three fields, each from the zip64 extra field where it says 0xFFFFFFFF; left as they are when that is missing."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            field = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            size, stored, header = (next(values, n) if n == 0xFFFFFFFF else n for n in (size, stored, header))
            break
        at += 4 + length
    return stored, size, header
