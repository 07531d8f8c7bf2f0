"""States whose every value is known: what an array holds is drawn from its name on disk, whatever the mesh and the form."""

import dataclasses
import zlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.checkpoint.store import ArrayReader
from llama_jax.config import ModelConfig
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.saving import Retention, Saver
from llama_jax.training.state import StateForm, TrainState, trained_axes
from llama_jax.training.stored import StateLayout, StoredLeaf, state_layout
from tests.training.make import CFG, training_mesh

IDENTITY = {"optimizer.name": "adamw"}
KEEP_ALL = Retention(keep=100)


def layout_of(
    optimizer: str | OptimizerConfig = "adamw",
    mesh: str | None = None,
    *,
    cfg: ModelConfig = CFG,
    scan: bool = False,
    **form: Any,
) -> StateLayout:
    """The layout of a named optimizer on a mesh of tests.make_mesh, or of the first device."""
    form = StateForm(scan, **form)
    if isinstance(optimizer, str):
        optimizer = OptimizerConfig(optimizer, schedule="constant" if optimizer == "schedule_free" else "cosine")
    return state_layout(cfg, make_optimizer(optimizer, trained_axes(cfg, form)), form, mesh=training_mesh(mesh))


def state_of(layout: StateLayout, step: int = 1, seed: int = 0, base: Any = None) -> TrainState:
    """A state in this layout."""
    arrays = {path: jax.device_put(value_of(leaf, step, seed), leaf.target.sharding) for path, leaf in layout.leaves.items()}
    state = layout.state(arrays)
    return state if base is None else dataclasses.replace(state, params=base)


def value_of(leaf: StoredLeaf, step: int = 1, seed: int = 0) -> np.ndarray:
    """An array of the state in memory, its padding zero."""
    value = np.zeros(leaf.target.shape, leaf.target.dtype)
    names = leaf.names
    rows = tuple(slice(size) for size in leaf.shape)
    for i, name in enumerate(names):
        value[(i, *rows) if names != [leaf.name] else rows] = drawn(leaf, name, step, seed)
    return value


def drawn(leaf: StoredLeaf, name: str, step: int = 1, seed: int = 0) -> np.ndarray:
    """An array on disk."""
    if name == "step":
        return np.int32(step)
    rng = np.random.default_rng([zlib.crc32(f"{leaf.room}/{name}".encode()), seed])
    if leaf.target.dtype in (np.float32, ml_dtypes.bfloat16):
        return rng.normal(size=leaf.shape).astype(leaf.target.dtype)
    return rng.integers(0, 1000, leaf.shape).astype(leaf.target.dtype)


def saver_of(workdir: Any, layout: StateLayout, retention: Retention = KEEP_ALL, **options: Any) -> Saver:
    options = dict(identity=IDENTITY, adapter={"rank": layout.form.lora.rank} if layout.form.lora.rank else None) | options
    return Saver(workdir, layout, retention, **options)


def assert_stored(step: Any, layout: StateLayout, seed: int = 0) -> None:
    """The checkpoint STEP holds the state that `state_of` makes, to the bit."""
    for leaf in layout.leaves.values():
        reader = ArrayReader(epath.Path(step) / leaf.room)
        for name in leaf.names:
            found = reader.read(name)
            assert found.shape == leaf.shape and found.dtype == leaf.target.dtype, name
            assert found.tobytes() == drawn(leaf, name, int(epath.Path(step).name), seed).tobytes(), name


def assert_is(state: TrainState, layout: StateLayout, step: int = 1, seed: int = 0) -> None:
    """Every device has its part of the state that `state_of` makes, to the bit, where the layout has it."""
    found = jax.tree.leaves_with_path(dataclasses.replace(state, params={}) if layout.form.lora.rank else state)
    assert len(found) == len(layout.leaves)
    for (path, array), leaf in zip(found, layout.leaves.values(), strict=True):
        value = value_of(leaf, step, seed)
        assert (array.shape, array.dtype, array.sharding) == (value.shape, value.dtype, leaf.target.sharding), path
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), (path, shard.index)
