"""Products with weights that have a low-rank adapter beside them: LoRA, rank-stabilised LoRA, DoRA.

An adapter of a weight W [out..., in...] is a dict of arrays: `a` [R, in...], `b` [out..., R], for DoRA `magnitude` [out...].
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.ops.linear import ACTIVATION_AXES, GATHERED_AXES, precision, project, project_each
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import constrain

Adapter = Mapping[str, Array]


def project_adapted(
    equations: tuple[str, ...],
    x: Array,
    weights: Sequence[Array | QArray],
    adapters: Sequence[Adapter | None],
    scale: float,
    dropout: float,
    seeds: Sequence[Array] | None,
) -> tuple[Array, ...]:
    """`project_each` with W x + scale * B A dropout(x) in the place of W x (Hu et al. 2021, arXiv:2106.09685, equation 3).

    With a magnitude m, rows are rescaled: m / |W + scale * B A| times that, |.| over the inputs of each output and without a
    gradient (DoRA: Liu et al. 2024, arXiv:2402.09353, equations 5 and 11). Products are in x's dtype; their sum is float32.

    Args:
        adapters: one per weight, None where there is none.
        dropout: rate at which inputs of A are zero, the others being divided by what is left; each weight draws its own.
        seeds: one per weight, uint32 [2]; None for no dropout (evaluation).
    """
    dropping = seeds is not None and dropout > 0
    adapted = [i for i, adapter in enumerate(adapters) if adapter is not None]
    down = tuple(_factors(equations[i])[0] for i in adapted)
    if dropping:
        products = project_each(equations, x, weights)
        whole = constrain(x, *(ACTIVATION_AXES[letter] for letter in equations[0].split(",")[0]))
        dropped = [_drop(whole, dropout, seeds[i]) for i in adapted]
        low = [project(equation, each, adapters[i]["a"]) for equation, each, i in zip(down, dropped, adapted, strict=True)]
    else:
        both = project_each((*equations, *down), x, (*weights, *(adapters[i]["a"] for i in adapted)))
        products, low = both[: len(equations)], both[len(equations) :]
    results = list(products)
    for i, inner in zip(adapted, low, strict=True):
        up = project(_factors(equations[i])[1], inner, adapters[i]["b"])
        total = products[i].astype(jnp.float32) + scale * up.astype(jnp.float32)
        if "magnitude" in adapters[i]:
            total *= _row_scale(equations[i], weights[i], adapters[i], scale, x.dtype)
        results[i] = total.astype(x.dtype)
    return tuple(results)


def _factors(equation: str) -> tuple[str, str]:
    """Equations of A and of B: "BTD,NHD->BTNH" -> "BTD,RD->BTR", "BTR,NHR->BTNH"."""
    operands, y = equation.split("->")
    x, weight = operands.split(",")
    inputs = "".join(letter for letter in weight if letter in x)
    outputs = weight.removesuffix(inputs)
    return f"{x},R{inputs}->BTR", f"BTR,{outputs}R->{y}"


def _drop(x: Array, rate: float, seed: Array) -> Array:
    """x with a share of it zero and the rest divided by what is left.

    Which is decided by a hash of each value's place, the same on every mesh. jax.random would cost ten times the arithmetic,
    and half a second of compilation for each weight of each unrolled layer (XLA:CPU).
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = _mix(_mix(place + seed[0]) ^ _mix(seed[1]))
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), x / (1 - rate), 0)


def _mix(bits: Array) -> Array:
    """MurmurHash3's finaliser (Appleby 2011, fmix32): a permutation of 32 bits in which each one changes half of the others."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _row_scale(equation: str, weight: Array | QArray, adapter: Adapter, scale: float, dtype: jnp.dtype) -> Array:
    """DoRA's m / |W + s B A|, [out...] float32; the norm is a constant to the gradient.

    |W + s B A|^2 = |W|^2 + 2 s B (W A^T) + s^2 B (A A^T) B^T per output: nothing of the weight's size is made, no weight moves.
    """
    letters = equation.split("->")[0].split(",")[1]
    down = _factors(equation)[0].split("->")[0].split(",")[1]
    outputs = letters.removesuffix(down[1:])
    value, steps = (weight.value, weight.scale[..., 0]) if isinstance(weight, QArray) else (weight, 1)
    a, b, value = jax.lax.stop_gradient((adapter["a"], adapter["b"], value))
    low = a.astype(dtype)
    squares = jnp.einsum(f"{letters}->{outputs}", jnp.square(value.astype(jnp.float32))) * steps**2
    cross = _einsum(f"{letters},{down}->{outputs}R", value.astype(dtype), low) * jnp.expand_dims(steps, -1)
    inner = _einsum(f"{down},{down.replace('R', 'S')}->RS", low, low)
    changes = 2 * cross + scale * _einsum(f"{outputs}R,RS->{outputs}S", b, inner)
    norm = jnp.sqrt(squares + scale * jnp.sum(b * changes, axis=-1))
    return constrain(adapter["magnitude"] / norm, *(GATHERED_AXES[letter] for letter in outputs))


def _einsum(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)
