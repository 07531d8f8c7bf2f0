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
from llama_jax.model.lora import TARGETS, LayerAdapter, layer_seeds
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import tree_shardings
from tests.make_mesh import mesh_of, on, without_rematerialisation
from tests.model.make import params_of, tokens_of

B, T = 8, 14
CFG = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_heads=16, num_kv_heads=2, head_dim=6)
LORA = LoraConfig(rank=4, alpha=6.0)
DORA = LoraConfig(rank=4, alpha=6.0, dora=True, dropout=0.25, targets=("k_proj", "o_proj", "up_proj", "down_proj"))
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
    rng, layers = np.random.default_rng(2), {}
    for target, parts in adapter_shapes(CFG, lora, scan=True)["layers"].items():
        inputs = math.prod(parts["a"].shape[2:])
        made = {"a": rng.uniform(-1, 1, parts["a"].shape) * inputs**-0.5, "b": rng.normal(size=parts["b"].shape) / 8}
        if lora.dora:
            norms = np.linalg.norm(values(target, stacked()["layers"][target]), axis=-1)
            made["magnitude"] = norms.reshape(parts["magnitude"].shape) * rng.uniform(0.5, 1.5, parts["magnitude"].shape)
        layers[target] = {part: jnp.asarray(array, jnp.float32) for part, array in made.items()}
    return {"layers": layers}


def run(params, adapter, lora=LORA, key=None, dtype="float32") -> jax.Array:
    """[B, T, D]."""
    options = dict(dtype=jnp.dtype(dtype), remat="full", adapter=adapter, lora=lora, dropout_key=key)
    return train_states(CFG, params, tokens_of(CFG, B, T), POSITIONS, **options)


states = jax.jit(run, static_argnames=("lora", "dtype"))
merge = jax.jit(merge_adapter, static_argnums=(0, 3))
new_adapter = jax.jit(init_adapter, static_argnums=(0, 1), static_argnames="scan")


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


@functools.cache
def layer_of(preset: str) -> tuple[Params, Params]:
    """Shapes and axes of a layer's weights."""
    return param_shapes(PRESETS[preset])["layers"][0], param_axes(PRESETS[preset])["layers"][0]


@given(
    st.integers(1, 64), st.sets(st.sampled_from(TARGETS), min_size=1), st.booleans(), st.sampled_from(["tiny", "llama3_2_1b"])
)
def test_a_and_b_have_the_shapes_and_the_axes_of_their_weights(rank, targets, dora, preset):
    cfg, lora = PRESETS[preset], LoraConfig(rank=rank, targets=tuple(targets), dora=dora)
    weights, names = layer_of(preset)
    shapes, axes = adapter_shapes(cfg, lora, scan=True)["layers"], adapter_axes(cfg, lora, scan=True)["layers"]
    assert set(shapes) == set(axes) == targets
    for target in targets:
        whole = tuple(zip(weights[target].shape, names[target], strict=True))
        outputs, inputs = whole[: -NUM_INPUTS[target]], whole[-NUM_INPUTS[target] :]
        wanted = {"a": ((rank, "lora_rank"), *inputs), "b": (*outputs, (rank, "lora_rank"))}
        wanted |= {"magnitude": outputs} if dora else {}
        found = {part: tuple(zip(leaf.shape, axes[target][part], strict=True)) for part, leaf in shapes[target].items()}
        assert found == {part: ((cfg.num_layers, "layers"), *axes) for part, axes in wanted.items()}


def test_a_new_a_is_uniform_as_pefts_and_the_same_whatever_the_other_targets():
    """kaiming_uniform_(a=sqrt(5)): within 1 / sqrt(inputs), whose standard deviation is that / sqrt(3)."""
    whole = new_adapter(CFG, SOME, None, KEY, scan=True)["layers"]
    for parts in whole.values():
        a = np.asarray(parts["a"])
        bound = math.prod(a.shape[2:]) ** -0.5
        assert 0.9 * bound < np.abs(a).max() <= bound and abs(a.std() * math.sqrt(3) / bound - 1) < 0.1
        assert not np.any(parts["b"]) and np.any(a[0] != a[1])
    one = new_adapter(CFG, dataclasses.replace(SOME, targets=("o_proj",)), None, KEY, scan=False)
    for i, layer in enumerate(one["layers"]):
        np.testing.assert_array_equal(layer["o_proj"]["a"], whole["o_proj"]["a"][i])


# Merging


def values(name: str, weight: Any) -> np.ndarray:
    """[L, outputs, inputs] float64 of a stacked weight."""
    num_inputs = NUM_INPUTS[name]
    if isinstance(weight, QArray):
        scale = np.asarray(weight.scale, np.float64)
        weight = np.asarray(weight.value) * scale.reshape(*scale.shape[:-1], *[1] * num_inputs)
    return np.asarray(weight, np.float64).reshape(CFG.num_layers, -1, math.prod(weight.shape[weight.ndim - num_inputs :]))


@pytest.mark.parametrize("name, base", [("lora", "int8"), ("rslora, some targets", "float32"), ("dora", "int8")])
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


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_merged_weights_compute_what_the_adapter_does(name):
    lora = CONFIGS[name]
    merged = merge(CFG, stacked(), adapter_of(lora), lora)
    ours = states(stacked(), adapter_of(lora), lora)
    np.testing.assert_allclose(states(merged, None), ours, rtol=0, atol=1e-5)
    assert np.abs(ours - states(stacked(), None)).max() > 0.3


# What changes nothing


def test_a_new_adapter_changes_not_a_bit():
    plain = states(stacked("int8"), None, dtype="bfloat16")
    adapter = new_adapter(CFG, LORA, None, KEY, scan=True)
    np.testing.assert_array_equal(states(stacked("int8"), adapter, dtype="bfloat16"), plain)


def test_a_new_dora_adapter_divides_norms_by_themselves():
    """Which are summed otherwise."""
    adapter = new_adapter(CFG, DORA, stacked(), KEY, scan=True)
    np.testing.assert_allclose(states(stacked(), adapter, DORA), states(stacked(), None), rtol=0, atol=1e-5)
    of_int8 = new_adapter(CFG, DORA, stacked("int8"), KEY, scan=True)["layers"]
    for target, parts in of_int8.items():
        norms = np.linalg.norm(values(target, stacked("int8")["layers"][target]), axis=-1)
        np.testing.assert_allclose(parts["magnitude"].reshape(norms.shape), norms, rtol=1e-6)


@pytest.fixture(scope="module")
def alone() -> tuple[jax.Array, Params]:
    """Of stacked layers on one device, with an adapter that has everything."""
    return gradient(adapter_of(DORA), stacked(), DORA, KEY)


@pytest.mark.slow
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
    # Rounding alone is 0.6e-6 to 1.02e-6 of the largest, by mesh and by how the compiler emits code.
    assert_close(ours if scan else stack_layers(ours), wanted, atol=2e-6 * largest(wanted))
    assert min(largest(leaf) for leaf in jax.tree.leaves(wanted)) > 1e-3 * largest(wanted)


def test_dropout_follows_from_layer_and_projection_and_not_from_the_other_targets():
    seeds = layer_seeds(DORA, KEY, 3)
    assert np.unique(seeds).size == 6
    assert layer_seeds(LORA, KEY, 3) is None and layer_seeds(DORA, None, 3) is None
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.25)
    equations = {"k_proj": "BTD,KHD->BTKH", "v_proj": "BTD,KHD->BTKH"}
    x, weight = jnp.ones((1, 4, CFG.embed_dim)), stacked()["layers"]["v_proj"][0]
    same = {name: array[0] for name, array in adapter_of(LORA)["layers"]["v_proj"].items()}
    k, v = LayerAdapter(lora, {"k_proj": same, "v_proj": same}, seeds[0])(equations, x, [weight, weight])
    plain, only = LayerAdapter(lora, {"v_proj": same}, seeds[0])(equations, x, [weight, weight])
    np.testing.assert_array_equal(v, only)
    assert np.abs(k - v).max() > 0.1 and np.abs(plain - v).max() > 0.1
