"""The whole model as functions over a tree of parameters (llama_jax.model.params)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_policies
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.model.block import Block
from llama_jax.model.cache import KVCache, LayerCache
from llama_jax.model.fused import FusedBlock, is_fused
from llama_jax.model.lora import LayerAdapter, LoraConfig, layer_seeds
from llama_jax.model.params import Params
from llama_jax.model.token import supports_head, supports_layer, token_layer, token_logits
from llama_jax.ops.attention import MASKED
from llama_jax.ops.kernels import Kernels
from llama_jax.ops.linear import lookup, project
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.qarray import QArray
from llama_jax.ops.rope import rope_angles

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj")
# What a backward pass finds in memory; the rest of a layer is computed again. The layers' inputs are always kept.
REMAT_POLICIES = {
    "none": None,
    "full": checkpoint_policies.nothing_saveable,
    "projections": checkpoint_policies.save_only_these_names(*PROJECTIONS),
    "offload": checkpoint_policies.save_and_offload_only_these_names(  # the same, fetched from the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=PROJECTIONS, offload_src="device", offload_dst="pinned_host"
    ),
}


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: KVCache | None = None,
    rope_length: Array | int | None = None,
    *,
    kernels: Kernels = True,
) -> tuple[Array, KVCache]:
    """Runs the layers, not the head. Layers are unrolled: a scan copies every weight and cache on every step on a GPU.

    Args:
        params: layers as Block has them, or FusedBlock (llama_jax.model.fused).
        tokens: [B, T] int32.
        positions: [B, T] int32, consecutive in each row.
        cache: the keys and values of earlier tokens; this call's are written into the slots `positions`. Without one, this
            call's keys and values are the cache returned.
        rope_length: [B] or a number, for `dynamic` RoPE: the tokens each sequence will have. T when not given.
        kernels: whether attention may use the platform's kernels.

    Returns:
        [B, T, D] before the final norm, and the cache.
    """
    cos, sin = rope_angles(cfg, positions, tokens.shape[1] if rope_length is None else rope_length)
    x = embed(params, tokens)
    caches = list(cache or [None] * cfg.num_layers)
    for i, layer in enumerate(params["layers"]):
        x, caches[i] = _layer(cfg, kernels, layer, x, positions, cos, sin, caches[i])
    return x, caches


def _layer(
    cfg: ModelConfig,
    kernels: Kernels,
    layer: Params,
    x: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    cache: LayerCache | None,
) -> tuple[Array, LayerCache]:
    def plain(layer: Params, *inputs: Array | LayerCache | None) -> tuple[Array, LayerCache]:
        block = FusedBlock if is_fused(layer) else Block
        return block(cfg, kernels=kernels).apply({"params": layer}, *inputs)

    inputs = (layer, x, positions, cos, sin, cache)
    if not kernels or not supports_layer(layer, x, cache):
        return plain(*inputs)
    return jax.lax.platform_dependent(*inputs, cuda=functools.partial(token_layer, cfg), default=plain)


def train_states(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    segment_ids: Array | None = None,
    *,
    dtype: DTypeLike,
    remat: str,
    adapter: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: Array | None = None,
    kernels: bool = True,
) -> Array:
    """hidden_states for training: no cache, in a compute dtype, remembering for the backward pass what `remat` says.

    Args:
        params: `layers` a list (unrolled: GPUs), or one dict of [L, ...] (scanned: TPUs, which compile and schedule one layer).
        positions: [B, T], from 0 in each segment.
        segment_ids: [B, T] where rows hold several sequences.
        dtype: of activations; parameters are cast where they are used, inside the layer.
        remat: a key of REMAT_POLICIES.
        adapter: in the form of `params`, made for `lora`; the weights' int8 or bfloat16 is as good as float32 then, as they
            are not trained.
        dropout_key: of the adapter's dropout; None for none (evaluation).
        kernels: whether attention may use the platform's kernel.

    Returns:
        [B, T, D] before the final norm.
    """
    cos, sin = rope_angles(cfg, positions, tokens.shape[1])

    def layer(x: Array, inputs: tuple[Params, Params | None, Array | None]) -> tuple[Array, None]:
        weights, layer_adapter, seed = inputs
        block = Block(cfg, adapted=LayerAdapter(lora, layer_adapter, seed) if layer_adapter else None, kernels=kernels)
        return block.apply({"params": weights}, x, positions, cos, sin, None, segment_ids)[0], None

    scanned = not isinstance(params["layers"], list)
    layer = _rematerialised(layer, remat, prevent_cse=not scanned)  # a scan's body cannot be merged with another anyway
    x = embed(params, tokens, dtype)
    adapters = adapter["layers"] if adapter else None
    seeds = layer_seeds(lora, dropout_key, cfg.num_layers) if adapter else None
    if scanned:
        return jax.lax.scan(layer, x, (params["layers"], adapters, seeds))[0]
    for i, weights in enumerate(params["layers"]):
        x, _ = layer(x, (weights, adapters and adapters[i], None if seeds is None else seeds[i]))
    return x


def embed(params: Params, tokens: Array, dtype: DTypeLike | None = None) -> Array:
    """[B, T] -> [B, T, D] in a dtype (the table's when not given), which is then what the layers compute in."""
    return lookup(params["embedding"], tokens, dtype or params["embedding"].dtype)


def logits(cfg: ModelConfig, params: Params, x: Array, *, kernels: Kernels = False) -> Array:
    """Final norm and head: [B, T, D] -> [B, T, V'] float32; rows that only pad the vocabulary are never likely.

    Args:
        kernels: of a single token by the GPU's kernel, which has no gradient, where there is one for it.
    """

    def plain(norm: Array, head: Array | QArray, x: Array) -> Array:
        return project("BTD,VD->BTV", rms_norm(x, norm, cfg.norm_eps), head, jnp.float32)

    inputs = (params["final_norm"], head(cfg, params), x)
    if kernels and supports_head(cfg, inputs[1], x):
        scores = jax.lax.platform_dependent(*inputs, cuda=functools.partial(token_logits, cfg), default=plain)
    else:
        scores = plain(*inputs)
    return mask_padding(cfg, scores)


def head(cfg: ModelConfig, params: Params) -> Array | QArray:
    """The output projection [V', D]."""
    return params["embedding"] if cfg.tied_head else params["lm_head"]


def mask_padding(cfg: ModelConfig, scores: Array) -> Array:
    """[..., V'], what lies beyond the vocabulary at the lowest value."""
    if scores.shape[-1] == cfg.vocab_size:
        return scores
    return jnp.where(jnp.arange(scores.shape[-1]) < cfg.vocab_size, scores, MASKED)


def forward(cfg: ModelConfig, params: Params, tokens: Array, positions: Array | None = None) -> Array:
    """tokens [B, T] -> logits [B, T, V] float32; positions count from 0 unless given."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    length = positions[:, -1] + 1  # one sequence a row, in order
    x, _ = hidden_states(cfg, params, tokens, positions, rope_length=length)
    return logits(cfg, params, x)[..., : cfg.vocab_size]


def _rematerialised(layer: Callable, remat: str, *, prevent_cse: bool) -> Callable:
    if remat == "none":
        return layer
    return jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)
