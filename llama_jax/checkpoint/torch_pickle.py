"""The pickle inside a torch file, read by a machine that cannot call anything.

A pickle is a program: `pickle.load` runs whatever function it names. This is an interpreter of the few instructions that
`torch.save` writes for a dict of tensors (pickle protocol 2, and the additions of 4), written from the opcode table of Python's
`pickletools`. A function is only ever a name here, and three names mean something: an empty OrderedDict, a tensor, a parameter.
"""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.files import fail, is_size, shown
from llama_jax.errors import ExitCode, LlamaError

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
ORDERED_DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
MAX_AXES = 8


@dataclasses.dataclass(frozen=True)
class Storage:
    """`count` values of `dtype` in the archive's entry `data/KEY`."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides in elements. Not yet compared with the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    """A function or class that the pickle names."""

    name: str


def read_state_dict(data: bytes, where: str) -> dict[str, Tensor]:
    """The dict of tensors that a torch pickle describes.

    Args:
        data: the pickle.
        where: what to call it in messages.

    Raises:
        LlamaError: UNSAFE_PICKLE if it names a function or class other than the three; BAD_HEADER if it is damaged or is not
            a plain dict of tensors.
    """
    machine = _Machine(data, where)
    try:
        value = machine.run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as e:
        raise LlamaError(
            ExitCode.BAD_HEADER, f"{where} is damaged near byte {machine.at} of {len(data)}: download the file again"
        ) from e
    if not isinstance(value, dict):
        fail(ExitCode.BAD_HEADER, f"{where} holds a {type(value).__name__}, expected a dict of tensors (a state_dict)")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kind = "another dict" if isinstance(tensor, dict) else f"a {type(tensor).__name__}"
            fail(
                ExitCode.UNKNOWN_TENSOR,
                f"{where} holds {kind} under {shown(name)}, expected only tensors: save the model's state_dict by itself",
            )
    return value


class _Machine:
    """Stack, marks and memo, as in `pickle`; every value is a str, int, float, bool, None, tuple, list, dict or one of ours."""

    def __init__(self, data: bytes, where: str):
        self.data, self.where, self.at = data, where, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (op := self._take(1)) != b".":
            step = _STEPS.get(op)
            if step is None:
                calls = {b"i": "INST", b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2"}
                if op in calls:
                    fail(ExitCode.UNSAFE_PICKLE, self._unsafe(f"builds an object with {calls[op]}"))
                raise ValueError(op)
            step(self)
        return self.stack.pop()

    def _unsafe(self, what: str) -> str:
        return (
            f"{self.where} {what}: loading it would run code of whoever wrote the file, so it is refused. Weights need none; "
            "get them from their publisher, best as safetensors"
        )

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError("past the end")
        self.at += count
        return self.data[self.at - count : self.at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return self._take(end + 1 - self.at)[:-1].decode()

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def name(self, name: str) -> None:
        """GLOBAL: names a function or class. Only those we know get on the stack."""
        module, _, attribute = name.partition(" ")
        if name not in (ORDERED_DICT, TENSOR, PARAMETER) and not (module == "torch" and attribute in STORAGES):
            fail(ExitCode.UNSAFE_PICKLE, self._unsafe(f"uses {shown(f'{module}.{attribute}')}"))
        self.stack.append(_Global(name))

    def stack_global(self) -> None:
        module, attribute = self._pop(2)
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("a name that is not text")
        self.name(f"{module} {attribute}")

    def storage(self) -> None:
        """BINPERSID: ('storage', type, key, device, number of values)."""
        (given,) = self._pop(1)
        tag, kind, key, _, count = given
        dtype = STORAGES[kind.name.removeprefix("torch ")] if isinstance(kind, _Global) else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or not is_size(count):
            raise ValueError("not a storage")
        self.stack.append(Storage(dtype, key, count))

    def call(self) -> None:
        """REDUCE: a function on a tuple of arguments."""
        function, args = self._pop(2)
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is no function")
        if function.name == ORDERED_DICT and not args:
            self.stack.append({})
        elif function.name == TENSOR and len(args) >= 4:
            self.stack.append(_tensor(self.where, *args[:4]))
        elif function.name == PARAMETER and args and isinstance(args[0], Tensor):
            self.stack.append(args[0])
        else:
            fail(ExitCode.UNSAFE_PICKLE, self._unsafe(f"calls {shown(function.name.replace(' ', '.'))} with unusual arguments"))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or not all(isinstance(k, str | int) for k in keys):
            raise ValueError("items for something that is no dict")
        for key, value in zip(keys, values, strict=True):
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for something that is no list")
        self.stack[-1].extend(items)

    def build(self) -> None:
        """BUILD: attributes of an object. An OrderedDict of modules has `_metadata`; nothing of it matters."""
        self._pop(1)
        if not isinstance(self.stack[-1], dict):
            fail(ExitCode.UNSAFE_PICKLE, self._unsafe("sets attributes of an object"))

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]


def _tensor(where: str, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """Arguments of _rebuild_tensor_v2, with everything checked but the storage's place in the file."""
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError("not a tensor")
    fine = len(shape) == len(strides) <= MAX_AXES and is_size(offset) and all(map(is_size, (*shape, *strides)))
    count, last = 1, offset if fine else 0
    if fine:
        for size, stride in zip(shape, strides, strict=True):
            count *= size
            last += max(size - 1, 0) * stride
    if not fine or count > storage.count or (count and last >= storage.count):
        fail(
            ExitCode.BAD_OFFSET,
            f"{where} describes a tensor of shape {shown(shape)}, strides {shown(strides)} at {shown(offset)} in a storage of "
            f"{storage.count} values, which it does not fit: the file is damaged, download it again",
        )
    return Tensor(storage, offset, shape, strides)


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        value = read(m)  # first: collecting a tuple changes which stack is on top
        m.stack.append(value)

    return step


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._take(1),  # PROTO
    b"\x95": lambda m: m._take(8),  # FRAME
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"K": _push(lambda m: m._number("<B")),  # BININT1
    b"M": _push(lambda m: m._number("<H")),
    b"J": _push(lambda m: m._number("<i")),
    b"\x8a": _push(lambda m: int.from_bytes(m._take(m._number("<B")), "little", signed=True)),  # LONG1
    b"G": _push(lambda m: m._number(">d")),  # BINFLOAT
    b"X": _push(lambda m: m._take(m._number("<I")).decode()),  # BINUNICODE
    b"\x8c": _push(lambda m: m._take(m._number("<B")).decode()),
    b"U": _push(lambda m: m._take(m._number("<B")).decode()),  # SHORT_BINSTRING, of Python 2
    b"}": _push(lambda m: {}),
    b"]": _push(lambda m: []),
    b")": _push(lambda m: ()),
    b"\x85": _push(lambda m: tuple(m._pop(1))),  # TUPLE1
    b"\x86": _push(lambda m: tuple(m._pop(2))),
    b"\x87": _push(lambda m: tuple(m._pop(3))),
    b"t": _push(lambda m: tuple(m._to_mark())),
    b"(": _Machine.mark,
    b"0": lambda m: m.stack.pop(),
    b"1": _Machine._to_mark,  # POP_MARK
    b"q": lambda m: m.put(m._number("<B")),  # BINPUT
    b"r": lambda m: m.put(m._number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE
    b"h": _push(lambda m: m.memo[m._number("<B")]),  # BINGET
    b"j": _push(lambda m: m.memo[m._number("<I")]),
    b"s": lambda m: m.set_items(m._pop(2)),  # SETITEM
    b"u": lambda m: m.set_items(m._to_mark()),
    b"a": lambda m: m.append(m._pop(1)),  # APPEND
    b"e": lambda m: m.append(m._to_mark()),
    b"c": lambda m: m.name(f"{m._line()} {m._line()}"),  # GLOBAL
    b"\x93": _Machine.stack_global,
    b"Q": _Machine.storage,  # BINPERSID
    b"R": _Machine.call,
    b"b": _Machine.build,
}
