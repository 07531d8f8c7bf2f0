"""Layers whose weights of the same x lie in one array, as a GPU reads them best: one product instead of three, and of two.

For inference only. A layer has `qkv_proj` [K, G + 2, H, D], of each key/value head its G query heads, its key and its value,
and `gate_up_proj` [2, F, D] in the place of five weights of Block, and what else Block has. The norms' weights stay by
themselves: a norm is one kernel with or without them, and in a weight they would be rounded with it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from llama_jax.model.block import Block
from llama_jax.model.params import Params
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import constrain

AXES = {"qkv_proj": ("kv_heads", "fused", "head_dim", "embed"), "gate_up_proj": ("fused", "mlp", "embed")}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class FusedBlock(Block):
    """Block over the weights of `fuse_layer`; the products have the same numbers."""

    def project_qkv(self, x: Array) -> tuple[Array, ...]:
        (y,) = self.project(x, qkv_proj="BTD,KPHD->BTKPH")
        q, k, v = jnp.split(y, [y.shape[3] - 2, y.shape[3] - 1], axis=3)
        return q.reshape(*x.shape[:2], -1, q.shape[4]), k[:, :, :, 0], v[:, :, :, 0]

    def project_gate_up(self, x: Array) -> tuple[Array, ...]:
        (y,) = self.project(x, gate_up_proj="BTD,CFD->BTCF")
        return y[:, :, 0], y[:, :, 1]

    def sizes(self) -> dict[str, int]:
        sizes = super().sizes()
        return sizes | {"P": sizes["N"] // sizes["K"] + 2, "C": 2}


def is_fused(layer: Mapping[str, Any]) -> bool:
    """Whether a layer of a tree is FusedBlock's."""
    return "qkv_proj" in layer


def can_fuse(layer: Params, mesh: Mesh | None) -> bool:
    """Whether a layer is not fused yet, and every device has key/value heads of its own, with their query heads beside them."""
    if is_fused(layer):
        return False
    k = layer["k_proj"]
    return mesh is None or (k.value if isinstance(k, QArray) else k).shape[0] % mesh.shape["tensor"] == 0


def fused_axes(axes: Params) -> dict[str, Any]:
    """Logical axes of the tree with fused layers, from those of the tree without; of QArrays, too."""

    def leaf(name: str, one: Any) -> Any:
        return _with_scale(type(one), AXES[name]) if isinstance(one, QArray) else AXES[name]

    layers = [_rest(layer) | {name: leaf(name, layer[parts[0]]) for name, parts in PARTS.items()} for layer in axes["layers"]]
    return {**axes, "layers": layers}


def fuse_layer(layer: Params) -> dict[str, Any]:
    """The weights of Block, arrays or QArrays, as FusedBlock has them."""

    def together(name: str, join: Any) -> Any:
        fused = jax.tree.map(join, *(layer[part] for part in PARTS[name]))
        if isinstance(fused, QArray):
            places = _with_scale(type(fused), AXES[name])
            return type(fused)(*(constrain(x, *names) for x, names in zip(fused, places, strict=True)))
        return constrain(fused, *AXES[name])

    def beside(q: Array, k: Array, v: Array) -> Array:
        return jnp.concatenate([q.reshape(k.shape[0], -1, *q.shape[1:]), k[:, None], v[:, None]], axis=1)

    fused = {"qkv_proj": together("qkv_proj", beside), "gate_up_proj": together("gate_up_proj", lambda *x: jnp.stack(x))}
    return _rest(layer) | fused


def _rest(layer: Params) -> dict[str, Any]:
    return {name: leaf for name, leaf in layer.items() if name not in sum(PARTS.values(), ())}


def _with_scale(kind: type[QArray], axes: tuple[str, ...]) -> QArray:
    return kind(axes, (*axes[:-1], "group"))
