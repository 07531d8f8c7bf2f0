"""Model FLOP/s utilisation: work that the mathematics needs, per second, as a share of what the devices could do.

Two conventions are in use, and both are printed; work done again because of rematerialisation counts in neither.
- PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 6 FLOPs a token for every parameter, the embedding's too, and
  12 * L * N * H * T for attention, as if every token saw all others of its row.
- causal: parameters that are multiplied only (not the embedding's lookup), and half of the attention, as MaxText counts it.
With LoRA a frozen weight has no gradient: 4 in the place of 6, and the adapter's own products are not counted.
"""

import jax
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.plan.chips import CHIPS, Chip
from train.recipe import Recipe

# What jax calls the devices, in lower case; the first that begins so.
DEVICE_KINDS = {
    "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v6": "v6e", "tpu v7": "v7x", "tpu7": "v7x",
    "nvidia a100-sxm4-40gb": "a100-40", "nvidia a100-pcie-40gb": "a100-40", "nvidia a100": "a100-80", "nvidia h100": "h100",
    "nvidia h200": "h200", "nvidia b200": "b200", "nvidia l4": "l4", "tesla t4": "t4",
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """What a device is to the planner; None for a CPU, and for what it does not know."""
    kind = device.device_kind.lower()
    return next((CHIPS[name] for words, name in DEVICE_KINDS.items() if kind.startswith(words)), None)


def flops_per_token(cfg: ModelConfig, length: int, *, causal: bool, frozen: bool = False) -> float:
    """FLOPs of forward and backward on one token of rows of `length`, by one of the two conventions."""
    weights = cfg.num_params
    if causal and not cfg.tied_head:
        weights -= cfg.vocab_size * cfg.embed_dim
    attention = (6 if causal else 12) * cfg.num_layers * cfg.num_heads * cfg.head_dim * length
    return (4 if frozen else 6) * weights + attention


class Rates:
    """What a step's seconds say: tokens/s, MFU by both conventions where the chip is known, the fullest device's memory."""

    def __init__(self, cfg: ModelConfig, recipe: Recipe, mesh: Mesh):
        self._tokens = recipe.run.batch_size * recipe.run.length
        self._device = jax.local_devices()[0]
        chip = chip_of(self._device)
        self._peak = chip.peak(recipe.step.dtype) * mesh.size if chip else 0.0
        self._flops = {
            f"mfu_{name}": flops_per_token(cfg, recipe.run.length, causal=name == "causal", frozen=recipe.lora.rank > 0)
            for name in ("causal", "palm")
        }

    def __call__(self, step_seconds: float) -> dict[str, float]:
        rate = self._tokens / step_seconds
        found = {"tokens_per_second": rate}
        if self._peak:
            found |= {name: rate * flops / self._peak for name, flops in self._flops.items()}
        memory = self._device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["hbm_bytes"] = float(memory["peak_bytes_in_use"])
        return found
