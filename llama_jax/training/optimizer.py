"""The optimizer: what the papers train with, from optax."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import optax.contrib
from jax import Array

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.training.weights import Axes, as_matrix, flat_shape, matrices, per_weight, sides

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "schedule_free", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
MOMENT_DTYPES = ("float32", "bfloat16")
FIRST_MOMENTS = ("adamw", "lion", "muon")  # who has them
# Muon's five steps, as a list: optax then loops over them, which compiles in a fifth of the time (Jordan et al. 2024).
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
MUON_RMS = 0.2  # of a matrix's update, about that of adamw: one rate does for both (Liu et al. 2025, arXiv:2502.16982, eq. 4)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The defaults are Llama 2's (Touvron et al. 2023, arXiv:2307.09288, section 2.2); peak_lr is that of 7B and 13B.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019, arXiv:1711.05101) | adafactor (Shazeer and Stern 2018, arXiv:1804.04235,
            algorithm 4) | lion (Chen et al. 2023, arXiv:2302.06675) | muon (Jordan et al. 2024; matrices of the layers, all
            else by adamw) | schedule_free (Defazio et al. 2024, arXiv:2405.15682, around adamw) | sgd.
        peak_lr: learning rate after warm-up; of adafactor relative to a weight's size.
        schedule: cosine | linear | constant, what follows warm-up; schedule_free is made for constant.
        warmup_steps: the rate rises linearly from 0 for so many steps.
        total_steps: then it falls until here,
        final_ratio: to this share of the peak.
        b1, b2: of adamw and lion; b1 of schedule_free is its interpolation. adafactor and sgd have neither.
        eps: of adamw and schedule_free.
        muon_momentum: of muon's matrices.
        weight_decay: on matrices only, times the rate.
        clip_norm: gradients are scaled down to this global norm; math.inf for never.
        moment_dtype: of the first moment, of those that have one.
    """

    name: str = "adamw"
    peak_lr: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 2000
    total_steps: int = 500_000
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-5
    muon_momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "float32"

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            _refuse(f"optimizer {self.name!r} is unknown; known: {', '.join(OPTIMIZERS)}")
        for name, known in (("moment_dtype", MOMENT_DTYPES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                _refuse(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("peak_lr", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                _refuse(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("warmup_steps", "total_steps", "weight_decay", "final_ratio"):
            if not getattr(self, name) >= 0:
                _refuse(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("b1", "b2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                _refuse(f"{name} is {getattr(self, name)}, expected 0 or more, below 1")
        if self.moment_dtype != "float32" and self.name not in FIRST_MOMENTS:
            _refuse(
                f"moment_dtype is {self.moment_dtype!r}, and {self.name} has no first moment: {', '.join(FIRST_MOMENTS)} do"
            )
        if self.name == "schedule_free" and self.schedule != "constant":
            _refuse(f"schedule is {self.schedule!r}, and schedule_free replaces what follows warm-up: set schedule=constant")
        if self.name == "schedule_free" and not self.b1:
            _refuse("b1 is 0, and schedule_free interpolates by it: set b1=0.9")


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that can be asked for its rate.

    Attributes:
        init, update: as optax has them.
        rate: the learning rate of a state's next update; from 0 to the peak, whatever `update` does with it.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    rate: Callable[[Any], Array]


def make_optimizer(config: OptimizerConfig, axes: Any) -> Optimizer:
    """Clipping, moments, decay, schedule.

    Args:
        axes: logical axes of what trains (state.trained_axes). Every decision is theirs, `layers` left out, so that scanned
            layers ([L, ...]) train like unrolled ones.
    """
    schedule = make_schedule(config)
    descent = [
        _moments(config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=matrices(axes)),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.name == "schedule_free":
        descent = [optax.contrib.schedule_free(optax.chain(*descent), schedule, config.b1)]
    init, update = optax.chain(_clip(config.clip_norm), *descent)

    def rate(state: Any) -> Array:
        last = state[-1]
        return schedule(last.base_optimizer_state[-1].count if config.name == "schedule_free" else last.count)

    return Optimizer(init, update, rate)


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate by the number of updates made."""
    falls = max(config.total_steps - config.warmup_steps, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(config.peak_lr, falls, config.final_ratio),
        "linear": lambda: optax.linear_schedule(config.peak_lr, config.peak_lr * config.final_ratio, falls),
        "constant": lambda: optax.constant_schedule(config.peak_lr),
    }[config.schedule]()
    rises = optax.linear_schedule(0.0, config.peak_lr, config.warmup_steps)
    return optax.join_schedules([rises, after], [config.warmup_steps])


def evaluation_weights(opt_state: Any, weights: Any) -> Any:
    """What to evaluate and to keep: schedule_free's average x of its steps; the weights themselves of all others."""
    for part in opt_state:
        if isinstance(part, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(part, weights)
    return weights


def _clip(most: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm. One factor for all: optax.clip_by_global_norm divides every gradient, which
    XLA:CPU does in memory, before the moments."""
    if most == math.inf:
        return optax.identity()

    def clipped(grads: Any, _: Any) -> Any:
        factor = most / jnp.maximum(optax.tree.norm(grads), most)
        return optax.tree.scale(factor, grads)

    return optax.stateless(clipped)


def _moments(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Gradients -> directions, before decay and rate."""
    first = jnp.dtype(config.moment_dtype)

    def adam() -> optax.GradientTransformation:
        return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=first)

    def muon(names: Axes) -> optax.GradientTransformation:
        if sides(names) is None or "vocab" in names:
            return adam()
        outputs, inputs = sides(names)
        numbers = optax.contrib.MuonDimensionNumbers(inputs, outputs)
        orthogonal = optax.contrib.scale_by_muon(
            NEWTON_SCHULZ, beta=config.muon_momentum, mu_dtype=first, weight_dimension_numbers=numbers
        )
        scaled = optax.stateless_with_tree_map(
            lambda update, _: MUON_RMS * max(flat_shape(names, update.shape)) ** 0.5 * update
        )
        return optax.chain(orthogonal, scaled)

    def adafactor(names: Axes) -> optax.GradientTransformation:
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
        return as_matrix(names, optax.chain(factored, optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()))

    return {
        "adamw": adam,
        "adafactor": lambda: per_weight(axes, adafactor),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2, mu_dtype=first),
        "muon": lambda: per_weight(axes, muon),
        "schedule_free": lambda: optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True),
        "sgd": optax.identity,
    }[config.name]()


def _refuse(message: str) -> None:
    raise LlamaError(ExitCode.BAD_CONFIG, message)
