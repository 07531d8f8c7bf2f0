"""A weight where it lies on disk: all that a conversion holds of a 140 GB checkpoint until it copies a part of it.

A weight reaches us as rectangles: one per model-parallel shard, rows in steps of two once RoPE pairs become halves. So an
array is a list of boxes, each saying "this part of the array is that strided view of a mapped file". Concatenating, splitting
an axis and permuting RoPE rows rewrite the boxes; only `read` moves bytes, from the map straight to their place.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from llama_jax.checkpoint.files import MappedFile
from llama_jax.checkpoint.memory import aligned, is_aligned

CHUNK = 2**20  # elements dequantised, or bytes compared, at a time: bounds the temporaries


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Scales of int8 values, one per `group` values in the order of the file (llama2.c version 2).

    Attributes:
        scales: [values / group] float32, mapped.
        group: values that share one scale.
        address: where in memory the first value is mapped; a value's distance from it, one byte each, is its number.
    """

    scales: np.ndarray
    group: int
    address: int


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangular part of an array.

    Attributes:
        start: where it begins in the array, per axis.
        view: the mapped values, of the part's shape and any strides; unsigned integers of the dtype's width, because the
            bits are only moved (NumPy copies those at any alignment), or int8 with `quantised`.
        file: whose pages `view` shows.
        quantised: how int8 values become float32.
    """

    start: tuple[int, ...]
    view: np.ndarray
    file: MappedFile
    quantised: Quantised | None = None

    def take(self, axis: int, start: int, part: slice) -> "Box":
        """The rows `part` (of the view) of one axis, to begin at `start` in the array."""
        view = self.view[(slice(None),) * axis + (part,)]
        return dataclasses.replace(self, start=(*self.start[:axis], start, *self.start[axis + 1 :]), view=view)


class LazyArray:
    """A weight on disk: shape, dtype, and a read that touches only what is asked for."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype, boxes: Sequence[Box]):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.boxes = tuple(boxes)

    def __repr__(self) -> str:
        return f"LazyArray({self.shape}, {self.dtype}, {len(self.boxes)} parts)"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Copies the whole array, or the part at `index` (one slice of step 1 per axis), to memory, C-contiguous."""
        ranges = _ranges(index, self.shape)
        out = aligned([hi - lo for lo, hi in ranges], self.dtype)
        bits = out.view(_bits(self.dtype))
        for box in self.boxes:
            corner = zip(box.start, box.view.shape, ranges, strict=True)
            spans = [(max(at, lo), min(at + size, hi)) for at, size, (lo, hi) in corner]
            if any(lo >= hi for lo, hi in spans):
                continue
            target = tuple(slice(lo - first, hi - first) for (lo, hi), (first, _) in zip(spans, ranges, strict=True))
            source = tuple(slice(lo - at, hi - at) for (lo, hi), at in zip(spans, box.start, strict=True))
            if box.quantised is None:
                bits[(*target, ...)] = box.view[source]
            else:
                _dequantise(out[(*target, ...)], box.view[source], box.quantised)
        return out

    def view(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """What `read` returns: the mapped bytes themselves, read-only, where jax takes those on a CPU as they are (of one box,
        in C order, aligned), which the kernel is asked to read soon; a copy otherwise."""
        ranges = _ranges(index, self.shape)
        for box in self.boxes:
            corner = list(zip(box.start, box.view.shape, ranges, strict=True))
            if box.quantised is None and all(at <= lo and hi <= at + size for at, size, (lo, hi) in corner):
                view = box.view[(*(slice(lo - at, hi - at) for at, _, (lo, hi) in corner), ...)]
                if view.flags.c_contiguous and is_aligned(view):
                    box.file.expect(view)
                    return view.view(self.dtype)
        return self.read(index)

    def release(self) -> None:
        """Drops the mapped pages of this array from the process; reading again maps them again."""
        for box in self.boxes:
            box.file.drop(box.view)
            if box.quantised is not None:
                box.file.drop(box.quantised.scales)

    def split(self, axis: int, inner: int) -> "LazyArray":
        """Axis of size n * inner -> two axes [n, inner].

        A box may begin or end inside a row of the new axes (a model-parallel shard of half a head): it is cut there.
        """
        outer, rest = divmod(self.shape[axis], inner)
        assert rest == 0, (self.shape, axis, inner)
        boxes = []
        for box in self.boxes:
            first, last = box.start[axis], box.start[axis] + box.view.shape[axis]
            whole = (-(-first // inner) * inner, last // inner * inner)
            cuts = [first, *whole, last] if whole[0] <= whole[1] else [first, last]
            for lo, hi in itertools.pairwise(cuts):
                if lo < hi:
                    boxes.append(_split_box(box.take(axis, lo, slice(lo - first, hi - first)), axis, inner))
        return LazyArray((*self.shape[:axis], outer, inner, *self.shape[axis + 1 :]), self.dtype, boxes)

    def rope_halves(self) -> "LazyArray":
        """[N, H, D] with interleaved RoPE pairs (Meta) -> the same with halves (Hugging Face).

        Row i of the new first half is row 2i of a head, row i of the second is row 2i + 1 (huggingface/transformers,
        convert_llama_weights_to_hf.py, permute).
        """
        half = self.shape[1] // 2
        boxes = []
        for box in self.boxes:
            first, size = box.start[1], box.view.shape[1]
            for odd in (0, 1):
                skip = (first + odd) % 2
                if skip < size:
                    boxes.append(box.take(1, odd * half + (first + skip) // 2, slice(skip, None, 2)))
        return LazyArray(self.shape, self.dtype, boxes)


def mapped(
    file: MappedFile, offset: int, shape: Sequence[int], dtype: np.dtype, strides: Sequence[int] | None = None
) -> LazyArray:
    """An array in a file; offset and strides in bytes, already known to lie inside it."""
    view = file.array(offset, tuple(shape), _bits(dtype), None if strides is None else tuple(strides))
    return LazyArray(shape, dtype, [Box((0,) * len(view.shape), view, file)])


def mapped_int8(file: MappedFile, offset: int, shape: Sequence[int], group: int) -> LazyArray:
    """A float32 array stored as int8 values at `offset`, then the float32 scale of each `group` of them."""
    values = file.array(offset, tuple(shape), np.dtype(np.int8))
    scales = file.array(offset + values.size, (values.size // group,), np.dtype(np.float32))
    quantised = Quantised(scales, group, values.ctypes.data)
    return LazyArray(shape, np.dtype(np.float32), [Box((0,) * len(shape), values, file, quantised)])


def concatenate(arrays: Sequence[LazyArray], axis: int) -> LazyArray:
    """Arrays of one dtype, equal in all sizes but `axis`, one after the other."""
    boxes, at = [], 0
    for array in arrays:
        boxes += [box.take(axis, at + box.start[axis], slice(None)) for box in array.boxes]
        at += array.shape[axis]
    shape = list(arrays[0].shape)
    shape[axis] = at
    return LazyArray(shape, arrays[0].dtype, boxes)


def equal(a: LazyArray, b: LazyArray) -> bool:
    """Whether two arrays have the same shape, dtype and bytes; reads a MiB at a time and stops at the first difference."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows = max(1, CHUNK * a.shape[0] // max(1, a.nbytes)) if a.shape else 1
    rest = tuple(slice(0, n) for n in a.shape[1:])
    starts = range(0, a.shape[0], rows) if a.shape else ()
    same = all(
        a.read(part).tobytes() == b.read(part).tobytes()
        for part in ((slice(i, min(i + rows, a.shape[0])), *rest) for i in starts)
    )
    a.release()
    b.release()
    return same if a.shape else a.read().tobytes() == b.read().tobytes()


def _ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    if index is None:
        return [(0, n) for n in shape]
    if len(index) != len(shape):
        raise ValueError(f"index has {len(index)} slices, the array {len(shape)} axes: give one slice per axis")
    ranges = []
    for part, size in zip(index, shape, strict=True):
        lo, hi, step = part.indices(size)
        if step != 1:
            raise ValueError(f"index has step {step}: only parts of step 1 can be read")
        ranges.append((lo, max(lo, hi)))
    return ranges


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _split_box(box: Box, axis: int, inner: int) -> Box:
    """Splits an axis that holds part of one row, or whole rows, of `inner`; always a view."""
    start, size = box.start[axis], box.view.shape[axis]
    sizes = (1, size) if size < inner else (size // inner, inner)
    shape, step = box.view.shape, box.view.strides[axis]
    strides = (*box.view.strides[:axis], step * inner, step, *box.view.strides[axis + 1 :])
    view = np.lib.stride_tricks.as_strided(
        box.view, (*shape[:axis], *sizes, *shape[axis + 1 :]), strides, writeable=False
    )  # fmt: skip
    at = (*box.start[:axis], start // inner, start % inner, *box.start[axis + 1 :])
    return dataclasses.replace(box, start=at, view=view)


def _dequantise(out: np.ndarray, values: np.ndarray, quantised: Quantised) -> None:
    """out = values * their scales, some rows at a time. All float32, as llama2.c computes it."""
    rows = max(1, CHUNK // max(1, values[:1].size))
    for i in range(0, values.shape[0], rows):
        part = values[i : i + rows]
        number = np.int64(part.ctypes.data - quantised.address)
        for axis, (size, stride) in enumerate(zip(part.shape, part.strides, strict=True)):
            number = number + (np.arange(size) * stride).reshape((-1,) + (1,) * (part.ndim - axis - 1))
        with np.errstate(all="ignore"):  # a scale may be anything: who converts looks for weights that are not finite
            np.multiply(part, quantised.scales[number // quantised.group], out=out[i : i + rows], dtype=np.float32)
