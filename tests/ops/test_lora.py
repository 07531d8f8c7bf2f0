"""Products with adapters, against the papers' formulas in float64: values, gradients, int8, dropout, meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.ops.lora import project_adapted
from llama_jax.ops.qarray import QArray, quantize
from llama_jax.plan.hlo import instructions
from tests.make_mesh import mesh_of, products

EQUATIONS = {  # shapes of x and weight, and inputs of the weight; B 8, T 3, D 48, N 8, H 10, K 2, F 80
    "BTD,NHD->BTNH": ((8, 3, 48), (8, 10, 48), 1),
    "BTD,KHD->BTKH": ((8, 3, 48), (2, 10, 48), 1),
    "BTNH,DNH->BTD": ((8, 3, 8, 10), (48, 8, 10), 2),
    "BTD,FD->BTF": ((8, 3, 48), (80, 48), 1),
    "BTF,DF->BTD": ((8, 3, 80), (48, 80), 1),
}
RANK, SCALE = 4, 1.5


def draw(equation: str, dora: bool) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape_x, shape, num_inputs = EQUATIONS[equation]
    outputs, inputs = shape[:-num_inputs], shape[-num_inputs:]
    adapter = {"a": rng.normal(size=(RANK, *inputs)) / 4, "b": rng.normal(size=(*outputs, RANK)) / 8}
    if dora:
        adapter["magnitude"] = rng.uniform(0.5, 1.5, outputs)
    x, weight = rng.normal(size=shape_x), rng.normal(size=shape) / 8
    return jax.tree.map(np.float32, (x, weight, adapter))


def exact(x, weight, adapter, num_inputs: int) -> np.ndarray:
    """[rows, outputs] float64 of matrices [out, in]: (W + s B A) x, rows of the sum brought to the magnitude's length."""
    inputs = math.prod(weight.shape[-num_inputs:])
    x, w, a = (np.asarray(array, np.float64).reshape(-1, inputs) for array in (x, weight, adapter["a"]))
    total = w + SCALE * np.asarray(adapter["b"], np.float64).reshape(-1, RANK) @ a
    if "magnitude" in adapter:
        total *= (adapter["magnitude"].reshape(-1) / np.linalg.norm(total, axis=1))[:, None]
    return x @ total.T


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dropout", "dtype"))
def adapted(equation, x, weight, adapter, seed=None, dropout=0.0, dtype="float32"):
    seeds = None if seed is None else [seed]
    return project_adapted((equation,), x.astype(dtype), (weight,), (adapter,), SCALE, dropout, seeds)[0]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_is_the_formula_in_float64_also_with_an_int8_weight(equation, dora):
    x, weight, adapter = draw(equation, dora)
    num_inputs = EQUATIONS[equation][2]
    ours = adapted(equation, x, weight, adapter)
    np.testing.assert_allclose(ours.reshape(24, -1), exact(x, weight, adapter, num_inputs), rtol=0, atol=1e-5)
    rounded = quantize(jnp.asarray(weight), num_inputs)
    ours = adapted(equation, x, rounded, adapter)
    np.testing.assert_allclose(ours.reshape(24, -1), exact(x, values(rounded, num_inputs), adapter, num_inputs), atol=1e-5)


def values(weight: QArray, num_inputs: int) -> np.ndarray:
    scale = np.asarray(weight.scale, np.float64)
    return np.asarray(weight.value) * scale.reshape(*scale.shape[:-1], *[1] * num_inputs)


@functools.partial(jax.jit, static_argnums=0)
def gradients(equation, x, weight, adapter):
    """Of x and the adapter, where the product's gradient is 1, 2, 3, ... hundredths."""
    return jax.grad(lambda x, adapter: weighted(adapted(equation, x, weight, adapter)), argnums=(0, 1))(x, adapter)


def weighted(y):
    return jnp.sum(y.reshape(-1) * jnp.arange(1, y.size + 1)) / 100


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("equation", ["BTD,NHD->BTNH", "BTNH,DNH->BTD"])
def test_gradients_are_those_of_numeric_differences_in_float64(equation, dora):
    """Along a random direction of each array; DoRA's norm stays where it was, as the paper's section 4.3 has it. An int8 weight
    passes x's gradient on and gives the adapter the same one as its values do."""
    x, weight, adapter = draw(equation, dora)
    num_inputs = EQUATIONS[equation][2]
    rng = np.random.default_rng(1)
    dy = np.arange(1, exact(x, weight, adapter, num_inputs).size + 1) / 100
    norms = np.linalg.norm(np.float64(weight.reshape(-1, math.prod(weight.shape[-num_inputs:]))) + product(adapter), axis=1)

    def value(x, adapter):
        plain = {name: adapter[name] for name in ("a", "b")}
        y = exact(x, weight, plain, num_inputs)
        return np.sum((y * (adapter["magnitude"].reshape(-1) / norms) if dora else y).reshape(-1) * dy)

    dx, dadapter = gradients(equation, x, weight, adapter)
    for name, ours in {"x": dx, **dadapter}.items():
        direction = rng.normal(size=ours.shape)
        slopes = []
        for step in (1e-4, -1e-4):
            moved = adapter | ({name: adapter[name] + step * direction} if name != "x" else {})
            slopes.append(value(x + (step * direction if name == "x" else 0), moved))
        wanted = (slopes[0] - slopes[1]) / 2e-4
        np.testing.assert_allclose(np.sum(np.asarray(ours, np.float64) * direction), wanted, rtol=1e-5, err_msg=name)
    rounded = quantize(jnp.asarray(weight), num_inputs)
    whole = gradients(equation, x, np.float32(values(rounded, num_inputs)), adapter)
    for ours, wanted in zip(jax.tree.leaves(gradients(equation, x, rounded, adapter)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def product(adapter) -> np.ndarray:
    return SCALE * np.float64(adapter["b"].reshape(-1, RANK)) @ np.float64(adapter["a"].reshape(RANK, -1))


def test_products_with_and_without_an_adapter_share_one_x():
    names = ("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,FD->BTF")
    x = draw(names[0], False)[0]
    weights = [draw(name, False)[1] for name in names]
    adapters = [draw(names[0], False)[2], None, draw(names[2], True)[2]]
    run = jax.jit(project_adapted, static_argnums=(0, 4, 5))
    together = run(names, x, weights, adapters, SCALE, 0.0, None)
    for weight, adapter, ours in zip(weights, adapters, together, strict=True):
        wanted = exact(x, weight, adapter or {"a": np.zeros((RANK, 48)), "b": np.zeros((weight.size // 48, RANK))}, 1)
        np.testing.assert_allclose(ours.reshape(24, -1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bfloat16_activations_meet_bfloat16_matrices_and_gradients_are_float32(dora):
    x, weight, adapter = draw("BTD,FD->BTF", dora)
    x, weight = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)

    def total(adapter):
        return jnp.sum(jnp.square(project_adapted(("BTD,FD->BTF",), x, (weight,), (adapter,), SCALE, 0.0, None)[0]))

    large = [pair for pair in products(jax.grad(total), adapter) if pair[0] != jnp.float32]
    assert {pair[:2] for pair in large} == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))}
    in_float32 = len(products(jax.grad(total), adapter)) - len(large)
    assert in_float32 == dora  # [F, R] x [R, R], of the norm
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(total), adapter))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_frozen_weight_gets_no_gradient(dora):
    """In a loop over layers, as training has it: the compiled gradient holds no product of the weight's size."""
    x, weight, adapter = draw("BTD,FD->BTF", dora)
    layers = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), (quantize(jnp.asarray(weight), 1), adapter))

    def total(adapters, x, weights):
        def layer(x, inputs):
            return x + adapted("BTD,FD->BTF", x, *inputs)[..., :48], None

        return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, (weights, adapters))[0]))

    text = jax.jit(jax.grad(total)).lower(layers[1], x, layers[0]).compile().as_text()
    sizes = [math.prod(shape) for i in instructions(text) if i.opcode == "dot" for _, shape in i.arrays]
    assert len(sizes) >= 8 and weight.size not in sizes


# Dropout


def test_dropout_zeroes_inputs_of_a_and_keeps_their_mean():
    """Through A and B of one, and no weight: what comes out is what was dropped."""
    equation, rate, width = "BTD,FD->BTF", 0.2, 48
    weight, x = np.zeros((width, width), np.float32), np.ones((64, 64, width), np.float32)
    adapter = {"a": np.eye(width, dtype=np.float32), "b": np.eye(width, dtype=np.float32) / SCALE}
    once, again, second, third = (
        np.asarray(adapted(equation, x, weight, adapter, np.uint32(seed), dropout=rate))
        for seed in ([7, 0], [7, 0], [7, 1], [8, 0])
    )
    np.testing.assert_array_equal(once, again)
    assert set(np.unique(once)) == {np.float32(0), np.float32(1 / np.float32(0.8))}
    assert abs(np.mean(once) - 1) < 4 * math.sqrt(0.25 / once.size)
    neighbours = [np.roll(once, 1, axis) for axis in range(3)]
    for other in (second, third, *neighbours):  # as often equal as independent draws
        assert abs(np.mean(once != other) - 2 * rate * (1 - rate)) < 4 * math.sqrt(0.32 * 0.68 / once.size)
    np.testing.assert_array_equal(adapted(equation, x, weight, adapter, None, dropout=rate), x)  # evaluation


def test_dropout_leaves_the_weights_inputs_alone():
    x, weight, adapter = draw("BTD,FD->BTF", False)
    without = adapter | {"b": np.zeros_like(adapter["b"])}
    dropped = adapted("BTD,FD->BTF", x, weight, without, np.uint32([1, 2]), dropout=0.5)
    np.testing.assert_allclose(dropped.reshape(24, -1), x.reshape(24, -1) @ weight.T, rtol=0, atol=1e-5)


# Meshes


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide fsdp"])
def test_gradients_are_the_same_on_a_mesh_of_fsdp(monkeypatch, wide):
    """Also where it is so wide that gradients along embed are scattered by hand: A or B of a weight has no such axis."""
    monkeypatch.setattr(sharding, "WIDE_FSDP", 4 if wide else 32)
    for equation in ("BTD,NHD->BTNH", "BTNH,DNH->BTD"):
        arrays = draw(equation, True)
        wanted = gradients(equation, *arrays)
        with jax.set_mesh(mesh_of("1x8x1")):
            ours = jax.jit(gradients.__wrapped__, static_argnums=0)(equation, *arrays)
        for leaf, exact_leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(leaf, exact_leaf, rtol=0, atol=2e-6 * np.abs(exact_leaf).max())
