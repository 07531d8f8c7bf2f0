"""Files from outside: opened once, mapped, never read past their end; and the one way a reader reads JSON.

Nothing here or in the readers trusts a length: every size from a file is compared with the size of that file first, so that
a damaged or hostile checkpoint costs an error message and no memory.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llama_jax.errors import ExitCode, LlamaError

MAX_JSON = 64 * 2**20  # the largest published index (405B, 191 shards) is 0.1 MB
LFS_MAGIC = b"version https://git-lfs"


def fail(code: ExitCode, message: str) -> NoReturn:
    raise LlamaError(code, message)


def shown(value: Any) -> str:
    """A value from a file for an error message: short whatever it is (a pickle can hold nested tuples of any size)."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, bool | float | type(None)):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else "an integer above 2^64"
    if isinstance(value, list | tuple) and len(value) <= 8 and all(isinstance(v, int) for v in value):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    return f"{type(value).__name__} value"


class MappedFile:
    """A file's bytes, mapped and read-only: the kernel reads what is touched and may drop it again.

    Attributes:
        path: where it is.
        size: its bytes.

    Raises:
        LlamaError: it cannot be opened, is empty, or is a git-lfs pointer.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    fail(ExitCode.TRUNCATED, f"{path} is empty: download it again")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise LlamaError(ExitCode.NO_WEIGHTS, f"{path} cannot be read: {e.strerror or e}") from e
        _refuse_pointer(path, self.data[: len(LFS_MAGIC)])
        self._address = np.frombuffer(self.data, np.uint8).ctypes.data

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None) -> np.ndarray:
        """A read-only view of the mapped bytes; offset and strides in bytes. NumPy checks once more that it lies inside."""
        return np.ndarray(shape, dtype, self.data, offset if math.prod(shape) else 0, strides)

    def expect(self, view: np.ndarray) -> None:
        """Has the pages under `view` read from the disk, ahead of whoever touches them."""
        self._advise("MADV_WILLNEED", view)

    def drop(self, view: np.ndarray) -> None:
        """Takes the pages under `view` out of this process; a later read maps them again."""
        self._advise("MADV_DONTNEED", view)

    def _advise(self, advice: str, view: np.ndarray) -> None:
        low, high = np.lib.array_utils.byte_bounds(view)
        start = (low - self._address) // mmap.PAGESIZE * mmap.PAGESIZE
        if high > low and hasattr(mmap, advice):
            self.data.madvise(getattr(mmap, advice), start, high - self._address - start)


def _refuse_pointer(path: Path, head: bytes) -> None:
    if head == LFS_MAGIC:
        fail(ExitCode.LFS_POINTER, f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository")


def refuse_pointer(path: Path) -> Path:
    """Returns `path`, after a look at its first bytes."""
    try:
        with open(path, "rb") as file:
            _refuse_pointer(path, file.read(len(LFS_MAGIC)))
    except OSError as e:
        raise LlamaError(ExitCode.NO_WEIGHTS, f"{path} cannot be read: {e.strerror or e}") from e
    return path


def parse_json(text: bytes, where: str, code: ExitCode) -> dict[str, Any]:
    """An object from JSON; `code` for everything that is not one. A key that occurs twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if any(k == other for other, _ in pairs[:i]))
            raise ValueError(f"the key {shown(twice)} occurs twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)[:200]
        raise LlamaError(code, f"{where} is not valid JSON ({reason}): download it again") from e
    if not isinstance(value, dict):
        fail(code, f"{where} holds {type(value).__name__}, expected a JSON object")
    return value


def read_json(path: Path, code: ExitCode = ExitCode.BAD_CONFIG) -> dict[str, Any]:
    """The object in a small JSON file."""
    refuse_pointer(path)
    size = path.stat().st_size
    if size > MAX_JSON:
        fail(code, f"{path} has {size} bytes; no JSON file of a checkpoint is larger than {MAX_JSON}: is it another file?")
    return parse_json(path.read_bytes(), str(path), code)


def is_size(value: Any, limit: int = 2**48) -> bool:
    """A non-negative integer (no bool) that a file can mean as a count or an offset."""
    return type(value) is int and 0 <= value <= limit


def as_mapping(value: Any, where: str, code: ExitCode) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        fail(code, f"{where} is {shown(value)}, expected an object")
    return value
