"""The whole model as functions over a tree of parameters; embedding [V, D], layers (a list of dicts with the names
and shapes of Block), final_norm [D], and lm_head [V, D] unless the head is tied."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.model.block import INIT_STDDEV, Block
from llama_jax.model.cache import KVCache
from llama_jax.ops.linear import project
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import rope_angles

Params = Mapping[str, Any]


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: KVCache | None = None,
    rope_length: Array | int | None = None,
) -> tuple[Array, KVCache]:
    """Runs the layers, not the head. Layers are unrolled: a scan copies every weight and cache on every step on a GPU.

    Args:
        tokens: [B, T] int32.
        positions: [B, T] int32, consecutive in each row.
        cache: the keys and values of earlier tokens; this call's are written into the slots `positions`. Without one, this
            call's keys and values are the cache returned.
        rope_length: [B] or a number, for `dynamic` RoPE: the tokens each sequence will have. T when not given.

    Returns:
        [B, T, D] before the final norm, and the cache.
    """
    cos, sin = rope_angles(cfg, positions, tokens.shape[1] if rope_length is None else rope_length)
    x = embed(params, tokens)
    caches = list(cache or [None] * cfg.num_layers)
    for i, layer in enumerate(params["layers"]):
        x, caches[i] = Block(cfg).apply({"params": layer}, x, positions, cos, sin, caches[i])
    return x, caches


def embed(params: Params, tokens: Array) -> Array:
    """[B, T] -> [B, T, D]."""
    return params["embedding"][tokens]


def logits(cfg: ModelConfig, params: Params, x: Array) -> Array:
    """Final norm and head: [B, T, D] -> [B, T, V] float32."""
    x = rms_norm(x, params["final_norm"], cfg.norm_eps)
    return project("BTD,VD->BTV", x, params["embedding"] if cfg.tied_head else params["lm_head"], jnp.float32)


def forward(cfg: ModelConfig, params: Params, tokens: Array, positions: Array | None = None) -> Array:
    """tokens [B, T] -> logits [B, T, V] float32; positions count from 0 unless given."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    length = positions[:, -1] + 1  # one sequence a row, in order
    return logits(cfg, params, hidden_states(cfg, params, tokens, positions, rope_length=length)[0])


def init_params(cfg: ModelConfig, key: Array, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Random parameters: normal with standard deviation 0.02, norms 1."""
    tables_key, layers_key = jax.random.split(key)
    stacked = jax.vmap(functools.partial(_init_layer, cfg, dtype=dtype))(jax.random.split(layers_key, cfg.num_layers))
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], nn.unbox(stacked)) for i in range(cfg.num_layers)]
    return nn.unbox(_init_tables(cfg, tables_key, dtype)) | {"layers": layers}


def param_shapes(cfg: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The tree of ShapeDtypeStructs; allocates nothing."""
    return _per_leaf(cfg, dtype, nn.unbox)


def param_axes(cfg: ModelConfig) -> dict[str, Any]:
    """The same tree with a tuple of logical axis names in the place of each array."""
    return _per_leaf(cfg, jnp.float32, lambda box: box.names)


def _per_leaf(cfg: ModelConfig, dtype: DTypeLike, read: Callable[[nn.LogicallyPartitioned], Any]) -> dict[str, Any]:
    """The parameter tree with `read` of each boxed ShapeDtypeStruct; layers are alike, so one is traced."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    tables, layer = (
        jax.tree.map(read, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
        for boxed in (
            jax.eval_shape(lambda key: _init_tables(cfg, key, dtype), key),
            jax.eval_shape(lambda key: _init_layer(cfg, key, dtype), key),
        )
    )
    return tables | {"layers": [dict(layer) for _ in range(cfg.num_layers)]}


def _init_layer(cfg: ModelConfig, key: Array, dtype: DTypeLike) -> dict[str, nn.LogicallyPartitioned]:
    x, positions = jnp.zeros((1, 1, cfg.embed_dim), dtype), jnp.zeros((1, 1), jnp.int32)
    angles = jnp.zeros((1, 1, cfg.head_dim // 2))
    return Block(cfg, dtype).init(key, x, positions, angles, angles, None)["params"]


def _init_tables(cfg: ModelConfig, key: Array, dtype: DTypeLike) -> dict[str, nn.LogicallyPartitioned]:
    def table(key: Array) -> nn.LogicallyPartitioned:
        values = nn.initializers.normal(INIT_STDDEV)(key, (cfg.vocab_size, cfg.embed_dim), dtype)
        return nn.LogicallyPartitioned(values, ("vocab", "embed"))

    embedding_key, head_key = jax.random.split(key)
    tables = {
        "embedding": table(embedding_key),
        "final_norm": nn.LogicallyPartitioned(jnp.ones(cfg.embed_dim, dtype), ("norm",)),
    }
    return tables if cfg.tied_head else tables | {"lm_head": table(head_key)}
