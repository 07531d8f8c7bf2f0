"""What a training state is on disk: names, shapes and chunks of its arrays, the same for every mesh and for `scan_layers`.

params/ has the weights to sample with, as those of any checkpoint, and adapter/ those of a LoRA run, whose frozen base is not
written: these are what trains, or its average where there is one. state/ has all else, an array under its path in the state:
"opt_state.1.mu.layers.0.q_proj", "ema.embedding", "step". There is one array per layer, whatever the layers are in memory, and
rows of padding are left out.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax.contrib
from jax.sharding import Mesh

from llama_jax.checkpoint.arrays import MeshLeaf
from llama_jax.checkpoint.save import Room
from llama_jax.checkpoint.store import stored_names, to_flat
from llama_jax.config import ModelConfig
from llama_jax.model import adapter_axes, param_axes
from llama_jax.training.optimizer import Optimizer
from llama_jax.training.state import StateForm, TrainState, evaluated, state_shapes, state_shardings

WHOLE = "norm"  # the logical axis of what is never cut
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """An array of the state, in memory and on disk.

    Attributes:
        room: the folder: params, adapter or state.
        name: in it; "layers.q_proj" is a stack [L, ...] in memory, and has an array for each layer on disk.
        target: in memory: shape, dtype, sharding.
        shape: on disk, of one layer.
        axes: logical axes of that.
    """

    room: str
    name: str
    target: jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    axes: Axes

    @property
    def names(self) -> list[str]:
        """On disk, in the order of the layers."""
        return stored_names(self.name, self.target.shape)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Attributes:
    cfg, form: the model, and what the state is made of.
    leaves: by their paths in the state.
    averages: of the weights, which are in no part of the state: schedule_free's, by paths; else empty.
    tree: the state with its path in the place of each array that is stored.
    """

    cfg: ModelConfig
    form: StateForm
    leaves: Mapping[str, StoredLeaf]
    averages: Mapping[str, StoredLeaf]
    tree: TrainState

    def arrays(self) -> dict[str, str]:
        """Every array on disk, "room/name", as "dtype[shape]"."""
        leaves = (*self.leaves.values(), *self.averages.values())
        return {f"{leaf.room}/{name}": f"{leaf.target.dtype}{list(leaf.shape)}" for leaf in leaves for name in leaf.names}

    def identity(self) -> dict[str, Any]:
        """Settings without which the arrays mean something else, or are others."""
        form = dataclasses.asdict(self.form)
        lora = {f"lora.{name}": value for name, value in form["lora"].items() if name != "dropout"}
        base = {f"lora.{name}": form[name] for name in ("base_dtype", "quantize")}
        rest = {f"train.{name}": form[name] for name in ("freeze", "ema")}
        return rest | (lora | base if self.form.lora.rank else {"lora.rank": 0})

    def rooms(self, state: TrainState) -> dict[str, Room]:
        """What is written of a state."""
        pairs = [(leaf, array) for leaf, array in zip(self.leaves.values(), _leaves(state, self.form).values(), strict=True)]
        if self.averages:
            params, adapter = jax.jit(functools.partial(evaluated, self.form))(state)
            named = _leaves(dataclasses.replace(state, params=params, adapter=adapter), self.form)
            pairs += [(leaf, named[path]) for path, leaf in self.averages.items()]
        rooms: dict[str, Room] = {}
        for leaf, array in pairs:
            room = rooms.setdefault(leaf.room, Room({}, {}))
            names = leaf.names
            for i, name in enumerate(names):
                room.leaves[name] = MeshLeaf(array, leaf.shape, i if names != [leaf.name] else -1)
                room.axes[name] = leaf.axes
        return rooms

    def state(self, arrays: Mapping[str, jax.Array]) -> TrainState:
        """The state of arrays by their paths; without a LoRA run's base."""
        return jax.tree.map(arrays.__getitem__, self.tree)


def state_layout(cfg: ModelConfig, optimizer: Optimizer, form: StateForm, *, mesh: Mesh) -> StateLayout:
    """The layout of the states of an optimizer on a mesh. Whatever the optimizer keeps is known by its path and its shape."""
    shapes = state_shapes(cfg, optimizer, form, tensor=mesh.shape["tensor"])
    places = state_shardings(cfg, optimizer, form, mesh=mesh)
    targets = _leaves(jax.tree.map(_placed, shapes, places), form)
    unpadded = _leaves(state_shapes(cfg, optimizer, form, tensor=1), form)
    averaged = any(isinstance(part, optax.contrib.ScheduleFreeState) for part in shapes.opt_state)
    room = "adapter" if form.lora.rank else "params"
    axes = to_flat(adapter_axes(cfg, form.lora, scan=True) if form.lora.rank else param_axes(cfg, scan=True))
    weights = {
        _without_number(path.removeprefix(f"{room}.")): _of_one_layer(path, leaf.shape)
        for path, leaf in unpadded.items()
        if path.startswith(f"{room}.")
    }
    leaves, averages = {}, {}
    for path, target in targets.items():
        kind, _, name = path.partition(".")
        shape = _of_one_layer(path, unpadded[path].shape)
        leaf = StoredLeaf("state", path, target, shape, _axes(path, shape, weights, axes))
        leaves[path] = leaf
        if kind == "ema" or (kind == room and f"ema.{name}" not in targets):
            given = dataclasses.replace(leaf, room=room, name=name)
            (averages if averaged else leaves)[path] = given
    return StateLayout(cfg, form, leaves, averages, jax.tree.map_with_path(lambda path, _: _path(path), _stored(shapes, form)))


def _placed(leaf: jax.ShapeDtypeStruct, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _axes(path: str, shape: tuple[int, ...], weights: Mapping[str, tuple[int, ...]], axes: Mapping[str, Axes]) -> Axes:
    """Logical axes of an array: those of the weight whose name is in its path, when it has that shape; else it is not cut."""
    parts = _without_number(path).split(".")
    inner = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(len(parts), i, -1))
    weight = next((name for name in inner if name in weights), None)
    if weight is None or weights[weight] != shape:
        return (WHOLE,) * len(shape)
    return axes[weight][1:] if axes[weight][0] == "layers" else axes[weight]


def _of_one_layer(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if stored_names(name, shape) == [name] else shape[1:]


def _without_number(name: str) -> str:
    return re.sub(r"\blayers\.\d+\.", "layers.", name)


def _stored(state: TrainState, form: StateForm) -> TrainState:
    """The part of a state that is written."""
    return dataclasses.replace(state, params={}) if form.lora.rank else state


def _leaves(state: TrainState, form: StateForm) -> dict[str, Any]:
    """The arrays that are written by their paths."""
    leaves = jax.tree.leaves_with_path(_stored(state, form))
    found = {_path(path): leaf for path, leaf in leaves}
    assert len(found) == len(leaves), "two arrays of a state have one name"
    return found


def _path(path: tuple[Any, ...]) -> str:
    """Fields, keys and places, as in "opt_state.1.mu.layers.0.q_proj"."""
    return ".".join(str(getattr(part, "name", getattr(part, "key", getattr(part, "idx", None)))) for part in path)
