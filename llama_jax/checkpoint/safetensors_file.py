"""The safetensors format: a length, that much JSON, then the tensors one after the other (llama-facts 3.3).

The `safetensors` package reads it too, but its errors do not say what to do, and it maps nothing of bfloat16 into NumPy.
"""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.files import MappedFile, fail, is_size, parse_json, shown
from llama_jax.checkpoint.lazy import LazyArray, mapped
from llama_jax.checkpoint.torch_pickle import MAX_AXES
from llama_jax.errors import ExitCode

MAX_HEADER = 100_000_000  # the limit of the reference implementation
DTYPES = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16), "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32), "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32), "F64": np.dtype(np.float64), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip


def open_safetensors(path: Path) -> dict[str, LazyArray]:
    """The tensors of a safetensors file by name; nothing but the header is read.

    Raises:
        LlamaError: BAD_HEADER, BAD_OFFSET, TRUNCATED; LFS_POINTER; NO_WEIGHTS when it cannot be opened.
    """
    file = MappedFile(path)
    if file.size < 8:
        fail(ExitCode.TRUNCATED, f"{path} has {file.size} bytes, a safetensors file at least 8: download it again")
    length = int.from_bytes(file.data[:8], "little")
    if length > min(file.size - 8, MAX_HEADER):
        fail(
            ExitCode.BAD_HEADER,
            f"{path} says that its header has {length} bytes, the file has {file.size}: it is cut short or is no "
            "safetensors file; download it again",
        )
    header = parse_json(file.data[8 : 8 + length], f"the header of {path}", ExitCode.BAD_HEADER)
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    _check_cover(path, entries, file.size - start)
    return {name: mapped(file, start + begin, shape, dtype) for name, (dtype, shape, begin, _) in entries.items()}


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin, end of one tensor, consistent with each other."""
    where = f"the header of {path}: {shown(name)}"
    kind, shape, offsets = (entry.get(k) if isinstance(entry, dict) else None for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        fail(ExitCode.BAD_HEADER, f"{where} has dtype {shown(kind)}, expected one of {', '.join(DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= MAX_AXES and all(map(is_size, shape))):
        fail(ExitCode.BAD_HEADER, f"{where} has shape {shown(shape)}, expected a list of at most {MAX_AXES} sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets)) and offsets[0] <= offsets[1]):
        fail(ExitCode.BAD_HEADER, f"{where} has data_offsets {shown(offsets)}, expected [begin, end]")
    begin, end = offsets
    dtype = DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != end - begin:
        fail(
            ExitCode.BAD_OFFSET,
            f"{where}, {kind} of shape {shown(shape)}, is said to lie in {end - begin} bytes, expected "
            f"{shown(math.prod(shape) * dtype.itemsize)}: download it again",
        )
    return dtype, tuple(shape), begin, end


def _check_cover(path: Path, entries: dict[str, tuple[np.dtype, tuple[int, ...], int, int]], size: int) -> None:
    """The tensors lie one after the other and fill the file, as the format demands."""
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            fail(
                ExitCode.BAD_OFFSET,
                f"the header of {path}: {shown(name)} begins at {begin} of the data, the tensor before it ends at {at}: "
                "the file is damaged, download it again",
            )
        at = end
    if at > size:
        fail(ExitCode.TRUNCATED, f"{path} has {size} bytes of data, its header describes {at}: download it again")
    if at < size:
        fail(ExitCode.BAD_OFFSET, f"{path} has {size} bytes of data, its header describes only {at}: download it again")
