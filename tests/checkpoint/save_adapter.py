"""Writing an adapter without a run; runs write theirs with their own state (llama_jax.training.saving)."""

import dataclasses
from typing import Any

import numpy as np

from llama_jax.checkpoint.adapter import lora_config
from llama_jax.checkpoint.arrays import mesh_leaves
from llama_jax.checkpoint.save import Room, save_rooms
from llama_jax.checkpoint.store import ADAPTER, Checkpoint, to_flat
from llama_jax.model import Params, adapter_axes


def save_adapter(checkpoint: Checkpoint, adapter: Params, **options: Any) -> Checkpoint:
    """Writes an adapter alone, of a mesh or of one device, layers a list or stacked.

    Args:
        checkpoint: what to write, with `adapter` as `adapter_record` makes it; its path is the output directory.
        options: of `save_checkpoint`.
    """
    axes = to_flat(adapter_axes(checkpoint.config, lora_config(checkpoint), scan=False))
    checkpoint = dataclasses.replace(checkpoint, dtype=np.dtype(np.float32))
    return save_rooms(checkpoint, {ADAPTER: Room(mesh_leaves(to_flat(adapter)), axes)}, **options)
