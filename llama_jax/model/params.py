"""The tree of parameters: shapes, logical axes, random values, and its two forms.

embedding [V', D], layers, final_norm, and lm_head [V', D] unless the head is tied; V' is the vocabulary rounded up to what the
mesh divides. `layers` is a list of dicts with the names and shapes of Block, or, for scanned training, one dict of [L, ...].
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.mesh import padded_vocab
from llama_jax.model.block import INIT_STDDEV, Block

Params = Mapping[str, Any]


def init_params(
    cfg: ModelConfig, key: Array, dtype: DTypeLike = jnp.float32, *, scan: bool = False, tensor: int = 1
) -> dict[str, Any]:
    """Random parameters: normal with standard deviation 0.02, norms 1, padding of the vocabulary 0.

    Args:
        scan: layers as one dict of [L, ...].
        tensor: size of the mesh's tensor axis, which V' is a multiple of. The values do not depend on it.
    """
    tables_key, layers_key = jax.random.split(key)
    stacked = jax.vmap(functools.partial(_init_layer, cfg, dtype=dtype))(jax.random.split(layers_key, cfg.num_layers))
    params = nn.unbox(_init_tables(cfg, tables_key, dtype, tensor)) | {"layers": nn.unbox(stacked)}
    return params if scan else unstack_layers(params)


def param_shapes(cfg: ModelConfig, dtype: DTypeLike = jnp.float32, *, scan: bool = False, tensor: int = 1) -> dict[str, Any]:
    """The tree of ShapeDtypeStructs; allocates nothing."""
    tables, layer = _per_leaf(cfg, dtype, tensor, nn.unbox)
    if not scan:
        return tables | {"layers": [dict(layer) for _ in range(cfg.num_layers)]}
    stacked = {name: jax.ShapeDtypeStruct((cfg.num_layers, *leaf.shape), leaf.dtype) for name, leaf in layer.items()}
    return tables | {"layers": stacked}


def param_axes(cfg: ModelConfig, *, scan: bool = False) -> dict[str, Any]:
    """The same tree with a tuple of logical axis names in the place of each array."""
    tables, layer = _per_leaf(cfg, jnp.float32, 1, lambda box: box.names)
    if not scan:
        return tables | {"layers": [dict(layer) for _ in range(cfg.num_layers)]}
    return tables | {"layers": {name: ("layers", *axes) for name, axes in layer.items()}}


def stack_layers(params: Params) -> dict[str, Any]:
    """A list of layers -> one dict of [L, ...]."""
    return {**params, "layers": jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])}


def unstack_layers(params: Params) -> dict[str, Any]:
    """One dict of [L, ...] -> a list of layers."""
    count = len(jax.tree.leaves(params["layers"])[0])
    return {**params, "layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]}


def _per_leaf(
    cfg: ModelConfig, dtype: DTypeLike, tensor: int, read: Callable[[nn.LogicallyPartitioned], Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`read` of each boxed ShapeDtypeStruct: of the tables, and of a layer; layers are alike, so one is traced."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = (
        jax.eval_shape(lambda key: _init_tables(cfg, key, dtype, tensor), key),
        jax.eval_shape(lambda key: _init_layer(cfg, key, dtype), key),
    )
    return jax.tree.map(read, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def _init_layer(cfg: ModelConfig, key: Array, dtype: DTypeLike) -> dict[str, nn.LogicallyPartitioned]:
    x, positions = jnp.zeros((1, 1, cfg.embed_dim), dtype), jnp.zeros((1, 1), jnp.int32)
    angles = jnp.zeros((1, 1, cfg.head_dim // 2))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # shapes only: nothing to place
        return Block(cfg, dtype).init(key, x, positions, angles, angles, None)["params"]


def _init_tables(cfg: ModelConfig, key: Array, dtype: DTypeLike, tensor: int) -> dict[str, nn.LogicallyPartitioned]:
    rows = padded_vocab(cfg.vocab_size, tensor)

    def table(key: Array) -> nn.LogicallyPartitioned:
        values = nn.initializers.normal(INIT_STDDEV)(key, (rows, cfg.embed_dim), dtype)
        values = values if rows == cfg.vocab_size else values.at[cfg.vocab_size :].set(0)
        return nn.LogicallyPartitioned(values, ("vocab", "embed"))

    embedding_key, head_key = jax.random.split(key)
    tables = {
        "embedding": table(embedding_key),
        "final_norm": nn.LogicallyPartitioned(jnp.ones(cfg.embed_dim, dtype), ("norm",)),
    }
    return tables if cfg.tied_head else tables | {"lm_head": table(head_key)}
