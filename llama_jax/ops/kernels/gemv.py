"""A single token's products with weights on a GPU, and what goes before and after them, in one kernel each: weights are read
once, which is all the time there is (Pallas, compiled by Triton).

A program holds the row, and reads the weights of a few outputs, 16 bytes a thread at a time, as words (ops.kernels.words).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from llama_jax.ops.kernels.words import integer_flips, numbers, parts, per_word, to_words
from llama_jax.ops.qarray import GROUP, QArray, W8A8Array


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program does.

    Attributes:
        outputs: that it sums at a time.
        repeats: how often, one after the other.
        warps: that share it, of 32 threads.
    """

    outputs: int
    repeats: int
    warps: int

    @property
    def height(self) -> int:
        """Outputs of a program."""
        return self.outputs * self.repeats


TILES = {  # by bits of a weight, of rows up to LONG and beyond: the fastest of 14 on an H200 (benchmarks/gpu_decode.py)
    16: (Tile(2, 2, 8), Tile(4, 4, 8)),
    8: (Tile(2, 4, 4), Tile(8, 2, 8)),
    4: (Tile(8, 1, 4), Tile(4, 1, 4)),
}
LONG, LONGEST = 8192, 16384  # inputs; beyond the second the row needs twice as many threads' registers
THREADS, VECTOR = 32, 4  # of a warp, and the words of a thread's widest load


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel is compiled for.

    Attributes:
        size: outputs of the result.
        has_norm, has_scale, has_residual: whether there are such operands.
    """

    size: int
    gated: bool
    has_norm: bool
    has_scale: bool
    has_residual: bool
    eps: float
    weight_dtype: Any
    row_dtype: Any
    tile: Tile
    interpret: bool

    @property
    def has_flips(self) -> bool:
        return jnp.issubdtype(self.weight_dtype, jnp.integer)


def supports(weight: Array | QArray, dtype: DTypeLike, *, gated: bool = False) -> bool:
    """Whether `multiply_row` takes a row of a dtype and this weight [O, I]."""
    value = _value(weight)
    return _is_readable(weight, dtype) and value.shape[0] % ((1 + gated) * _tile(value).height) == 0


@functools.partial(jax.jit, static_argnames=("eps", "gated", "dtype", "tile", "interpret"))  # layers share a trace
def multiply_row(
    x: Array,
    weight: Array | QArray,
    *,
    norm: Array | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Array | None = None,
    dtype: DTypeLike | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Array:
    """A row times a weight: [I], [O, I] -> [O], summed in float32.

    Args:
        x: [I], bfloat16 or float16.
        weight: of x's dtype; or a QArray of int8 or int4, whose scales, [O, 1] or [O, I / 128], multiply the sums of their
            inputs.
        norm: [I]; x is first multiplied with it and divided by its root mean square, as ops.norm.rms_norm does, but without
            rounding in between.
        eps: of the norm.
        gated: the first half of the outputs is a gate, and the result, [O / 2], silu(gate) * the second half.
        residual: of the result's size, which is added to it.
        dtype: of the result; x's unless given.
        tile: for measurements; chosen unless given.
        interpret: run it in JAX operations (for tests on a CPU).
    """
    from jax.experimental.pallas import triton

    tile, operands = tile or _tile(_value(weight)), _operands(weight)
    words = operands[0]
    size = words.shape[0] // (2 if gated else 1)
    plan = _Plan(
        size=size,
        gated=gated,
        has_norm=norm is not None,
        has_scale=len(operands) > 1,
        has_residual=residual is not None,
        eps=eps,
        weight_dtype=_value(weight).dtype,
        row_dtype=x.dtype,
        tile=tile,
        interpret=interpret,
    )
    shape, ratio = words.shape[1:], per_word(plan.weight_dtype) // per_word(x.dtype)
    rows = [x] if norm is None else [x, norm.astype(x.dtype)]
    rows = [to_words(row).reshape(1, *shape, *([ratio] if ratio > 1 else [])) for row in rows]
    flips = [integer_flips(plan.weight_dtype)] if plan.has_flips else []
    inputs = [*flips, *rows, *operands, *([] if residual is None else [residual])]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(size // tile.height,),
        in_specs=[pl.BlockSpec(a.shape, lambda i, rank=a.ndim: (0,) * rank) for a in inputs],
        out_specs=pl.BlockSpec((size,), lambda i: (0,)),
        out_shape=jax.ShapeDtypeStruct((size,), dtype or x.dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
        name="multiply_row",
        interpret=interpret,
    )(*inputs)


def _kernel(plan: _Plan, *refs: Any) -> None:
    *refs, out_ref = refs
    flips, refs = refs[: int(plan.has_flips)], refs[int(plan.has_flips) :]
    rows, refs = refs[: 1 + plan.has_norm], refs[1 + plan.has_norm :]
    residual, weight = (refs[-1], refs[:-1]) if plan.has_residual else (None, refs)
    tile, dtype = plan.tile, out_ref.dtype
    start = pl.program_id(0) * tile.height
    multiply = _multiplier(plan, flips, rows, weight, start)
    for r in range(tile.repeats):
        y, *up = (y.astype(dtype) for y in multiply(r))
        if up:
            gate = y.astype(jnp.float32)
            y = (gate / (1 + jnp.exp(-gate))).astype(dtype) * up[0]
        at = pl.ds(start + r * tile.outputs, tile.outputs)
        out_ref[at] = y if residual is None else residual[at] + y


def _multiplier(
    plan: _Plan, flips: Sequence[Any], rows: Sequence[Any], weight: Sequence[Any], start: Array
) -> Callable[[int], list[Array]]:
    """What sums the products of the r-th outputs from `start` on, gated also of those that multiply them, of a weight in words
    [O, W], or [O, G, W / G] where groups of inputs have scales; to be called in order."""
    tile, shape = plan.tile, weight[0].shape[1:]
    starts = [start, plan.size + start] if plan.gated else [start]
    steps = min(tile.warps * THREADS * VECTOR // math.prod(shape[1:]), pl.next_power_of_2(shape[0]))
    count = -(-shape[0] // steps)  # chunks of a row
    flips = [ref[i] for ref in flips for i in range(ref.shape[0])]

    def load(unit: int) -> list[list[Array]]:
        places = [pl.ds(first + unit // count * tile.outputs, tile.outputs) for first in starts]
        return [[_load(ref, at, unit % count, steps, start) for ref in weight if len(ref.shape) > 1] for at in places]

    following = [load(0)]  # the next weights are on their way while these are multiplied
    xs, square = [], jnp.zeros((1, steps, *shape[1:]), jnp.float32)
    for c in range(count):
        x, *norm = (parts(_load(ref, pl.ds(0, 1), c, steps, start), 1 + len(shape), plan.row_dtype) for ref in rows)
        if norm:
            square += sum(part * part for part in x)
            x = [part * weight for part, weight in zip(x, norm[0], strict=True)]
        xs.append(x)
    inputs = math.prod(shape) * per_word(plan.weight_dtype)
    factor = jax.lax.rsqrt(jnp.sum(square) / inputs + plan.eps) if plan.has_norm else None

    def multiply(r: int) -> list[Array]:
        totals = [jnp.zeros((tile.outputs, steps), jnp.float32) for _ in starts]
        for c in range(count):
            chunks, unit = following.pop(), r * count + c + 1
            if unit < count * tile.repeats:
                following.append(load(unit))
            for i, (words, *scale) in enumerate(chunks):
                total = jnp.zeros(words.shape, jnp.float32) if scale else totals[i]
                for number, part in zip(numbers(words, plan.weight_dtype, flips), xs[c], strict=True):
                    total = _multiply_add(number, jnp.broadcast_to(part, number.shape), total, plan.interpret)
                totals[i] = totals[i] + jnp.sum(total, axis=2) * scale[0].astype(jnp.float32) if scale else total
        sums = [jnp.sum(total, axis=1) for total in totals]
        if plan.has_norm:
            sums = [y * factor for y in sums]
        if plan.has_scale and len(shape) == 1:
            places = (pl.ds(first + r * tile.outputs, tile.outputs) for first in starts)
            sums = [y * weight[1][at] for y, at in zip(sums, places, strict=True)]
        return sums

    return multiply


def _load(ref: Any, first: Any, c: int, size: int, number: Array) -> Array:
    """The c-th so many along the second axis, zeros past its end; `number` may be any."""
    from jax.experimental.pallas import triton

    last = [pl.ds(0, n) for n in ref.shape[2:]]
    if (c + 1) * size <= ref.shape[1]:
        return ref[first, pl.ds(c * size, size), *last]
    part = ref.at[first, pl.ds(c * size + 0 * number, size), *last]  # a constant slice would be out of bounds
    real = c * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < ref.shape[1]
    return triton.load(part, mask=jnp.broadcast_to(real.reshape(1, size, *[1] * len(last)), part.shape), other=0)


def _multiply_add(a: Array, b: Array, c: Array, interpret: bool) -> Array:
    """a * b + c in one instruction, where XLA has Triton make two."""
    from jax.experimental.pallas import triton

    if interpret:
        return a * b + c
    result = jax.ShapeDtypeStruct(a.shape, a.dtype)
    return triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[a, b, c], constraints="=f,f,f,f", pack=1, result_shape_dtypes=[result]
    )[0]


def _operands(weight: Array | QArray) -> tuple[Array, ...]:
    """What the kernel reads of a weight: words [O, W] and scales [O], or [O, G, W / G] and [O, G]."""
    if not isinstance(weight, QArray):
        return (to_words(weight),)
    words = to_words(weight.value)
    if not weight.has_groups:
        return words, weight.scale[:, 0]
    return words.reshape(*weight.scale.shape, -1), weight.scale


def _is_readable(weight: Array | QArray, dtype: DTypeLike) -> bool:
    value = _value(weight)
    if value.shape[1] % per_word(jnp.int4) or isinstance(weight, W8A8Array):  # which has its activations rounded, too
        return False
    if not isinstance(weight, QArray):
        return dtype in (jnp.bfloat16, jnp.float16) and weight.dtype == dtype
    if value.dtype == jnp.int4:
        return value.shape[1] == GROUP * weight.scale.shape[1] > GROUP
    return value.dtype == jnp.int8


def _value(weight: Array | QArray) -> Array:
    return weight.value if isinstance(weight, QArray) else weight


def _tile(value: Array) -> Tile:
    inputs = value.shape[1]
    tile = TILES[jax.dtypes.itemsize_bits(value.dtype)][inputs > LONG]
    return tile if inputs <= LONGEST else dataclasses.replace(tile, warps=2 * tile.warps)
