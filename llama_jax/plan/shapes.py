"""Parameters as the mesh cuts them: names, axes, and elements per device.

Restates the table of parameters in llama_jax.model.params and the rules of llama_jax.sharding without importing jax; a test
compares both.
"""

import dataclasses
import functools
import math

from llama_jax.config import ModelConfig
from llama_jax.mesh import MeshShape, padded_vocab

MESH_AXIS = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}  # others: whole

Axis = tuple[str, int]  # logical name, size


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, or the L alike of a stack of layers.

    Attributes:
        outputs, inputs: its axes [out..., in...]; a norm has outputs only.
        count: L, or 1 outside the layers.
        quantizable: int8 has a form of it (llama_jax.model.quantize).
    """

    name: str
    outputs: tuple[Axis, ...]
    inputs: tuple[Axis, ...]
    count: int = 1
    quantizable: bool = False

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.outputs + self.inputs


@functools.cache
def weights(cfg: ModelConfig, tensor: int = 1) -> tuple[Weight, ...]:
    """Every parameter of a model whose vocabulary is padded for a tensor axis of this size."""
    D, L = ("embed", cfg.embed_dim), cfg.num_layers
    N, K, H = ("heads", cfg.num_heads), ("kv_heads", cfg.num_kv_heads), ("head_dim", cfg.head_dim)
    F, V = ("mlp", cfg.mlp_dim), ("vocab", padded_vocab(cfg.vocab_size, tensor))
    norm = (("norm", cfg.embed_dim),)
    head = () if cfg.tied_head else (Weight("lm_head", (V,), (D,), quantizable=True),)
    return (
        Weight("embedding", (V,), (D,)),
        Weight("layers.attn_norm", norm, (), L),
        Weight("layers.q_proj", (N, H), (D,), L, True),
        Weight("layers.k_proj", (K, H), (D,), L, True),
        Weight("layers.v_proj", (K, H), (D,), L, True),
        Weight("layers.o_proj", (D,), (N, H), L, True),
        Weight("layers.mlp_norm", norm, (), L),
        Weight("layers.gate_proj", (F,), (D,), L, True),
        Weight("layers.up_proj", (F,), (D,), L, True),
        Weight("layers.down_proj", (D,), (F,), L, True),
        Weight("final_norm", norm, ()),
        *head,
    )


def elements(axes: tuple[Axis, ...], mesh: MeshShape) -> int:
    """Elements per device of an array with these axes."""
    return math.prod(size // shards(axis, size, mesh) for axis, size in axes)


def shards(axis: str, size: int, mesh: MeshShape) -> int:
    """Parts a logical axis is cut into. Key/value heads fewer than devices on tensor are whole on each."""
    parts = getattr(mesh, MESH_AXIS[axis]) if axis in MESH_AXIS else 1
    return 1 if axis == "kv_heads" and size % parts else parts


def gathered(mesh: MeshShape) -> MeshShape:
    """The mesh as a weight sees it after it was gathered over fsdp."""
    return dataclasses.replace(mesh, fsdp=1)
