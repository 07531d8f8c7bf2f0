"""The optimizer: what decays, how the rate goes, what is clipped, what a moment is kept in."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import Params, param_axes, stack_layers, unstack_layers
from llama_jax.training.optimizer import OPTIMIZERS, OptimizerConfig, evaluation_weights, make_optimizer, make_schedule
from llama_jax.training.state import StateForm, state_shardings, trained, trained_axes
from llama_jax.training.weights import combine
from tests.make_mesh import without_rematerialisation
from tests.model.make import params_of
from tests.training.make import CFG, TIED, assert_trees_close, initial_params, on_host, params_on, training_mesh

PLAIN = OptimizerConfig("sgd", peak_lr=1.0, warmup_steps=0, total_steps=10**9, weight_decay=0.0, clip_norm=1e9)


def config_of(name: str, **more) -> OptimizerConfig:
    schedule = "constant" if name == "schedule_free" else "cosine"
    return OptimizerConfig(name, **dict(schedule=schedule, peak_lr=1e-2, warmup_steps=1, total_steps=10) | more)


def drawn(tree, seed: int = 0, scale: float = 1e-2):
    """Gradients for a tree."""
    leaves, form = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return form.unflatten([jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def updates_of(config: OptimizerConfig, params, gradients: list, *, scan: bool = False) -> list:
    """What is added to the parameters in each of so many steps; parameters stay as they are."""
    optimizer = make_optimizer(config, param_axes(CFG, scan=scan))
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found


def rates_of(config: OptimizerConfig, steps: list[int]) -> np.ndarray:
    return np.asarray(jax.vmap(make_schedule(config))(np.asarray(steps)))


def test_the_rate_rises_linearly_and_falls_along_a_cosine():
    config = OptimizerConfig(peak_lr=3e-4, warmup_steps=100, total_steps=1100, final_ratio=0.1)
    rates = rates_of(config, [0, 1, 50, 100, 350, 600, 1100, 5000])
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x)) for x in (0.25, 0.5)]
    np.testing.assert_allclose(rates, 3e-4 * np.array([0, 0.01, 0.5, 1, *cosine, 0.1, 0.1]), rtol=1e-5, atol=1e-10)


def test_the_rate_may_fall_linearly_or_stay():
    config = OptimizerConfig(peak_lr=1.0, schedule="linear", warmup_steps=10, total_steps=110, final_ratio=0.2)
    steps = [5, 10, 60, 110, 500]
    np.testing.assert_allclose(rates_of(config, steps), [0.5, 1, 0.6, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rates_of(dataclasses.replace(config, schedule="constant"), steps), [0.5, 1, 1, 1, 1], rtol=1e-6)


def test_without_warm_up_the_first_rate_is_the_peak():
    np.testing.assert_allclose(rates_of(OptimizerConfig(peak_lr=2e-3, warmup_steps=0, total_steps=50), [0]), 2e-3, rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_is_all_warm_up():
    rates = rates_of(OptimizerConfig(peak_lr=1.0, warmup_steps=2000, total_steps=10), [0, 10, 1000])
    np.testing.assert_allclose(rates, [0, 0.005, 0.5], rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_matrices_decay_and_norms_do_not(scan):
    """Times the rate; the same whether layers are stacked, where a norm has two axes, or not."""
    params = stack_layers(params_of(CFG)) if scan else params_of(CFG)
    nothing = jax.tree.map(jnp.zeros_like, params)
    (updates,) = updates_of(dataclasses.replace(PLAIN, weight_decay=0.1, peak_lr=0.5), params, [nothing], scan=scan)
    for (path, update), weight in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        decays = not path[-1].key.endswith("norm")
        np.testing.assert_allclose(update, -0.05 * weight if decays else 0 * weight, rtol=1e-6, atol=0, err_msg=str(path))


def trained_by(name: str, mesh: Mesh, *, scan: bool) -> Params:
    """Parameters after three steps along given gradients, clipped, on a mesh; in NumPy, layers stacked. Each kind of weight
    trains once, the rest is frozen."""
    form = StateForm(scan, freeze=("layers.([kv]|up|down)_proj", "layers.mlp_norm"))
    optimizer = make_optimizer(config_of(name, clip_norm=0.5), trained_axes(TIED, form))
    places = state_shardings(TIED, optimizer, form, mesh=mesh)

    @functools.partial(jax.jit, out_shardings=(trained(form, places.params, {}), places.opt_state))
    def step(weights, state, gradient):
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    params = params_on(TIED, mesh, scan=scan)
    weights = trained(form, params, {})
    state = jax.device_put(optimizer.init(weights), places.opt_state)
    for seed in range(3):
        gradient = drawn(initial_params(TIED), seed)
        gradient = jax.device_put(gradient if scan else unstack_layers(gradient), places.params)
        weights, state = step(weights, state, trained(form, gradient, {}))
    return on_host(TIED, combine(weights, params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_on_a_mesh_train_like_single_ones_on_one_device(name):
    with without_rematerialisation():
        alone, on_mesh = trained_by(name, training_mesh(None), scan=False), trained_by(name, training_mesh("2x2x2"), scan=True)
    assert_trees_close(on_mesh, alone, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone, initial_params(TIED))
    assert np.mean([change > (1e-4 if name != "sgd" else 1e-5) for change in jax.tree.leaves(moved)]) == 6 / 11


def weight_and_updates(name: str, names: tuple[str, ...], shape: tuple[int, ...], steps: int = 1, **more) -> tuple:
    """A weight, its gradients, and the updates of one rate without decay or clipping."""
    rng = np.random.default_rng(0)
    weight = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    gradients = [rng.normal(size=shape) for _ in range(steps)]
    settings = dict(peak_lr=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(OptimizerConfig(name, **settings | more), {"w": names})
    state, updates = optimizer.init(weight), []
    for gradient in gradients:
        update, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, weight)
        updates.append(np.asarray(update["w"], np.float64))
    return np.asarray(weight["w"], np.float64), gradients, updates, state


def test_muon_s_update_of_a_matrix_is_nearly_orthogonal_and_as_large_as_adamw_s():
    """[D, N, H] as D outputs of N H inputs; its root mean square is 0.2 (Liu et al. 2025, arXiv:2502.16982, section 2.2)."""
    *_, (update,), _ = weight_and_updates("muon", ("embed", "heads", "head_dim"), (24, 4, 16))
    values = np.linalg.svd(update.reshape(24, 64), compute_uv=False) / (0.2 * 64**0.5)
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("names, shape", [(("vocab", "embed"), (24, 16)), (("norm",), (16,))])
def test_muon_trains_tables_and_norms_by_adamw(names, shape):
    for ours, wanted in zip(*(weight_and_updates(name, names, shape, steps=2)[2] for name in ("muon", "adamw")), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_adafactor_is_the_formula_with_rows_of_outputs_and_columns_of_inputs():
    """Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4; a matrix [N, H, D] has N H rows."""
    weight, gradients, updates, state = weight_and_updates("adafactor", ("heads", "head_dim", "embed"), (4, 6, 10), steps=2)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes[-2:] == [10, 24]
    rows, columns, weight = np.zeros((24, 1)), np.zeros((1, 10)), weight.reshape(24, 10)
    for t, (gradient, update) in enumerate(zip(gradients, updates, strict=True), start=1):
        gradient, decay = gradient.reshape(24, 10), 1 - t**-0.8
        rows = decay * rows + (1 - decay) * np.mean(gradient**2, axis=1, keepdims=True)
        columns = decay * columns + (1 - decay) * np.mean(gradient**2, axis=0, keepdims=True)
        step = gradient / np.sqrt(rows * columns / rows.mean())
        step /= max(1, np.sqrt(np.mean(step**2)))
        np.testing.assert_allclose(update.reshape(24, 10), -np.sqrt(np.mean(weight**2)) * step, rtol=1e-4)


def test_schedule_free_is_evaluated_at_the_average_of_what_its_steps_reach():
    """Of constant rate: the mean of z (Defazio et al. 2024, arXiv:2405.15682, equations 3 to 5); y is in between."""
    config = config_of("schedule_free", peak_lr=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(config, {"w": ("mlp", "embed")})
    weights = {"w": jnp.asarray([[1.0, -2.0]])}
    state, reached = optimizer.init(weights), []
    for gradient in ([[1.0, 2.0]], [[-1.0, 3.0]], [[2.0, 2.0]]):
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, weights)
        weights = optax.apply_updates(weights, updates)
        reached.append(np.asarray(state[-1].z["w"]))
    average = np.mean(reached, axis=0)
    np.testing.assert_allclose(evaluation_weights(state, weights)["w"], average, rtol=1e-5)
    np.testing.assert_allclose(weights["w"], 0.1 * reached[-1] + 0.9 * average, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_is_told_of_the_next_update(name):
    config = config_of(name, warmup_steps=4)
    weights = {"w": jnp.ones((2, 3))}
    optimizer = make_optimizer(config, {"w": ("mlp", "embed")})
    state = optimizer.init(weights)
    for count in range(2):
        np.testing.assert_allclose(optimizer.rate(state), 1e-2 * count / 4, rtol=1e-6)
        _, state = optimizer.update(weights, state, weights)


def test_adamw_is_the_formula():
    """Bias-corrected moments, epsilon outside the root, decay beside them (Loshchilov and Hutter 2019, algorithm 2)."""
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=0, total_steps=10**9, clip_norm=1e9, b1=0.8, b2=0.9, eps=1e-3)
    params = {"w": jnp.asarray([[1.0, -2.0, 0.5]])}
    gradients = [np.array([[0.3, -0.1, 1e-4]]) * factor for factor in (1, -2, 0.5)]
    optimizer = make_optimizer(config, {"w": ("mlp", "embed")})
    state, m, v = optimizer.init(params), np.zeros((1, 3)), np.zeros((1, 3))
    for t, gradient in enumerate(gradients, start=1):
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.1 * np.asarray(params["w"], np.float64)
        np.testing.assert_allclose(updates["w"], -0.1 * step, rtol=1e-5)


def test_gradients_are_scaled_down_to_a_norm_and_never_up():
    params = params_of(CFG)
    gradient = drawn(params)
    norm = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(gradient)))
    assert norm > 1
    for clip, factor in ((0.25 * norm, 0.25), (4 * norm, 1.0)):
        (updates,) = updates_of(dataclasses.replace(PLAIN, clip_norm=float(clip)), params, [gradient])
        assert_trees_close(updates, jax.tree.map(lambda leaf, f=factor: -f * leaf, gradient), atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_is_kept_in_the_dtype_asked_for_and_updates_are_float32(name, dtype):
    params = params_of(CFG)
    optimizer = make_optimizer(OptimizerConfig(name, moment_dtype=dtype), param_axes(CFG))
    updates, state = jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    moments = {"mu": set(), "nu": set()}
    for path, leaf in jax.tree.leaves_with_path(state):
        for entry in path:
            moments.get(getattr(entry, "name", None), set()).add(leaf.dtype)
    assert moments["mu"] == {jnp.dtype(dtype)}
    assert moments["nu"] == ({jnp.dtype("float32")} if name != "lion" else set())


def test_an_infinite_norm_clips_nothing():
    params = params_of(CFG)
    gradient = drawn(params, scale=1e3)
    (updates,) = updates_of(dataclasses.replace(PLAIN, clip_norm=math.inf), params, [gradient])
    jax.tree.map(lambda update, g: np.testing.assert_array_equal(update, -g), updates, gradient)


def test_plain_descent_keeps_no_moments():
    state = jax.eval_shape(make_optimizer(PLAIN, param_axes(CFG)).init, params_of(CFG))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(name="adam"), "optimizer 'adam' is unknown; known: adamw, adafactor, lion, muon, schedule_free, sgd"),
        (dict(moment_dtype="float16"), "moment_dtype is 'float16', expected one of float32, bfloat16"),
        (dict(schedule="step"), "schedule is 'step', expected one of cosine, linear, constant"),
        (dict(name="adafactor", moment_dtype="bfloat16"), "and adafactor has no first moment: adamw, lion, muon do"),
        (dict(name="schedule_free"), "schedule is 'cosine', and schedule_free replaces .*: set schedule=constant"),
        (dict(name="schedule_free", schedule="constant", b1=0.0), "b1 is 0, and schedule_free interpolates by it"),
        (dict(peak_lr=0.0), "peak_lr is 0.0, expected a positive number"),
        (dict(clip_norm=float("nan")), "clip_norm is nan, expected a positive number"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1, expected 0 or more"),
        (dict(warmup_steps=-1), "warmup_steps is -1, expected 0 or more"),
        (dict(b2=1.0), "b2 is 1.0, expected 0 or more, below 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(LlamaError, match=message) as caught:
        OptimizerConfig(**wrong)
    assert caught.value.code == ExitCode.BAD_CONFIG
