"""A single token through the model by a GPU's kernels, six a layer: weights are read once, and whatever is launched between two
adds to that time. The numbers are the plain layer's (llama_jax.model.block) but for the order of sums, and for norms, which are
not rounded before weights are multiplied with them."""

import math

import jax.numpy as jnp
from jax import Array

from llama_jax.config import ModelConfig
from llama_jax.model.cache import LayerCache
from llama_jax.model.fused import is_fused
from llama_jax.model.params import Params
from llama_jax.ops.attention import cache_arrays, multiplies_cache, of_arrays
from llama_jax.ops.kernels.decode import HEAD_DIMS, attend_new
from llama_jax.ops.kernels.decode import supports as supports_cache
from llama_jax.ops.kernels.gemv import multiply_row
from llama_jax.ops.kernels.gemv import supports as supports_weight
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import is_partitioned

PRODUCTS = {"qkv_proj": 1, "o_proj": 2, "gate_up_proj": 1, "down_proj": 1}  # in their order; axes that are inputs


def supports_layer(layer: Params, x: Array, cache: LayerCache | None) -> bool:
    """Whether there are kernels for it: of fused weights, with x [1, 1, D] and not float32, on one device."""
    if cache is None or not is_fused(layer) or not _is_one_row(x) or not multiplies_cache(x, cache.k) or cache.k.shape[0] != 1:
        return False
    slots, width = cache.k.shape[2:]
    gated = (name == "gate_up_proj" for name in PRODUCTS)
    return supports_cache(slots, width) and all(
        supports_weight(weight, x.dtype, gated=gate) for weight, gate in zip(_matrices(layer), gated, strict=True)
    )


def supports_head(cfg: ModelConfig, head: Array | QArray, x: Array) -> bool:
    """Whether there is a kernel for the head of this x, in a model whose layers may have some."""
    return cfg.head_dim in HEAD_DIMS and _is_one_row(x) and supports_weight(head, x.dtype)


def token_layer(
    cfg: ModelConfig, layer: Params, x: Array, positions: Array, cos: Array, sin: Array, cache: LayerCache
) -> tuple[Array, LayerCache]:
    """What FusedBlock returns, of x [1, 1, D]."""
    row, eps = x.reshape(-1), cfg.norm_eps
    qkv, o, gate_up, down = _matrices(layer)
    new = multiply_row(row, qkv, norm=layer["attn_norm"], eps=eps)
    new = new.reshape(1, cache.k.shape[1], -1, cfg.head_dim)
    y, *written = attend_new(new, cos[:, 0], sin[:, 0], positions[:, 0], cache_arrays(*cache))
    row = multiply_row(y.reshape(-1), o, residual=row)
    y = multiply_row(row, gate_up, norm=layer["mlp_norm"], eps=eps, gated=True)
    return multiply_row(y, down, residual=row).reshape(x.shape), LayerCache(*of_arrays(written))


def token_logits(cfg: ModelConfig, norm: Array, head: Array | QArray, x: Array) -> Array:
    """[1, 1, D] before the final norm -> [1, 1, V'] float32."""
    return multiply_row(x.reshape(-1), head, norm=norm, eps=cfg.norm_eps, dtype=jnp.float32)[None, None]


def _is_one_row(x: Array) -> bool:
    return x.shape[:2] == (1, 1) and x.dtype != jnp.float32 and not is_partitioned()


def _matrices(layer: Params) -> list[Array | QArray]:
    """The weights of the four products, [O, I]."""
    return [_matrix(layer[name], num_inputs) for name, num_inputs in PRODUCTS.items()]


def _matrix(weight: Array | QArray, num_inputs: int) -> Array | QArray:
    if not isinstance(weight, QArray):
        return _flat(weight, num_inputs)
    return weight._replace(value=_flat(weight.value, num_inputs), scale=weight.scale.reshape(-1, weight.scale.shape[-1]))


def _flat(weight: Array, num_inputs: int) -> Array:
    return weight.reshape(-1, math.prod(weight.shape[weight.ndim - num_inputs :]))
