"""One update of the weights: loss, gradients, optimizer, in one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.data.batch import BATCH_AXES, Batch
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import REMAT_POLICIES, LoraConfig, Params, head, train_states
from llama_jax.ops.linear import gather_table
from llama_jax.ops.loss import cross_entropy
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import constrain
from llama_jax.training.optimizer import Optimizer
from llama_jax.training.state import (
    NO_LORA,
    StateForm,
    TrainState,
    check_mesh,
    evaluated,
    state_shardings,
    trained,
    with_trained,
)

COMPUTE_DTYPES = ("bfloat16", "float32")
NONFINITE = ("skip", "stop")
# XLA:TPU would cast all layers' weights at once, before the loop that casts each (its pass that narrows float32 arrays whose
# readers cast them), and keep both: 1.7 GiB of 20.6 for 70B on v5p-128 (libtpu 0.0.42).
TPU_OPTIONS = {"xla_jf_bf16_propagation": False}
# XLA:CPU would copy Adam's moments before it replaces them: without this it does not look at when they are read last.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes.

    Attributes:
        dtype: of activations and of the products: bfloat16 | float32. Parameters, their gradients and the optimizer are
            float32 whatever it is.
        remat: what the forward pass keeps for the backward: none (everything) | full (the layers' inputs) | projections
            (inputs, and the results of the projections and of attention) | offload (the latter in the host's memory: TPU, GPU).
        scan_layers: one compiled layer in a loop over [L, ...] weights (TPU), or L of them one after the other (GPU).
        kernels: whether attention may use the platform's kernel: llama_jax.ops.kernels.probe.choose_attention says.
        accumulate: parts that the rows of a batch are computed in, one after the other, for the memory of one.
        z_loss: weight of log(Z)^2.
        freeze: regular expressions of the names of parameters that do not train.
        ema_decay: of the float32 average of what trains, ema = decay * ema + (1 - decay) * weights; 0 for none.
        nonfinite: what a loss or gradient that is not finite does: skip the update, or stop the run (whoever calls the step
            does, by metrics["finite"]). The step leaves everything but its number as it was for both.
        seed: of dropout, together with the step's number.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    scan_layers: bool = True
    kernels: bool = True
    accumulate: int = 1
    z_loss: float = 0.0
    freeze: tuple[str, ...] = ()
    ema_decay: float = 0.0
    nonfinite: str = "stop"
    seed: int = 0

    def __post_init__(self):
        for name, known in (("dtype", COMPUTE_DTYPES), ("remat", REMAT_POLICIES), ("nonfinite", NONFINITE)):
            if getattr(self, name) not in known:
                _refuse(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.accumulate < 1:
            _refuse(f"accumulate is {self.accumulate}, expected 1 or more")
        if not self.z_loss >= 0:
            _refuse(f"z_loss is {self.z_loss}, expected 0 or more")
        if not 0 <= self.ema_decay < 1:
            _refuse(f"ema_decay is {self.ema_decay}, expected 0 or more, below 1")
        if isinstance(self.freeze, str):
            _refuse(f"freeze is {self.freeze!r}, expected a list of regular expressions")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    def form(self, lora: LoraConfig = NO_LORA, base_dtype: str = "float32", quantize: str = "") -> StateForm:
        """Of the states that such a step takes; the arguments are StateForm's."""
        return StateForm(self.scan_layers, lora, base_dtype, quantize, self.freeze, self.ema_decay > 0)


def batch_loss(
    cfg: ModelConfig,
    config: StepConfig,
    params: Params,
    batch: Batch,
    *,
    total: Array | float | None = None,
    adapter: Any = None,
    lora: LoraConfig = NO_LORA,
    dropout_key: Array | None = None,
) -> tuple[Array, Array]:
    """Cross-entropy (natural logarithm) over the targets that count, a mean unless `total` says otherwise.

    Args:
        total: what the weighted sum is divided by; the sum of weights when not given.

    Returns:
        Two float32 scalars: the loss to differentiate, and without z_loss to report.
    """
    batch = Batch(*(constrain(array, *axes) for array, axes in zip(batch, BATCH_AXES, strict=True)))
    x = train_states(
        cfg,
        params,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        adapter=adapter,
        lora=lora,
        dropout_key=dropout_key,
        kernels=config.kernels,
    )
    x = rms_norm(x, params["final_norm"], cfg.norm_eps)
    weights = batch.weights / (jnp.maximum(jnp.sum(batch.weights), 1) if total is None else total)
    table = head(cfg, params)
    if isinstance(table, QArray):  # which does not train: the loss would have a gradient for it
        table = gather_table(table, x.dtype)
    return cross_entropy(x, table, batch.targets, weights, cfg.vocab_size, config.z_loss)


def make_train_step(
    cfg: ModelConfig,
    config: StepConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    lora: LoraConfig = NO_LORA,
    base_dtype: str = "float32",
    quantize: str = "",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """step(state, batch) -> (state, metrics), compiled; the old state's memory is the new one's. Call it under
    jax.set_mesh(mesh).

    Where loss or gradient are not finite the new state is the old one, but for its step. Metrics are float32 scalars: loss
    (without z_loss), z_loss (its part, if there is one), grad_norm before clipping, param_norm of what trains after the update,
    learning_rate, targets (sum of weights), finite (1 or 0).

    Args:
        lora, base_dtype, quantize: of the state (state.StateForm).

    Raises:
        LlamaError: the mesh does not divide the model, or (when called) the batch; with the nearest meshes that do.
    """
    form = config.form(lora, base_dtype, quantize)
    shardings = state_shardings(cfg, optimizer, form, mesh=mesh)
    places = trained(form, shardings.params, shardings.adapter)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        _check_call(cfg, config, mesh, batch)
        weights = trained(form, state.params, state.adapter)
        targets = jnp.sum(batch.weights)

        def loss(weights: Any, batch: Batch, key: Array) -> tuple[Array, Array]:
            params, adapter = with_trained(form, state.params, state.adapter, weights)
            total = jnp.maximum(targets, 1)
            return batch_loss(cfg, config, params, batch, total=total, adapter=adapter, lora=lora, dropout_key=key)

        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient = _accumulated(jax.value_and_grad(loss, has_aux=True), config.accumulate, places)
        (total_loss, cross_entropy), grads = gradient(weights, batch, key)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total_loss) & jnp.isfinite(grad_norm)
        new = _updated(optimizer, config.ema_decay, grads, (weights, state.opt_state, state.ema), finite)
        metrics = {
            "loss": cross_entropy,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new[0]),
            "learning_rate": optimizer.rate(state.opt_state),
            "targets": targets,
            "finite": finite,
        }
        if config.z_loss:
            metrics["z_loss"] = total_loss - cross_entropy
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, *with_trained(form, state.params, state.adapter, new[0]), *new[1:]), metrics

    options = {"tpu": TPU_OPTIONS, "cpu": CPU_OPTIONS}.get(mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def make_eval_step(
    cfg: ModelConfig,
    config: StepConfig,
    mesh: Mesh,
    *,
    lora: LoraConfig = NO_LORA,
    base_dtype: str = "float32",
    quantize: str = "",
) -> Callable[[TrainState, Batch], tuple[Array, Array]]:
    """evaluate(state, batch) -> (sum of weighted cross-entropy, sum of weights), compiled: sums of both over many batches give
    the exact mean, whose exponential is the perplexity.

    Weights are those of state.evaluated: the average where there is one. There is no dropout and no z-loss. Call it under
    jax.set_mesh(mesh).
    """
    form = config.form(lora, base_dtype, quantize)
    config = dataclasses.replace(config, z_loss=0.0, remat="none", accumulate=1)

    def evaluate(state: TrainState, batch: Batch) -> tuple[Array, Array]:
        _check_call(cfg, config, mesh, batch)
        params, adapter = evaluated(form, state)
        loss, _ = batch_loss(cfg, config, params, batch, total=1.0, adapter=adapter, lora=lora)
        return loss, jnp.sum(batch.weights)

    return jax.jit(evaluate)


def _accumulated(gradient: Callable, parts: int, places: Any) -> Callable:
    """gradient(weights, batch, key) -> (losses, gradients), summed over so many parts of the batch's rows.

    Every device's rows are divided alike, so none move: row r is in part r % parts.

    Args:
        places: of the gradients' sums, the weights' own.
    """
    if parts == 1:
        return gradient

    def run(weights: Any, batch: Batch, key: Array) -> Any:
        def add(sums: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            rows, number = part
            return jax.tree.map(jnp.add, sums, gradient(weights, rows, jax.random.fold_in(key, number))), None

        def divide(array: Array) -> Array:
            rows = array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)
            return constrain(rows, None, "batch", "length")

        zeros = jax.tree.map(lambda w, place: jax.lax.with_sharding_constraint(jnp.zeros(w.shape), place), weights, places)
        nothing = ((jnp.float32(0), jnp.float32(0)), zeros)
        return jax.lax.scan(add, nothing, (jax.tree.map(divide, batch), jnp.arange(parts)))[0]

    return run


def _updated(
    optimizer: Optimizer, ema_decay: float, grads: Any, old: tuple[Any, Any, Any], finite: Array
) -> tuple[Any, Any, Any]:
    """Weights, optimizer state and average after an update; the old ones where the gradient was not finite."""
    weights, opt_state, ema = old
    updates, opt_state = optimizer.update(grads, opt_state, weights)
    weights = optax.apply_updates(weights, updates)
    if ema:
        ema = jax.tree.map(lambda mean, weight: ema_decay * mean + (1 - ema_decay) * weight, ema, weights)
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), (weights, opt_state, ema), old)


def _check_call(cfg: ModelConfig, config: StepConfig, mesh: Mesh, batch: Batch) -> None:
    if mesh.size > 1 and jax.sharding.get_abstract_mesh() != mesh.abstract_mesh:
        raise ValueError("the step was called outside jax.set_mesh(mesh): nothing would be divided as it should")
    rows = batch.tokens.shape[0]
    if rows % config.accumulate:
        _refuse(f"a batch of {rows} is not divisible by accumulate={config.accumulate}")
    check_mesh(cfg, mesh, rows // config.accumulate)


def _refuse(message: str) -> None:
    raise LlamaError(ExitCode.BAD_CONFIG, message)
