"""The one table from logical axis to mesh axis.

Every parameter, cache and batch array names its axes; where an axis lies on the mesh `("data", "fsdp", "tensor")` is decided
here and nowhere else. The checkpoint cuts its chunks along the same axes, so that a device reads little more than its part.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MESH_AXES, MeshShape

RULES: dict[str, str | tuple[str, ...] | None] = {  # None: whole on every device
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # weights are gathered layer by layer
    "heads": "tensor",
    "kv_heads": "tensor",  # whole where there are more devices than heads: every device then holds a copy of its one
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "norm": None,
    "length": None,
    "residual_length": "tensor",  # between layers every device keeps its part of the sequence; whole where it does not divide
    "cache_length": None,
    "act_embed": None,  # embed of activations and of gathered weights
    "layers": None,
    "lora_rank": None,
    "group": None,  # of a quantised weight's scales
    "fused": None,  # weights that lie in one array (llama_jax.model.fused)
}
WIDE_FSDP = 32
MAY_BE_WHOLE = ("kv_heads", "residual_length")


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "tensor") over devices (all, unless given), neighbours on tensor nearest on the wire.

    With dcn_data > 1 the data axis is dcn_data * data long and crosses slices only along its first part.

    Raises:
        LlamaError: dcn_data is not the number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and slices != shape.dcn_data:
        raise LlamaError(
            ExitCode.BAD_MESH, f"these devices are {slices} slices, and mesh.dcn_data is {shape.dcn_data}: it must be {slices}"
        )
    inside = (shape.data, shape.fsdp, shape.tensor)
    total = (shape.dcn_data * shape.data, shape.fsdp, shape.tensor)
    if 1 < shape.dcn_data == slices:
        dcn = (shape.dcn_data, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(inside, dcn, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:  # one after the other: consecutive devices share a host
        array = np.array(devices).reshape(total)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes carry these logical names.

    Raises:
        ValueError: a name has no row in RULES, or two axes would lie on the same axis of the mesh.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown} in {names}; known: {sorted(RULES)}. Add a row to RULES.")
    axes = [None if name is None else RULES[name] for name in names]
    used = [axis for entry in axes if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)]
    if twice := sorted({axis for axis in used if used.count(axis) > 1}):
        raise ValueError(f"{names} puts two axes of one array on mesh axis {twice[0]!r}: rename one of them")
    return PartitionSpec(*axes)


def sharding(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Where an array with these logical axes and this shape lies."""
    return NamedSharding(mesh, _fitted(spec(*names), names, shape, mesh.shape["tensor"]))


def tree_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Where every array of a tree lies, from the trees of its logical axes and of its shapes."""
    return jax.tree.map(lambda leaf, names: sharding(mesh, names, leaf.shape), shapes, axes)


def constrain(x: Array, *names: str | None) -> Array:
    """Tells the partitioner where x lies; nothing without a mesh (jax.set_mesh)."""
    if not is_partitioned():
        return x
    return jax.lax.with_sharding_constraint(x, _fitted(spec(*names), names, x.shape, mesh_axis_size("tensor")))


def per_device(f: Callable, inputs: Sequence[Sequence[str]], outputs: Any) -> Callable:
    """f run by every device on its own part of the arrays, for what the partitioner would take apart wrongly.

    Args:
        f: a function of arrays; the mesh must divide their axes.
        inputs: logical axes of each argument (None arguments have no part in it).
        outputs: logical axes of the result, or a tuple of them per result.
    """
    if not is_partitioned():
        return f

    def place(names: Any) -> Any:
        return spec(*names) if all(isinstance(name, str) for name in names) else tuple(map(place, names))

    def run(*args: Array | None) -> Any:
        specs = tuple(None if arg is None else place(names) for arg, names in zip(args, inputs, strict=True))
        return jax.shard_map(f, in_specs=specs, out_specs=place(outputs), check_vma=False)(*args)

    return run


def sum_and_scatter(gradient: Array, axis: int) -> Array:
    """Inside per_device: the sum of every device's gradient of a weight, each device keeping its part of embed.

    Args:
        gradient: whole along `axis`, the weight's embed.
    """

    scatter = functools.partial(jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=axis, tiled=True)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape["fsdp"] == mesh.size:  # XLA:TPU would make this a sum of whole gradients; see fsdp_is_wide
        twice = functools.partial(scatter_twice, axis=axis)
        gradient = jax.lax.platform_dependent(gradient, tpu=twice, default=scatter)
    else:
        gradient = scatter(gradient)
    return jax.lax.psum(gradient, "data")


def scatter_twice(gradient: Array, axis: int) -> Array:
    """The sum over fsdp, scattered over groups of devices, and what they got over groups across those."""
    size = mesh_axis_size("fsdp")
    parts = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    rest = size // parts
    first = [[i + rest * j for j in range(parts)] for i in range(rest)]
    second = [[i + rest * j for i in range(rest)] for j in range(parts)]
    for groups in (first, second):
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=groups)
    return gradient


def fsdp_is_wide() -> bool:
    """Whether fsdp is the whole mesh, and more devices than XLA:TPU forms a reduce-scatter over by itself.

    Over all devices of a mesh, up to 32, it pipelines one with the product; over groups of a mesh it makes a real one. Over all
    of 64 and more it sums whole gradients on every device and cuts them after, twice the bytes (libtpu 0.0.42): there the
    gradient is scattered in two steps, over groups.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] == mesh.size > WIDE_FSDP


def is_partitioned() -> bool:
    """Whether the program is traced for several devices (jax.set_mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def mesh_axis_size(name: str) -> int:
    """Size of an axis of the mesh that the program is traced for; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]


def num_parts(name: str) -> int:
    """Into how many parts the mesh that the program is traced for cuts a logical axis."""
    axes = RULES[name]
    return 1 if axes is None else math.prod(map(mesh_axis_size, (axes,) if isinstance(axes, str) else axes))


def _fitted(spec: PartitionSpec, names: Sequence[str | None], shape: Sequence[int], tensor: int) -> PartitionSpec:
    """Key/value heads fewer than devices, and sequences too short, are whole on each; all else was checked with the mesh."""
    assert len(names) == len(shape), (names, shape)
    pairs = zip(spec, names, shape, strict=True)
    return PartitionSpec(*(None if name in MAY_BE_WHOLE and size % tensor else axis for axis, name, size in pairs))
