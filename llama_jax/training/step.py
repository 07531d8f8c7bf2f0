"""One update of the weights: loss, gradients, optimizer, in one compiled program."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.data.batch import BATCH_AXES, Batch
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import REMAT_POLICIES, Params, head, train_states
from llama_jax.ops.loss import cross_entropy
from llama_jax.ops.norm import rms_norm
from llama_jax.sharding import constrain
from llama_jax.training.state import TrainState, check_mesh, state_shardings

COMPUTE_DTYPES = ("bfloat16", "float32")
# XLA:TPU would cast all layers' weights at once, before the loop that casts each (its pass that narrows float32 arrays whose
# readers cast them), and keep both: 1.7 GiB of 20.6 for 70B on v5p-128 (libtpu 0.0.42).
TPU_OPTIONS = {"xla_jf_bf16_propagation": False}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes.

    Attributes:
        dtype: of activations and of the products: bfloat16 | float32. Parameters, their gradients and the optimizer are
            float32 whatever it is.
        remat: what the forward pass keeps for the backward: none (everything) | full (the layers' inputs) | projections
            (inputs, and the results of the projections and of attention).
        scan_layers: one compiled layer in a loop over [L, ...] weights (TPU), or L of them one after the other (GPU).
        z_loss: weight of log(Z)^2.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    scan_layers: bool = True
    z_loss: float = 0.0

    def __post_init__(self):
        for name, value, known in (("dtype", self.dtype, COMPUTE_DTYPES), ("remat", self.remat, REMAT_POLICIES)):
            if value not in known:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {value!r}, expected one of {', '.join(known)}")


def batch_loss(cfg: ModelConfig, config: StepConfig, params: Params, batch: Batch) -> Array:
    """Mean cross-entropy (natural logarithm) over the targets that count, a float32 scalar."""
    batch = Batch(*(constrain(array, *axes) for array, axes in zip(batch, BATCH_AXES, strict=True)))
    x = train_states(
        cfg, params, batch.tokens, batch.positions, batch.segment_ids, dtype=jnp.dtype(config.dtype), remat=config.remat
    )
    x = rms_norm(x, params["final_norm"], cfg.norm_eps)
    weights = batch.weights / jnp.maximum(jnp.sum(batch.weights), 1)
    return cross_entropy(x, head(cfg, params), batch.targets, weights, cfg.vocab_size, config.z_loss)


def make_train_step(
    cfg: ModelConfig, config: StepConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """step(state, batch) -> (state, metrics), compiled; the old state's memory is the new one's. Call it under
    jax.set_mesh(mesh).

    Metrics: loss, and grad_norm before clipping; float32 scalars.

    Raises:
        LlamaError: the mesh does not divide the model, or (when called) the batch; with the nearest meshes that do.
    """
    shardings = state_shardings(cfg, optimizer, mesh=mesh, scan=config.scan_layers)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        if mesh.size > 1 and jax.sharding.get_abstract_mesh() != mesh.abstract_mesh:
            raise ValueError("the step was called outside jax.set_mesh(mesh): nothing would be divided as it should")
        check_mesh(cfg, mesh, batch.tokens.shape[0])
        loss, grads = jax.value_and_grad(lambda params: batch_loss(cfg, config, params, batch))(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
