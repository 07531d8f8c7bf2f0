"""The optimizer: what the papers train with, from optax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.errors import ExitCode, LlamaError

OPTIMIZERS = ("adamw", "lion", "sgd")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The defaults are Llama 2's (Touvron et al. 2023, arXiv:2307.09288, section 2.2); peak_lr is that of 7B and 13B.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019, arXiv:1711.05101) | lion (Chen et al. 2023, arXiv:2302.06675) | sgd.
        peak_lr: learning rate after warm-up.
        warmup_steps: the rate rises linearly from 0 for so many steps.
        total_steps: then falls along a cosine until here.
        final_ratio: to this share of the peak.
        b1, b2: of adamw and lion; eps: of adamw; sgd has no moments.
        weight_decay: on matrices only, times the rate.
        clip_norm: gradients are scaled down to this global norm; math.inf for never.
        moment_dtype: of the first moment.
    """

    name: str = "adamw"
    peak_lr: float = 3e-4
    warmup_steps: int = 2000
    total_steps: int = 500_000
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "float32"

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise LlamaError(ExitCode.BAD_CONFIG, f"optimizer {self.name!r} is unknown; known: {', '.join(OPTIMIZERS)}")
        if self.moment_dtype not in MOMENT_DTYPES:
            raise LlamaError(
                ExitCode.BAD_CONFIG, f"moment_dtype is {self.moment_dtype!r}, expected one of {', '.join(MOMENT_DTYPES)}"
            )
        for name in ("peak_lr", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("warmup_steps", "total_steps", "weight_decay", "final_ratio"):
            if not getattr(self, name) >= 0:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected 0 or more, below 1")


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Clipping, moments, decay, schedule.

    Args:
        axes: logical axes of the parameters: what a matrix is, is decided by them, so that scanned layers ([L, ...]) train
            like unrolled ones.
    """
    first_moment = jnp.dtype(config.moment_dtype)
    moments = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=first_moment),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2, mu_dtype=first_moment),
        "sgd": optax.identity,
    }[config.name]()
    is_matrix = jax.tree.map(lambda names: names[-1] != "norm", axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.total_steps, config.warmup_steps + 1),
        end_value=config.peak_lr * config.final_ratio,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        moments,
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(schedule),
    )
