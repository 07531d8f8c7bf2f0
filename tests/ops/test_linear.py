"""Products with weights: what they are summed in, and what they come out as; their gradients; int8; lookups."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops import linear
from llama_jax.ops.linear import lookup, project, project_each
from llama_jax.ops.qarray import QArray, quantize
from tests.make_mesh import MESHES, mesh_of, on, products, without_rematerialisation

EQUATIONS = {  # shapes of x and weight, [out..., in...]; B 2, T 3, D 48, N 6, H 10, K 2, F 80, V 32
    "BTD,NHD->BTNH": ((2, 3, 48), (6, 10, 48)),
    "BTD,KHD->BTKH": ((2, 3, 48), (2, 10, 48)),
    "BTNH,DNH->BTD": ((2, 3, 6, 10), (48, 6, 10)),
    "BTD,FD->BTF": ((2, 3, 48), (80, 48)),
    "BTF,DF->BTD": ((2, 3, 80), (48, 80)),
    "BTD,VD->BTV": ((2, 3, 48), (32, 48)),
}


def draw(seed: int, equation: str, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, weight = (rng.normal(size=shape) for shape in EQUATIONS[equation])
    return x.astype(dtype), (weight / 8).astype(dtype)


@given(st.integers(0, 2**32), st.sampled_from(list(EQUATIONS)))
def test_a_product_is_the_einsum_in_float64(seed, equation):
    x, weight = draw(seed, equation)
    expected = np.einsum(equation, x.astype(np.float64), weight.astype(np.float64))
    np.testing.assert_allclose(project(equation, jnp.asarray(x), jnp.asarray(weight)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "default"])  # the tests' own, and what users run
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_bfloat16_product_is_rounded_once(equation, jit, precision):
    x, weight = draw(1, equation, ml_dtypes.bfloat16)
    expected = np.einsum(equation, x.astype(np.float64), weight.astype(np.float64))
    compute = jax.jit(project, static_argnums=(0, 3)) if jit else project
    with jax.default_matmul_precision(precision):
        wide = compute(equation, jnp.asarray(x), jnp.asarray(weight), jnp.float32)
        narrow = compute(equation, jnp.asarray(x), jnp.asarray(weight))
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(narrow, np.asarray(wide).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("precision", ["highest", "default"])
@pytest.mark.parametrize("T", [1, 2])
def test_the_sum_of_a_bfloat16_product_is_float32(T, precision):
    x, weight = jnp.ones((1, T, 4097), jnp.bfloat16), jnp.ones((3, 4097), jnp.bfloat16)
    with jax.default_matmul_precision(precision):
        np.testing.assert_array_equal(project("BTD,FD->BTF", x, weight, jnp.float32), 4097)  # in bfloat16 it stops at 256
        np.testing.assert_array_equal(project("BTD,FD->BTF", x, weight), 4096)


def test_a_float32_weight_is_rounded_to_the_dtype_of_x():
    x, weight = draw(2, "BTD,FD->BTF")
    x, weight = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight)
    np.testing.assert_array_equal(project("BTD,FD->BTF", x, weight), project("BTD,FD->BTF", x, weight.astype(jnp.bfloat16)))


# Gradients


def gradients(equation: str, x, weight, dy) -> tuple[np.ndarray, np.ndarray]:
    """Of x and of the weight, where the product's gradient is dy."""
    return jax.jit(jax.grad(lambda x, w: jnp.sum(project(equation, x, w, jnp.float32) * dy), argnums=(0, 1)))(x, weight)


def float64_gradients(equation: str, x, weight, dy) -> tuple[np.ndarray, np.ndarray]:
    (letters_x, letters_w), letters_y = equation.split("->")[0].split(","), equation.split("->")[1]
    x, weight, dy = (np.asarray(a, np.float64) for a in (x, weight, dy))
    return (
        np.einsum(f"{letters_y},{letters_w}->{letters_x}", dy, weight),
        np.einsum(f"{letters_y},{letters_x}->{letters_w}", dy, x),
    )


def cotangent(equation: str, seed: int = 9, dtype=np.float32) -> np.ndarray:
    x, weight = draw(0, equation)
    return np.random.default_rng(seed).normal(size=np.einsum(equation, x, weight).shape).astype(dtype)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_are_those_of_the_einsum(equation):
    x, weight = draw(3, equation)
    dy = cotangent(equation)
    plain = jax.grad(lambda x, w: jnp.sum(jnp.einsum(equation, x, w) * dy), argnums=(0, 1))(x, weight)
    exact = float64_gradients(equation, x, weight, dy)
    for ours, autodiff, wanted in zip(gradients(equation, x, weight, dy), plain, exact, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, autodiff, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "default"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_of_bfloat16_are_float32_sums_of_rounded_operands(equation, precision):
    """The weight is the float32 master, and so is its gradient; that of x is rounded once."""
    x, weight = draw(4, equation)
    x, dy = x.astype(ml_dtypes.bfloat16), cotangent(equation)
    with jax.default_matmul_precision(precision):
        dx, dweight = gradients(equation, jnp.asarray(x), weight, dy)
    assert (dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = (x, weight.astype(ml_dtypes.bfloat16), dy.astype(ml_dtypes.bfloat16))
    exact_dx, exact_dweight = float64_gradients(equation, *rounded)
    np.testing.assert_allclose(dweight, exact_dweight, rtol=0, atol=1e-5)
    exact_dx = exact_dx.astype(np.float32)
    assert np.mean(dx != exact_dx.astype(ml_dtypes.bfloat16)) < 0.01  # a float32 sum may fall on the other side of a tie
    np.testing.assert_allclose(dx.astype(jnp.float32), exact_dx, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("result", [jnp.bfloat16, jnp.float32])
def test_every_product_of_bfloat16_activations_is_of_bfloat16_and_gives_float32(result):
    """Forward and backward, whatever the dtypes of weights and results: matrix units multiply float32 many times slower."""
    equation = "BTD,NHD->BTNH"
    x, weight = draw(5, equation)
    x = jnp.asarray(x, jnp.bfloat16)
    gradient = jax.grad(lambda x, w: jnp.sum(project(equation, x, w, result).astype(jnp.float32) ** 2), argnums=(0, 1))
    bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert products(gradient, x, weight) == [(bf16, bf16, f32)] * 6  # each as a CPU does it, and as others do


def lowered_results(f, platform: str, *shapes) -> list[str]:
    """Dtypes that products come out in, of bfloat16 arguments."""
    args = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"stablehlo\.dot_general.*-> tensor<[\dx]+x(\w+)>", text)


def forward(x, *weights):
    return project_each(("BTD,FD->BTF",) * len(weights), x, weights)


def backward(x, *weights):
    return jax.grad(lambda x, w: sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in forward(x, *w)), (0, 1))(x, weights)


X, WEIGHT = (2, 512, 4096), (4096, 4096)  # 2**22 results


@pytest.mark.parametrize(("platform", "result"), [("cuda", "bf16"), ("tpu", "f32"), ("cpu", "f32")])
def test_many_results_come_out_rounded_on_a_gpu(platform, result):
    """Of one weight; a gradient that is a sum of products, or a weight's own, is summed in float32, and so are few results."""
    wide = functools.partial(project, "BTD,FD->BTF", dtype=jnp.float32)
    assert lowered_results(forward, platform, X, WEIGHT) == [result]
    assert lowered_results(lambda x, w: wide(x, w), platform, X, WEIGHT) == ["f32"]
    assert lowered_results(backward, platform, X, WEIGHT) == [result, result, "f32"]
    assert lowered_results(backward, platform, X, WEIGHT, WEIGHT) == [result] * 2 + ["f32"] * 4
    assert lowered_results(forward, platform, (2, 511, 4096), WEIGHT) == ["f32"]
    assert lowered_results(forward, platform, X, (4095, 4096)) == ["f32"]


@pytest.mark.parametrize(
    ("name", "equation", "x", "weight", "result"),
    [
        ("1x1x8", "BTD,FD->BTF", (8, 512, 64), (8192, 64), "bf16"),
        ("1x1x8", "BTF,DF->BTD", (8, 512, 64), (8192, 64), "f32"),  # devices add what each has summed
        ("8x1x1", "BTF,DF->BTD", (64, 512, 64), (1024, 64), "bf16"),
        ("8x1x1", "BTD,FD->BTF", (8, 64, 64), (8192, 64), "f32"),  # 2**22 results, an eighth on each device
        ("2x2x2", "BTD,FD->BTF", (8, 512, 64), (8192, 64), "bf16"),
    ],
)
def test_what_a_device_has_decides(name, equation, x, weight, result):
    with on(mesh_of(name)):
        assert lowered_results(lambda x, w: project(equation, x, w), "cuda", x, weight) == [result]


def test_a_gpu_s_rounded_products_are_the_same_numbers(monkeypatch):
    """Rounded once, forward and backward; the branch that is compiled for GPUs, run on a CPU."""
    choose, taken = jax.lax.platform_dependent, []

    def on_a_gpu(*args, **branches):
        taken.append("cuda" in branches)
        return branches["cuda"](*args) if "cuda" in branches else choose(*args, **branches)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_gpu)
    monkeypatch.setattr(linear, "MANY_RESULTS", 1)
    rng = np.random.default_rng(8)
    x, w, dy = (rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in ((1, 64, 48), (80, 48), (1, 64, 80)))

    def total(x, w):
        return jnp.sum(project("BTD,FD->BTF", x, w).astype(jnp.float32) * dy)

    ours = jax.jit(project, static_argnums=0)("BTD,FD->BTF", x, w)
    wanted = np.einsum("BTD,FD->BTF", *(a.astype(np.float64) for a in (x, w)))
    assert sum(taken) == 1
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted, rtol=1.001 * 2**-8, atol=1e-6)
    for ours, wanted in zip(jax.jit(jax.grad(total, (0, 1)))(x, w), float64_gradients("BTD,FD->BTF", x, w, dy), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), wanted, rtol=1.001 * 2**-8, atol=1e-5)
    assert sum(taken) == 3  # and one of the gradients


def test_products_of_one_x_are_those_of_each():
    equations = ("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,FD->BTF")
    x, weights = draw(6, equations[0])[0], tuple(draw(6, equation)[1] for equation in equations)
    weights = (*weights[:2], quantize(jnp.asarray(weights[2]), 1))
    together = jax.jit(project_each, static_argnums=0)(equations, x, weights)
    for equation, weight, ours in zip(equations, weights, together, strict=True):
        np.testing.assert_allclose(ours, project(equation, jnp.asarray(x), weight), rtol=0, atol=1e-6)


def test_the_gradient_of_an_x_of_several_products_is_rounded_once():
    """Of 288 sums of three; were each part rounded first, most would come out otherwise."""
    equations = ("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,FD->BTF")
    x = draw(7, equations[0])[0].astype(ml_dtypes.bfloat16)
    weights = tuple(draw(7, equation)[1].astype(ml_dtypes.bfloat16) for equation in equations)
    dys = tuple(cotangent(equation, 7, ml_dtypes.bfloat16) for equation in equations)

    def total(x, weights):
        results = project_each(equations, x, weights, jnp.float32)
        return sum(jnp.sum(y * dy.astype(jnp.float32)) for y, dy in zip(results, dys, strict=True))

    dx, dweights = jax.jit(jax.grad(total, argnums=(0, 1)))(x, weights)
    exact = [float64_gradients(*each) for each in zip(equations, [x] * 3, weights, dys, strict=True)]
    once = sum(part for part, _ in exact).astype(ml_dtypes.bfloat16)
    each = sum(part.astype(ml_dtypes.bfloat16).astype(np.float64) for part, _ in exact).astype(ml_dtypes.bfloat16)
    assert np.count_nonzero(np.asarray(dx) != once) <= 3
    assert np.count_nonzero(each != once) > 50
    for ours, (_, wanted) in zip(dweights, exact, strict=True):
        assert ours.dtype == jnp.bfloat16  # the weight's
        np.testing.assert_allclose(ours.astype(np.float32), wanted, rtol=2**-8, atol=1e-5)


# int8


@given(
    st.integers(0, 2**32),
    st.sampled_from([((6, 10, 48), 1), ((48, 6, 10), 2), ((80, 48), 1), ((1, 1), 1)]),
    st.floats(-30, 30),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_a_rounded_weight_is_within_half_a_step_of_its_channel(seed, shape_and_inputs, exponent, dtype):
    shape, num_inputs = shape_and_inputs
    outputs = shape[:-num_inputs]
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** (exponent + rng.uniform(-3, 3, size=(*outputs, *[1] * num_inputs)))
    weight = (sizes * rng.normal(size=shape)).astype(dtype)
    q = quantize(jnp.asarray(weight), num_inputs)
    assert (q.value.shape, q.value.dtype) == (shape, jnp.int8)
    assert (q.scale.shape, q.scale.dtype) == ((*outputs, 1), jnp.float32)
    scale = np.asarray(q.scale, np.float64).reshape(sizes.shape)
    wide = weight.astype(np.float64)
    error = np.abs(np.asarray(q.value, np.float64) * scale - wide)
    assert np.all(error <= 0.5 * scale * (1 + 1e-5))
    largest = np.abs(wide).max(axis=tuple(range(len(outputs), len(shape))))
    np.testing.assert_allclose(q.scale[..., 0], largest / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(q.value).reshape(*outputs, -1).max(axis=-1), 127)


def test_rounding_is_symmetric():
    weight = draw(8, "BTD,FD->BTF")[1]
    up, down = quantize(jnp.asarray(weight), 1), quantize(jnp.asarray(-weight), 1)
    np.testing.assert_array_equal(up.value, -np.asarray(down.value))
    np.testing.assert_array_equal(up.scale, down.scale)


def test_a_channel_of_zeros_stays_zero_and_finite():
    weight = draw(8, "BTD,FD->BTF")[1]
    weight[3] = 0
    q = quantize(jnp.asarray(weight), 1)
    assert q.scale[3] == 0 and not np.any(q.value[3]) and np.all(np.isfinite(q.scale))
    product = project("BTD,FD->BTF", jnp.ones((1, 2, 48)), q)
    np.testing.assert_array_equal(product[..., 3], 0)
    assert np.all(np.isfinite(product))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_with_a_rounded_weight_is_that_with_its_value(equation):
    x, weight = draw(9, equation)
    num_inputs = 2 if equation == "BTNH,DNH->BTD" else 1
    q = quantize(jnp.asarray(weight), num_inputs)
    whole = np.asarray(q.value, np.float64) * np.asarray(q.scale, np.float64).reshape(*q.scale.shape, *[1] * (num_inputs - 1))
    assert np.abs(whole - weight).max() > 1e-4
    for ours in (project(equation, jnp.asarray(x), q), jax.jit(project, static_argnums=0)(equation, x, q)):
        np.testing.assert_allclose(ours, np.einsum(equation, x.astype(np.float64), whole), rtol=0, atol=1e-5)


def test_the_scales_multiply_the_float32_sum_and_the_product_is_rounded_once():
    x, weight = draw(10, "BTD,FD->BTF", ml_dtypes.bfloat16)
    q = quantize(jnp.asarray(weight), 1)
    exact = np.einsum("BTD,FD->BTF", x.astype(np.float64), np.asarray(q.value, np.float64)) * np.asarray(q.scale)[:, 0]
    ours = project("BTD,FD->BTF", jnp.asarray(x), q)
    assert np.count_nonzero(np.asarray(ours) != exact.astype(ml_dtypes.bfloat16)) <= 2
    f32, bf16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    found = products(lambda x, q: project("BTD,FD->BTF", x, q), jnp.asarray(x), q)  # one for each platform's form
    assert set(found) == {(bf16, bf16, f32)}  # int8 fits bfloat16


def test_the_gradient_of_x_passes_through_a_rounded_weight():
    """Weights in int8 are not trained; adapters beside them are."""
    equation = "BTD,NHD->BTNH"
    x, weight = draw(11, equation)
    dy, q = cotangent(equation), quantize(jnp.asarray(weight), 1)
    dx = jax.grad(lambda x: jnp.sum(project(equation, x, q) * dy))(jnp.asarray(x))
    whole = np.asarray(q.value, np.float64) * np.asarray(q.scale, np.float64)
    np.testing.assert_allclose(dx, float64_gradients(equation, x, whole, dy)[0], rtol=0, atol=1e-5)


# Meshes

MESH_SHAPES = {  # B 8, T 16, D 48, N 16, H 6, K 2, F 80, V 32
    "BTD,NHD->BTNH": ((8, 16, 48), (16, 6, 48)),
    "BTD,KHD->BTKH": ((8, 16, 48), (2, 6, 48)),  # fewer heads than devices
    "BTNH,DNH->BTD": ((8, 16, 16, 6), (48, 16, 6)),
    "BTF,DF->BTD": ((8, 16, 80), (48, 80)),
    "BTD,VD->BTV": ((8, 16, 48), (32, 48)),
}


@pytest.mark.parametrize("name", MESHES)
def test_products_and_gradients_are_the_same_on_every_mesh(name):
    rng = np.random.default_rng(12)
    arrays = {e: [rng.normal(size=shape).astype(np.float32) for shape in shapes] for e, shapes in MESH_SHAPES.items()}
    for pair in arrays.values():
        pair[1] /= 8
    dys = {e: (rng.normal(size=np.einsum(e, *pair).shape) / 8).astype(np.float32) for e, pair in arrays.items()}

    def all_of_them(arrays):
        results = {}
        for equation, (x, weight) in arrays.items():
            y, pull = jax.vjp(lambda x, w, e=equation: project(e, x, w), x, weight)
            results[equation] = (y, *pull(dys[equation]))
        return results

    with jax.set_mesh(mesh_of(name)), without_rematerialisation():
        results = jax.jit(all_of_them)(arrays)
    for equation, (y, dx, dweight) in results.items():
        x, weight = arrays[equation]
        wanted = (np.einsum(equation, x.astype(np.float64), weight), *float64_gradients(equation, x, weight, dys[equation]))
        for ours, exact in zip((y, dx, dweight), wanted, strict=True):
            np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


# lookup

TABLE_ROWS, WIDTH = 40, 48


def test_a_lookup_is_the_rows_in_the_dtype_asked_for():
    rng = np.random.default_rng(13)
    table = rng.normal(size=(TABLE_ROWS, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, TABLE_ROWS, (2, 5)).astype(np.int32)
    np.testing.assert_array_equal(lookup(jnp.asarray(table), tokens, jnp.float32), table[tokens])
    narrow = lookup(jnp.asarray(table), tokens, jnp.bfloat16)
    np.testing.assert_array_equal(narrow, table.astype(ml_dtypes.bfloat16)[tokens])


@pytest.mark.parametrize("name", [None, *MESHES])
def test_a_token_that_repeats_adds_up_its_gradients_in_float32(name):
    """4,096 gradients of one: a bfloat16 sum stops at 256. Rows that no token names get none."""
    mesh = None if name is None else mesh_of(name)
    tokens = np.full((8, 512), 7, np.int32)
    tokens[:, 0] = TABLE_ROWS - 1

    def total(table):
        return jnp.sum(lookup(table, tokens, jnp.bfloat16).astype(jnp.float32))

    with on(mesh):
        gradient = jax.jit(jax.grad(total))(jnp.zeros((TABLE_ROWS, WIDTH)))
    wanted = np.zeros((TABLE_ROWS, WIDTH))
    wanted[7], wanted[-1] = 8 * 511, 8
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, wanted)


@pytest.mark.parametrize("name", MESHES)
def test_a_lookup_and_its_gradient_are_the_same_on_every_mesh(name):
    rng = np.random.default_rng(14)
    table = rng.normal(size=(TABLE_ROWS, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, TABLE_ROWS, (8, 16)).astype(np.int32)
    dy = rng.normal(size=(8, 16, WIDTH)).astype(np.float32)

    def both(table):
        rows, pull = jax.vjp(lambda table: lookup(table, tokens, jnp.float32), table)
        return rows, pull(dy)[0]

    with jax.set_mesh(mesh_of(name)), without_rematerialisation():
        rows, gradient = jax.jit(both)(table)
    np.testing.assert_array_equal(rows, table[tokens])  # not one bit lost
    wanted = np.zeros(table.shape)
    np.add.at(wanted, tokens, dy.astype(np.float64))
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5)


def test_an_int8_pair_is_a_tree_of_two_arrays():
    q = quantize(jnp.ones((3, 4)), 1)
    assert isinstance(jax.tree.map(lambda a: a, q), QArray)
    assert [leaf.dtype for leaf in jax.tree.leaves(q)] == [jnp.int8, jnp.float32]
