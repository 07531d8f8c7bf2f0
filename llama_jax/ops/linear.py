"""Products with weights: projections, and the lookup of embeddings."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from llama_jax.cpu_features import has_amx
from llama_jax.ops.qarray import QArray, W8A8Array, dequantize, quantize
from llama_jax.sharding import (
    RULES,
    constrain,
    fsdp_is_wide,
    is_partitioned,
    mesh_axis_size,
    num_parts,
    per_device,
    sum_and_scatter,
)

# Logical axes by the letters of einsum equations: what a weight's or an activation's axes are is written once, there.
WEIGHT_AXES = {
    "D": "embed", "N": "heads", "K": "kv_heads", "H": "head_dim", "F": "mlp", "V": "vocab", "R": "lora_rank",
    "P": "fused", "C": "fused",
}  # fmt: skip
GATHERED_AXES = WEIGHT_AXES | {"D": "act_embed"}  # of a weight whole over fsdp
ACTIVATION_AXES = GATHERED_AXES | {"B": "batch", "T": "length"}
RESIDUAL_AXES = ACTIVATION_AXES | {"T": "residual_length"}  # of "BTD": what norms and additions work on


FEW_ROWS = 8  # up to here a weight whose scales belong to groups of inputs is multiplied group by group
# From so many numbers of a result on a GPU's product rounds its float32 sums itself: they are then tiles enough for all of its
# processors, where XLA would divide the sums of fewer among several, and add these rounded.
MANY_RESULTS = 2**22


def project(equation: str, x: Array, weight: Array | QArray, dtype: DTypeLike | None = None) -> Array:
    """Contracts activations with a weight kept as `[out..., in...]`, PyTorch's orientation.

    Operands are in x's dtype, the sum is float32 (a bfloat16 sum of 4,096 products keeps two digits), and the result is cast
    once, at the end. So in the backward pass: the cotangent is cast to x's dtype before both products, which then are what the
    matrix units multiply fast (autodiff alone would multiply in float32), and the weight's gradient is their float32 sum. On a
    mesh the weight is gathered over fsdp in x's dtype, and its float32 gradient reduced and scattered back.

    Args:
        equation: einsum equation in the letters of the project, e.g. "BTD,NHD->BTNH"; they say how axes lie on the mesh.
        x: activations.
        weight: cast to x's dtype; scales of a QArray multiply the sum, or a group's part of it. With a W8A8Array x is rounded,
            too (Dettmers et al. 2022, arXiv:2208.07339, section 2.1: a scale per row), and has no gradient.
        dtype: of the result; x's when not given.
    """
    return project_each((equation,), x, (weight,), dtype)[0]


def project_each(
    equations: tuple[str, ...], x: Array, weights: Sequence[Array | QArray], dtype: DTypeLike | None = None
) -> tuple[Array, ...]:
    """`project` of the same x with several weights; on a mesh x is gathered, and its gradient summed over devices, once."""
    if any(isinstance(weight, W8A8Array) or _goes_by_group(x, weight) for weight in weights):
        return tuple(
            _by_itself(equation, x, w).astype(dtype or x.dtype) for equation, w in zip(equations, weights, strict=True)
        )
    values = tuple(_float_value(equation, weight, x.dtype) for equation, weight in zip(equations, weights, strict=True))
    scales = [weight.scale[..., 0] if isinstance(weight, QArray) and not weight.has_groups else None for weight in weights]
    result = jnp.dtype(dtype or x.dtype)
    sums = _products(equations, result if all(scale is None for scale in scales) else jnp.dtype(jnp.float32), x, values)
    return tuple((y if scale is None else y * scale).astype(result) for y, scale in zip(sums, scales, strict=True))


def _float_value(equation: str, weight: Array | QArray, dtype: DTypeLike) -> Array:
    """What x is multiplied with: a weight, or the value of one whose scales multiply the sum."""
    if not isinstance(weight, QArray):
        return weight
    if not weight.has_groups:
        return _gathered(equation, weight.value, dtype)
    return dequantize(weight._replace(value=_gathered(equation, weight.value, weight.value.dtype)), dtype)


def _goes_by_group(x: Array, weight: Array | QArray) -> bool:
    return isinstance(weight, QArray) and weight.has_groups and x.shape[0] * x.shape[1] <= FEW_ROWS


def _by_itself(equation: str, x: Array, weight: Array | QArray) -> Array:
    """The float32 product with one weight. Where x is rounded or groups are few, it is not made float as a whole."""
    if not isinstance(weight, W8A8Array) and not _goes_by_group(x, weight):
        return project(equation, x, weight, jnp.float32)
    letters_x, letters_w, letters_y = _letters(equation)
    x = constrain(x, *_axes(ACTIVATION_AXES, letters_x))
    value = constrain(weight.value, *_axes(GATHERED_AXES, letters_w))
    B, T, *inputs = x.shape
    outputs = weight.scale.shape[:-1]
    if isinstance(weight, W8A8Array):
        rows = quantize(x, len(inputs), "int8")
        sums = _multiplied(equation, rows.value, value).astype(jnp.float32)
        y = sums * rows.scale.reshape(B, T, *[1] * len(outputs)) * weight.scale[..., 0]
    else:
        groups, letters_o = weight.scale.shape[-1], letters_w[: len(outputs)]
        scale = jnp.moveaxis(weight.scale, -1, 0)[:, None].astype(jnp.float32)  # [G, 1, outputs]
        parts, value = x.reshape(B * T, groups, -1), value.reshape(*outputs, groups, -1).astype(x.dtype)
        sums = _einsum(f"MGI,{letters_o}GI->GM{letters_o}", parts, value)
        y = jnp.sum(sums * scale, axis=0).reshape(B, T, *outputs)
    return _constrain_activation(y, letters_y)


def _multiplied(equation: str, x: Array, weight: Array) -> Array:
    """matmul of activations [B, T, ...], where a single row becomes several on a CPU.

    There is a kernel for one row of float32 only; otherwise the whole weight is made float32 first.
    """
    if x.shape[:2] != (1, 1) or x.dtype == jnp.float32:
        return matmul(equation, x, weight)

    def padded(x: Array, weight: Array) -> Array:
        rows = jnp.pad(x, ((0, 0), (0, _cpu_rows() - 1), *[(0, 0)] * (x.ndim - 2)))
        return _einsum_of_matrices(equation, rows, weight)[:, :1]

    return jax.lax.platform_dependent(x, weight, cpu=padded, default=functools.partial(_einsum, equation))


def _cpu_rows() -> int:
    """That a single one is multiplied as on a CPU: four with AMX, where two take 1.1 times as long; two with AVX2, where four
    take 1.2 to 1.5 times as long."""
    return 4 if has_amx() else 2


def matmul(equation: str, a: Array, b: Array) -> Array:
    """An einsum without batch axes, summed in float32, in the form that a platform's XLA is fast at."""
    matrices, plain = (functools.partial(f, equation) for f in (_einsum_of_matrices, _einsum))
    return jax.lax.platform_dependent(a, b, cpu=matrices, default=plain)


def _rounded_matmul(equation: str, a: Array, b: Array) -> Array:
    """matmul of many results, its sums rounded to the operands' dtype: on a GPU by the product itself, after which float32 sums
    would be written to memory and read again."""

    def rounded(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=a.dtype)

    def plain(a: Array, b: Array) -> Array:
        return matmul(equation, a, b).astype(a.dtype)

    return jax.lax.platform_dependent(a, b, cuda=rounded, default=plain)


def _einsum_of_matrices(equation: str, a: Array, b: Array) -> Array:
    """Axes that are summed together, or kept together, become one: XLA:CPU transposes what has more than two, in memory."""
    letters_a, letters_b, letters = _letters(equation)
    sizes = dict(zip(letters_a + letters_b, a.shape + b.shape, strict=True))
    if letters[0] in letters_b:
        a, b, letters_a, letters_b = b, a, letters_b, letters_a
    (a, axis_a), (b, axis_b) = _matrix(a, letters_a, letters_b), _matrix(b, letters_b, letters_a)
    if axis_a == axis_b == 0 and a.dtype != jnp.float32:  # there is no kernel for it
        a, axis_a = _transposed(a), 1
    y = jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), **_sums(a.dtype))
    return y.reshape([sizes[letter] for letter in letters])


def _matrix(x: Array, letters: str, others: str) -> tuple[Array, int]:
    """x as a matrix, and which of its axes is the one to sum over: of all letters that are in `others`, too."""
    own = math.prod(size for size, letter in zip(x.shape, letters, strict=True) if letter not in others)
    return (x.reshape(-1, own), 0) if letters[0] in others else (x.reshape(own, -1), 1)


def _transposed(x: Array) -> Array:
    """x.T in memory. A transpose that is left to XLA:CPU becomes part of the product, for which it then makes both operands
    float32: 2.5 to 4 times as long with AMX. On a mesh an array whose layout is fixed would be gathered."""
    return jax.lax.optimization_barrier(x.T) if is_partitioned() else with_layout_constraint(x.T, Layout((0, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(equations: tuple[str, ...], dtype: DTypeLike, x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    """The sums: float32, or rounded to a dtype where that is done best with the product."""
    return _each(equations, dtype, x, weights, _multiplied)


def _each(equations, dtype, x, weights, multiply):
    x = constrain(x, *_axes(ACTIVATION_AXES, _letters(equations[0])[0]))

    def run(equation: str, weight: Array) -> Array:
        weight = _gathered(equation, weight, x.dtype)
        if dtype == x.dtype and _is_rounded_at_once(equation, x, weight):
            return _rounded_matmul(equation, x, weight)
        return multiply(equation, x, weight)

    sums = map(run, equations, weights)
    return tuple(_constrain_activation(y, _letters(equation)[2]) for equation, y in zip(equations, sums, strict=True))


def _products_forward(equations, dtype, x, weights):
    return _each(equations, dtype, x, weights, matmul), (x, weights)  # rows that are trained on are many


def _products_backward(equations, dtype, saved, cotangents):
    x, weights = saved
    letters_x = _letters(equations[0])[0]
    whole_x = constrain(x, *_axes(ACTIVATION_AXES, letters_x))
    dxs, dweights = [], []
    for equation, weight, cotangent in zip(equations, weights, cotangents, strict=True):
        _, letters_w, letters_y = _letters(equation)
        cotangent = constrain(cotangent.astype(x.dtype), *_axes(ACTIVATION_AXES, letters_y))
        operands = f"{letters_y},{letters_w}->{letters_x}", cotangent, _gathered(equation, weight, x.dtype)
        if len(weights) == 1 and _is_rounded_at_once(*operands):  # several are added first
            dxs.append(_rounded_matmul(*operands))
        else:
            dxs.append(matmul(*operands))
        dweights.append(_weight_gradient(equation, whole_x, cotangent).astype(weight.dtype))
    return _constrain_activation(sum(dxs), letters_x).astype(x.dtype), tuple(dweights)


def _is_rounded_at_once(equation: str, x: Array, weight: Array) -> bool:
    """Whether a device has many of the product's results, in fewer bits than their sums, and all that is summed for them: parts
    of sums that several devices add are float32."""
    if x.dtype == jnp.float32:
        return False
    letters_x, letters_w, letters_y = _letters(equation)
    sizes = dict(zip(letters_x + letters_w, x.shape + weight.shape, strict=True))
    if any(num_parts(ACTIVATION_AXES[letter]) > 1 for letter in letters_w if letter in letters_x):
        return False
    return math.prod(sizes[letter] // num_parts(ACTIVATION_AXES[letter]) for letter in letters_y) >= MANY_RESULTS


def _weight_gradient(equation: str, x: Array, cotangent: Array) -> Array:
    """The float32 sum over all tokens, each device keeping its part."""
    letters_x, letters_w, letters_y = _letters(equation)

    def product(x: Array, cotangent: Array) -> Array:
        return matmul(f"{letters_x},{letters_y}->{letters_w}", x, cotangent)

    names = _axes(WEIGHT_AXES, letters_w)
    if "D" not in letters_w or not fsdp_is_wide():
        return constrain(product(x, cotangent), *names)

    def local(x: Array, cotangent: Array) -> Array:
        return sum_and_scatter(product(x, cotangent), axis=letters_w.index("D"))

    return per_device(local, (_axes(ACTIVATION_AXES, letters_x), _axes(ACTIVATION_AXES, letters_y)), names)(x, cotangent)


_products.defvjp(_products_forward, _products_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Array, tokens: Array, dtype: DTypeLike) -> Array:
    """Rows of an embedding table in a dtype: [V, D], [B, T] -> [B, T, D]; the table's gradient is summed in float32.

    On a mesh the table is gathered over fsdp, every device looks up what its part of the vocabulary has, and the sum over
    devices is exact: all but one add zero. (Left to the partitioner, every device gets a copy of the table or the activations.)
    """

    def look_up(table: Array, tokens: Array) -> Array:
        ids = local_ids(tokens, table.shape[0])
        rows = jax.lax.platform_dependent(table, ids, cpu=_rows_by_bits, default=_rows)
        return jax.lax.psum(rows, RULES["vocab"]) if is_partitioned() else rows

    run = per_device(look_up, (("vocab", "act_embed"), ("batch", "length")), ("batch", "length", "act_embed"))
    return _constrain_activation(run(gather_table(table, dtype), tokens), "BTD")


def _rows(table: Array, ids: Array) -> Array:
    return table.at[ids].get(mode="fill", fill_value=0)


def _rows_by_bits(table: Array, ids: Array) -> Array:
    """XLA:CPU would first make a whole table of 16-bit floats float32. The barrier keeps it from copying the table's bits ahead
    of a loop in which the ids alone change (131 MB: 6 ms a token in calls of 8)."""
    if table.dtype.itemsize != 2:
        return _rows(table, ids)
    table, ids = jax.lax.optimization_barrier((table, ids))
    return jax.lax.bitcast_convert_type(_rows(jax.lax.bitcast_convert_type(table, jnp.uint16), ids), table.dtype)


def gather_table(table: Array | QArray, dtype: DTypeLike) -> Array:
    """An embedding or output table [V, D] in a dtype, whole over fsdp, each device keeping its part of the vocabulary."""
    if isinstance(table, QArray):
        return dequantize(table._replace(value=constrain(table.value, "vocab", "act_embed")), dtype)
    if table.dtype == dtype:
        return constrain(table, "vocab", "act_embed")
    # The barrier keeps the cast before the gather: XLA:TPU would gather float32 and cast after.
    return constrain(jax.lax.optimization_barrier(table.astype(dtype)), "vocab", "act_embed")


def _lookup_forward(table: Array, tokens: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table, tokens, dtype), (table, tokens)


def _lookup_backward(dtype: DTypeLike, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, tokens = saved
    rows = table.shape[0] // mesh_axis_size("tensor")

    def add_up(tokens: Array, cotangent: Array) -> Array:
        gradient = jnp.zeros((rows, table.shape[1]), jnp.float32)
        gradient = gradient.at[local_ids(tokens, rows)].add(cotangent.astype(jnp.float32), mode="drop")
        return sum_and_scatter(gradient, axis=1) if is_partitioned() else gradient

    run = per_device(add_up, (("batch", "length"), ("batch", "length", "act_embed")), ("vocab", "embed"))
    return run(tokens, cotangent).astype(table.dtype), None


def local_ids(tokens: Array, rows: int) -> Array:
    """Row numbers in this device's part of a table; those of other parts lie past its end."""
    if not is_partitioned():
        return tokens
    ids = tokens - jax.lax.axis_index(RULES["vocab"]) * rows
    return jnp.where(ids < 0, rows, ids)


lookup.defvjp(_lookup_forward, _lookup_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot(equation: str, a: Array, b: Array) -> Array:
    """A product of two activations, summed in float32: an einsum whose gradients, too, are products in the operands' dtype.

    Args:
        equation: every axis of an operand is in the other one or in the result.
        a, b: of one dtype.

    Returns:
        float32.
    """
    return _einsum(equation, a, b)


def _dot_forward(equation: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, a, b), (a, b)


def _dot_backward(equation: str, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    a, b = saved
    letters_a, letters_b, letters = _letters(equation)
    cotangent = cotangent.astype(a.dtype)
    return _product_as(letters_a, letters, cotangent, letters_b, b), _product_as(letters_b, letters, cotangent, letters_a, a)


def _product_as(result: str, letters_a: str, a: Array, letters_b: str, b: Array) -> Array:
    """The product in the operands' dtype, axes moved after the cast: XLA:CPU has no bfloat16 kernel for every order."""
    shared = [letter for letter in letters_a if letter in letters_b and letter in result]
    if result[len(shared)] in letters_b:  # then none has to be moved
        letters_a, a, letters_b, b = letters_b, b, letters_a, a
    free = [letter for letter in letters_a + letters_b if letter in result and letter not in shared]
    natural = "".join(shared + free)
    product = _einsum(f"{letters_a},{letters_b}->{natural}", a, b).astype(a.dtype)
    return jnp.transpose(product, [natural.index(letter) for letter in result])


dot.defvjp(_dot_forward, _dot_backward)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 means float32: by default TPUs multiply it in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, **_sums(a.dtype))


def _sums(dtype: DTypeLike) -> dict[str, Any]:
    """How products of this dtype are summed: in float32; in int32 of int8."""
    return {"precision": precision(dtype), "preferred_element_type": jnp.int32 if dtype == jnp.int8 else jnp.float32}


def _gathered(equation: str, weight: Array, dtype: DTypeLike) -> Array:
    """The weight in a dtype, whole over fsdp."""
    names = _axes(GATHERED_AXES, _letters(equation)[1])
    if weight.dtype.itemsize == 1:  # moved before it is cast
        return constrain(weight, *names).astype(dtype)
    return constrain(weight.astype(dtype), *names)


def _constrain_activation(x: Array, letters: str) -> Array:
    return constrain(x, *_axes(RESIDUAL_AXES if letters == "BTD" else ACTIVATION_AXES, letters))


def _axes(table: Mapping[str, str], letters: str) -> tuple[str, ...]:
    return tuple(table[letter] for letter in letters)


def _letters(equation: str) -> tuple[str, str, str]:
    operands, result = equation.split("->")
    x, weight = operands.split(",")
    return x, weight, result
