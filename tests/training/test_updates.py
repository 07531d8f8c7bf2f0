"""What a step changes and what it leaves alone: frozen weights, averages, adapters, and all where numbers are not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import PRESETS
from llama_jax.data.batch import batch_shapes
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import LoraConfig, quantize_params
from llama_jax.ops import loss
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import NO_LORA, StateForm, TrainState, init_state, state_shapes, trained_axes
from llama_jax.training.step import StepConfig, make_eval_step, make_train_step
from llama_jax.training.weights import combine, without_frozen
from tests.training.make import CFG, OPTIMIZER, T, assert_trees_close, batch_of, params_on, training_mesh

pytestmark = pytest.mark.slow  # a minute on 2 cores, of which nearly all is compiling

FREEZE = ("embedding", "layers[.].*_norm", "layers.q_proj")
CONFIG = StepConfig(dtype="float32", freeze=FREEZE, ema_decay=0.75, z_loss=1e-3, nonfinite="skip")
LORA = LoraConfig(rank=4, dropout=0.25)
QLORA = dict(base_dtype="bfloat16", quantize="int8")


def host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_identical(ours: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, host(ours), host(wanted))
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)


def but_step(state: TrainState) -> tuple:
    return state.params, state.adapter, state.opt_state, state.ema


class Steps:
    """A compiled step, and the states (in NumPy) and metrics of every call, from a state that has seen nothing."""

    def __init__(self, config: StepConfig, batches: list, lora: LoraConfig = NO_LORA, **base: str):
        self.mesh, form = training_mesh(None), config.form(lora, **base)
        optimizer = make_optimizer(OPTIMIZER, trained_axes(CFG, form))
        params = params_on(CFG, self.mesh, scan=True)
        if base:
            params = quantize_params(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params))
        self.state = init_state(CFG, optimizer, jax.random.key(3), form, mesh=self.mesh, params=params)
        self.places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self.step = make_train_step(CFG, config, optimizer, self.mesh, lora=lora, **base)
        self.states, self.metrics = [host(self.state)], []
        for batch in batches:
            self(batch)

    def __call__(self, batch) -> None:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, batch)
        assert {(leaf.dtype, leaf.shape) for leaf in metrics.values()} == {(jnp.dtype("float32"), ())}
        self.states.append(host(self.state))
        self.metrics.append({name: float(value) for name, value in metrics.items()})


@pytest.fixture(scope="module")
def steps() -> Steps:
    """Three steps; in the second the weights of the batch are not finite."""
    bad = batch_of(seed=1)
    bad.weights[2, 3] = np.nan
    return Steps(CONFIG, [batch_of(), bad, batch_of(seed=2)])


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(steps):
    _, before, after, end = steps.states
    assert [numbers["finite"] for numbers in steps.metrics] == [1, 0, 1]
    assert np.isnan(steps.metrics[1]["loss"])
    assert_identical(but_step(after), but_step(before))
    assert [int(state.step) for state in (before, after, end)] == [1, 2, 3]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(end))


def test_frozen_weights_stay_to_the_byte_and_have_neither_moments_nor_average(steps):
    begin, *_, end = steps.states
    for (path, before), after in zip(jax.tree.leaves_with_path(begin.params), jax.tree.leaves(end.params), strict=True):
        frozen = path[-1].key in ("embedding", "attn_norm", "mlp_norm", "q_proj")
        assert np.array_equal(before, after) == frozen, path
    left = without_frozen(begin.params, FREEZE)
    moments = next(part for part in end.opt_state if hasattr(part, "mu"))
    assert jax.tree.structure(moments.mu) == jax.tree.structure(moments.nu) == jax.tree.structure(end.ema)
    assert jax.tree.structure(end.ema) == jax.tree.structure(left) and len(jax.tree.leaves(left)) == 8


def test_the_average_is_the_formula(steps):
    ema = without_frozen(steps.states[0].params, FREEZE)
    for state in (steps.states[1], steps.states[3]):
        ema = jax.tree.map(lambda mean, new: 0.75 * mean + 0.25 * new, ema, without_frozen(state.params, FREEZE))
    assert_trees_close(steps.states[-1].ema, ema, atol=1e-7)


def test_metrics_are_of_the_step_s_weights_and_rate(steps):
    first, _, last = steps.metrics
    assert first["targets"] == batch_of().weights.sum() and 0.02 < first["z_loss"] < 0.05  # 0.001 of about log(321)^2
    assert [numbers["learning_rate"] for numbers in steps.metrics] == pytest.approx([0, 0.01, 0.01])  # a skipped one counts not
    weights = jax.tree.leaves(without_frozen(steps.states[-1].params, FREEZE))
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in weights))
    np.testing.assert_allclose(last["param_norm"], norm, rtol=1e-6)


def test_sums_of_evaluation_are_of_the_average_without_z_loss_and_any_rows_may_count(steps):
    evaluate = make_eval_step(CFG, CONFIG, steps.mesh)
    begin, *_, end = (jax.device_put(state, steps.places) for state in steps.states)
    batch = batch_of()
    nothing = batch._replace(weights=np.zeros_like(batch.weights))
    others = combine(jax.tree.map(jnp.zeros_like, end.ema), end.params)  # what trains may be anything
    with jax.set_mesh(steps.mesh):
        (total, count), (late, _), empty = (evaluate(*args) for args in ((begin, batch), (end, batch), (end, nothing)))
        assert evaluate(dataclasses.replace(end, params=others), batch)[0] == late != total
    np.testing.assert_allclose(total / count, steps.metrics[0]["loss"], rtol=1e-6)
    assert [float(part) for part in empty] == [0, 0]


# Adapters


@pytest.fixture(scope="module")
def adapted() -> Steps:
    """Three steps (the first with a rate of 0) of an adapter beside weights in int8, then one that is not finite."""
    bad = batch_of()
    bad.weights[0, 0] = np.inf
    return Steps(StepConfig(seed=5, ema_decay=0.5), [batch_of(), batch_of(), batch_of(), bad], LORA, **QLORA)


def test_only_the_adapter_trains_and_has_a_state(adapted):
    begin, *_, before, end = adapted.states
    assert_identical(end.params, begin.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(end.params)} == {"bfloat16", "int8", "float32"}  # float32: scales
    changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(begin.adapter), jax.tree.leaves(end.adapter), strict=True)]
    assert len(changed) == 14 and all(changed)
    moments = next(part for part in end.opt_state if hasattr(part, "mu"))
    assert jax.tree.structure(moments.mu) == jax.tree.structure(end.adapter) == jax.tree.structure(end.ema)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((end.adapter, end.ema))} == {"float32"}
    assert adapted.metrics[2]["loss"] < adapted.metrics[0]["loss"] and adapted.metrics[3]["finite"] == 0
    assert_identical(but_step(end), but_step(before))


def test_dropout_is_drawn_by_seed_and_step_alone(adapted):
    """The same state, step and batch again are the same bits; at another step they are not."""
    again = Steps.__new__(Steps)
    again.__dict__.update(adapted.__dict__, states=[], metrics=[])
    for number in (2, 7):
        again.state = jax.device_put(dataclasses.replace(adapted.states[2], step=np.int32(number)), adapted.places)
        again(batch_of())
    assert_identical(again.states[0], adapted.states[3])
    assert again.metrics[0] == adapted.metrics[2]
    assert again.metrics[1]["loss"] != adapted.metrics[2]["loss"]
    assert adapted.step._cache_size() == 1


# Whole programs


def test_a_step_never_holds_the_logits_of_all_tokens():
    """32 x 1024 tokens of 32,000 logits are 3.9 GiB."""
    cfg = dataclasses.replace(CFG, vocab_size=32_000, num_layers=1, num_heads=2)
    config, mesh = StepConfig(z_loss=1e-4), training_mesh(None)
    optimizer = make_optimizer(OPTIMIZER, trained_axes(cfg, config.form()))
    shapes = state_shapes(cfg, optimizer, config.form(), tensor=1)
    with jax.set_mesh(mesh):
        compiled = make_train_step(cfg, config, optimizer, mesh).lower(shapes, batch_shapes(32, 1024)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 7 * loss.LOGITS_BYTES < 32 * 1024 * 32_000 * 4 / 2


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    config, mesh = StepConfig(accumulate=3), training_mesh(None)
    optimizer = make_optimizer(OPTIMIZER, trained_axes(CFG, config.form()))
    shapes = state_shapes(CFG, optimizer, config.form(), tensor=1)
    with pytest.raises(LlamaError, match="a batch of 8 is not divisible by accumulate=3") as caught, jax.set_mesh(mesh):
        jax.eval_shape(make_train_step(CFG, config, optimizer, mesh), shapes, batch_shapes(8, T))
    assert caught.value.code == ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(accumulate=0), "accumulate is 0, expected 1 or more"),
        (dict(z_loss=-1.0), "z_loss is -1.0, expected 0 or more"),
        (dict(ema_decay=1.0), "ema_decay is 1.0, expected 0 or more, below 1"),
        (dict(nonfinite="ignore"), "nonfinite is 'ignore', expected one of skip, stop"),
        (dict(freeze="embedding"), "freeze is 'embedding', expected a list of regular expressions"),
    ],
)
def test_a_step_s_setting_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(LlamaError, match=message):
        StepConfig(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(base_dtype="bfloat16"), "the base is bfloat16, and without LoRA parameters train in float32"),
        (dict(quantize="int8"), "the base is int8, and without LoRA"),
        (dict(lora=LORA, quantize="int4"), "lora.quantize is 'int4', expected one of '', 'int8'"),
        (dict(lora=LORA, freeze=("embedding",)), "with LoRA only the adapter trains: leave freeze empty"),
    ],
)
def test_a_form_of_state_that_means_nothing_is_refused(wrong, message):
    with pytest.raises(LlamaError, match=message):
        StateForm(True, **wrong)


def test_parameters_of_another_model_are_refused_to_start_from():
    mesh, other = training_mesh(None), dataclasses.replace(CFG, mlp_dim=PRESETS["tiny"].mlp_dim * 2)
    form = StateForm(True)
    optimizer = make_optimizer(OPTIMIZER, trained_axes(other, form))
    with pytest.raises(
        LlamaError, match=r"params\['layers'\]\['down_proj'\] is float32\[2, 48, 80\], expected float32\[2, 48, 160\]"
    ):
        init_state(other, optimizer, jax.random.key(0), form, mesh=mesh, params=params_on(CFG, mesh, scan=True))
