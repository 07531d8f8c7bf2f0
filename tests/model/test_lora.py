"""Adapters in the model: settings, trees, merging, and what must change nothing: a new one, form of the layers, mesh."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import (
    LoraConfig,
    Params,
    adapter_axes,
    adapter_shapes,
    init_adapter,
    merge_adapter,
    param_axes,
    param_shapes,
    quantize_params,
    stack_layers,
    train_states,
    unstack_layers,
)
from llama_jax.model.lora import TARGETS, LayerAdapter, layer_keys
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.linear import QArray
from llama_jax.plan.hlo import instructions
from llama_jax.sharding import tree_shardings
from tests.make_mesh import mesh_of, on, without_rematerialisation
from tests.model.make import params_of, tokens_of

B, T = 8, 14
CFG = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_heads=16, num_kv_heads=2, head_dim=6)
LORA = LoraConfig(rank=4, alpha=6.0)
DORA = LoraConfig(rank=4, alpha=6.0, dora=True, dropout=0.25)
SOME = LoraConfig(rank=3, alpha=2.0, rslora=True, targets=("v_proj", "down_proj", "o_proj"))
CONFIGS = {"lora": LORA, "rslora, some targets": SOME, "dora": DORA}
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
KEY = jax.random.key(3)


@functools.cache
def stacked(kind: str = "float32") -> Params:
    """The base, layers stacked: float32, or in int8."""
    params = stack_layers(params_of(CFG))
    return jax.jit(quantize_params)(params) if kind == "int8" else params


@functools.cache
def adapter_of(lora: LoraConfig) -> Params:
    """Layers stacked; B is not zero, and magnitudes are not the weights'."""
    rng = np.random.default_rng(2)

    def moved(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "magnitude":
            return leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return leaf if path[-1].key == "a" else jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) / 8

    return jax.tree.map_with_path(moved, init_adapter(CFG, lora, stacked(), jax.random.key(1), scan=True))


def run(params, adapter, lora=LORA, key=None, dtype="float32") -> jax.Array:
    """[B, T, D]."""
    options = dict(dtype=jnp.dtype(dtype), remat="full", adapter=adapter, lora=lora, dropout_key=key)
    return train_states(CFG, params, tokens_of(CFG, B, T), POSITIONS, **options)


states = jax.jit(run, static_argnames=("lora", "dtype"))
merge = jax.jit(merge_adapter, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnames=("lora", "dtype"))
def gradient(adapter, params, lora, key=None, dtype="float32") -> tuple[jax.Array, Params]:
    """The mean square of the states, and the adapter's gradient of it."""
    return jax.value_and_grad(lambda adapter: jnp.mean(jnp.square(run(params, adapter, lora, key, dtype).astype(jnp.float32))))(
        adapter
    )


def assert_close(ours: Any, wanted: Any, atol: float) -> None:
    def check(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(check, ours, wanted)


def largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


# Settings and trees


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(targets=("q_proj", "lm_head")), "lora.targets has 'lm_head', expected names among q_proj, k_proj"),
        (dict(targets="q_proj"), "lora.targets has 'q_proj', expected"),
        (dict(rank=4, targets=()), "lora.targets is empty"),
        (dict(rank=-1), "lora.rank is -1, expected a whole number, or 0 for no adapter"),
        (dict(rank=4.0), "lora.rank is 4.0"),
        (dict(alpha=0), "lora.alpha is 0, expected a positive number"),
        (dict(alpha=math.nan), "lora.alpha is nan"),
        (dict(dropout=1.0), "lora.dropout is 1.0, expected 0 or more, below 1"),
        (dict(dropout=-0.1), "lora.dropout is -0.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(LlamaError, match=message) as refused:
        LoraConfig(**settings)
    assert refused.value.code == ExitCode.BAD_CONFIG


def test_targets_are_a_set():
    assert LoraConfig(targets=["v_proj", "q_proj", "v_proj"]) == LoraConfig(targets=("q_proj", "v_proj"))
    assert adapter_shapes(CFG, LoraConfig(), scan=True) == {"layers": {}}  # rank 0


@given(
    st.integers(1, 64), st.sets(st.sampled_from(TARGETS), min_size=1), st.booleans(), st.sampled_from(["tiny", "llama3_2_1b"])
)
def test_a_and_b_have_the_shapes_and_the_axes_of_their_weights(rank, targets, dora, preset):
    cfg, lora = PRESETS[preset], LoraConfig(rank=rank, targets=tuple(targets), dora=dora)
    weights, names = param_shapes(cfg, scan=True)["layers"], param_axes(cfg, scan=True)["layers"]
    shapes, axes = adapter_shapes(cfg, lora, scan=True)["layers"], adapter_axes(cfg, lora, scan=True)["layers"]
    assert set(shapes) == set(axes) == targets
    for target, parts in shapes.items():
        split = len(names[target]) - NUM_INPUTS[target]
        for table, get, layer, inner in (
            (weights, lambda leaf: leaf.shape, cfg.num_layers, rank),
            (names, tuple, "layers", "lora_rank"),
        ):
            whole = get(table[target])
            found = parts if table is weights else axes[target]
            assert get(found["a"]) == (layer, inner, *whole[split:])
            assert get(found["b"]) == (*whole[:split], inner)
            assert ("magnitude" in found) == dora and (not dora or get(found["magnitude"]) == whole[:split])


def test_a_new_a_is_uniform_as_pefts_and_the_same_whatever_the_other_targets():
    """kaiming_uniform_(a=sqrt(5)): within 1 / sqrt(inputs), whose standard deviation is that / sqrt(3)."""
    whole, some = (
        init_adapter(CFG, lora, None, KEY, scan=True)["layers"] for lora in (LORA, dataclasses.replace(SOME, rank=4))
    )
    for target, parts in whole.items():
        a = np.asarray(parts["a"])
        bound = math.prod(a.shape[2:]) ** -0.5
        assert 0.9 * bound < np.abs(a).max() <= bound and abs(a.std() * math.sqrt(3) / bound - 1) < 0.1
        assert not np.any(parts["b"]) and np.any(a[0] != a[1])
        if target in some:
            np.testing.assert_array_equal(some[target]["a"], a)
    unrolled = init_adapter(CFG, LORA, None, KEY, scan=False)
    assert_close(stack_layers(unrolled), {"layers": whole}, atol=0)


# Merging


def values(name: str, weight: Any) -> np.ndarray:
    """[L, outputs, inputs] float64 of a stacked weight."""
    num_inputs = NUM_INPUTS[name]
    if isinstance(weight, QArray):
        scale = np.asarray(weight.scale, np.float64)
        weight = np.asarray(weight.value) * scale.reshape(*scale.shape[:-1], *[1] * num_inputs)
    return np.asarray(weight, np.float64).reshape(CFG.num_layers, -1, math.prod(weight.shape[weight.ndim - num_inputs :]))


@pytest.mark.parametrize("base", ["float32", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_are_the_float64_formula(name, base):
    lora, params = CONFIGS[name], stacked(base)
    adapter = adapter_of(lora)["layers"]
    merged = merge(CFG, params, {"layers": adapter}, lora)
    for target in TARGETS:
        wanted = values(target, params["layers"][target])
        if target in adapter:
            a, b = (np.asarray(adapter[target][part], np.float64) for part in ("a", "b"))
            delta = b.reshape(CFG.num_layers, -1, lora.rank) @ a.reshape(CFG.num_layers, lora.rank, -1)
            wanted = wanted + lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank) * delta
            if lora.dora:
                sizes = np.asarray(adapter[target]["magnitude"]).reshape(CFG.num_layers, -1)
                wanted *= (sizes / np.linalg.norm(wanted, axis=-1))[..., None]
            assert merged["layers"][target].dtype == jnp.float32
        np.testing.assert_allclose(values(target, merged["layers"][target]), wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(merged["layers"]["attn_norm"], params["layers"]["attn_norm"])


def test_layers_in_a_list_merge_as_stacked_ones_do_and_bfloat16_is_rounded_once():
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stacked())
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    merged = stack_layers(merge(CFG, unstack_layers(narrow), unstack_layers(adapter_of(DORA)), DORA))
    exact = merge(CFG, wide, adapter_of(DORA), DORA)
    for ours, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_compute_what_the_adapter_does(name):
    lora = CONFIGS[name]
    merged = merge(CFG, stacked(), adapter_of(lora), lora)
    ours = states(stacked(), adapter_of(lora), lora)
    np.testing.assert_allclose(states(merged, None), ours, rtol=0, atol=1e-5)
    assert np.abs(ours - states(stacked(), None)).max() > 0.3


# What changes nothing


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_a_new_adapter_changes_nothing(base):
    """LoRA not a bit; with DoRA a row's norm is divided by itself, summed otherwise."""
    params = stacked(base)
    plain = states(params, None, dtype="bfloat16")
    adapter = init_adapter(CFG, LORA, None, KEY, scan=True)
    np.testing.assert_array_equal(states(params, adapter, dtype="bfloat16"), plain)
    adapter = init_adapter(CFG, DORA, params, KEY, scan=True)
    np.testing.assert_allclose(states(params, adapter, DORA), states(params, None), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone() -> tuple[jax.Array, Params]:
    """Of stacked layers on one device, with an adapter that has everything."""
    return gradient(adapter_of(DORA), stacked(), DORA, KEY)


@pytest.mark.parametrize("mesh_name", [None, "2x2x2"])
def test_layers_in_a_list_and_a_mesh_give_the_same_gradient_dropout_and_all(alone, mesh_name):
    mesh, scan = (None, False) if mesh_name is None else (mesh_of(mesh_name), True)
    params, adapter = (tree if scan else unstack_layers(tree) for tree in (stacked(), adapter_of(DORA)))
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(mesh, param_axes(CFG, scan=True), params))
        adapter = jax.device_put(adapter, tree_shardings(mesh, adapter_axes(CFG, DORA, scan=True), adapter))
    with on(mesh), without_rematerialisation():
        value, ours = gradient(adapter, params, DORA, KEY)
    wanted_value, wanted = alone
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    assert_close(ours if scan else stack_layers(ours), wanted, atol=1e-6 * largest(wanted))
    assert min(largest(leaf) for leaf in jax.tree.leaves(wanted)) > 1e-3 * largest(wanted)


def test_dropout_follows_from_layer_and_projection_and_not_from_the_other_targets():
    keys = layer_keys(DORA, KEY, 3)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in [KEY, *keys]}) == 4
    assert layer_keys(LORA, KEY, 3) is None and layer_keys(DORA, None, 3) is None
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.25)
    equations = {"k_proj": "BTD,KHD->BTKH", "v_proj": "BTD,KHD->BTKH"}
    x, weight = jnp.ones((1, 4, CFG.embed_dim)), stacked()["layers"]["v_proj"][0]
    same = {name: array[0] for name, array in adapter_of(LORA)["layers"]["v_proj"].items()}
    k, v = LayerAdapter(lora, {"k_proj": same, "v_proj": same}, keys[0])(equations, x, [weight, weight])
    plain, only = LayerAdapter(lora, {"v_proj": same}, keys[0])(equations, x, [weight, weight])
    np.testing.assert_array_equal(v, only)
    assert np.abs(k - v).max() > 0.1 and np.abs(plain - v).max() > 0.1


def test_the_frozen_base_gets_no_gradient():
    """Nothing in the compiled gradient, of an int8 base, is a product or a sum of a weight's size."""
    made = instructions(gradient.lower(adapter_of(LORA), stacked("int8"), LORA).compile().as_text())
    weights = {math.prod(stacked()["layers"][name].shape[1:]) for name in TARGETS}
    products = [math.prod(shape) for i in made if i.opcode == "dot" for _, shape in i.arrays]
    assert len(products) > 14 and not weights & set(products)
