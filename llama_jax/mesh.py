"""Which meshes a model can be spread over: sizes of the axes, what makes them illegal, and the nearest ones that are legal.

Imports no jax: the planner and the command lines check a mesh before any device is touched.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError

MESH_AXES = ("data", "fsdp", "tensor")
NEAREST = 3  # legal meshes named in an error


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; in what a user asks for, one of data, fsdp and tensor may be -1: what is left of the devices.

    Attributes:
        data: copies of the model in a slice (or a node), each with its own rows of the batch.
        fsdp: parts that weights and optimizer state are cut into along embed; rows are divided over it, too.
        tensor: parts of heads, MLP width and vocabulary; every device of them works on the same rows.
        dcn_data: slices of a TPU multi-slice, each a copy; on the mesh, data is dcn_data * data long.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = 1

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.tensor * self.dcn_data

    @property
    def batch_shards(self) -> int:
        """Groups of devices that work on different rows."""
        return self.data * self.fsdp * self.dcn_data

    def __str__(self) -> str:
        slices = f" dcn_data={self.dcn_data}" if self.dcn_data > 1 else ""
        return f"data={self.data} fsdp={self.fsdp} tensor={self.tensor}{slices}"


def cache_heads(num_kv_heads: int, tensor: int) -> int:
    """K', key/value heads in memory: K, or one copy of a head per device when there are more devices than heads."""
    return num_kv_heads if num_kv_heads % tensor == 0 else tensor


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """V', rows of the embedding in memory: the vocabulary rounded up to a multiple of the tensor axis."""
    return tensor * -(-vocab_size // tensor)


def why_illegal(cfg: ModelConfig, mesh: MeshShape, batch_size: int | None = None) -> str:
    """The reason a mesh (without -1) cannot hold a model; "" when it can.

    Args:
        batch_size: sequences of a training batch, which must divide; inference fills up its batches.
    """
    N, K, t = cfg.num_heads, cfg.num_kv_heads, mesh.tensor
    if cfg.embed_dim % mesh.fsdp:
        return f"embed_dim {cfg.embed_dim} is not divisible by fsdp={mesh.fsdp}"
    if N % t:
        return f"{N} heads are not divisible by tensor={t}"
    if K % t and t % K:
        return f"tensor={t} neither divides the {K} key/value heads nor is a multiple of them (which would give each a copy)"
    if cfg.mlp_dim % t:
        return f"mlp_dim {cfg.mlp_dim} is not divisible by tensor={t}"
    if batch_size is not None and batch_size % mesh.batch_shards:
        product = "dcn_data * data * fsdp" if mesh.dcn_data > 1 else "data * fsdp"
        return f"a batch of {batch_size} is not divisible by {product} = {mesh.batch_shards}"
    return ""


def legal_meshes(
    cfg: ModelConfig, num_devices: int, *, dcn_data: int = 1, batch_size: int | None = None
) -> Iterator[MeshShape]:
    """Every mesh of so many devices that can hold the model, the smallest tensor and data first."""
    inside, left_over = divmod(num_devices, dcn_data)
    if left_over:
        return
    for tensor in _divisors(inside):
        for data in _divisors(inside // tensor):
            mesh = MeshShape(data, inside // tensor // data, tensor, dcn_data)
            if not why_illegal(cfg, mesh, batch_size):
                yield mesh


def resolve_mesh(cfg: ModelConfig, wanted: MeshShape, num_devices: int, *, batch_size: int | None = None) -> MeshShape:
    """The mesh a user asked for, -1 replaced by what is left of the devices.

    tensor=-1 is the largest legal size; when that leaves devices over, they become copies (data).

    Raises:
        LlamaError: the sizes do not multiply to the devices, or the model cannot be spread so; with the nearest legal meshes.
    """
    sizes = dataclasses.asdict(wanted)
    if bad := {name: size for name, size in sizes.items() if size < 1 and (size != -1 or name == "dcn_data")}:
        name, size = next(iter(bad.items()))
        extra = "" if name == "dcn_data" else ", or -1 for what is left of the devices"
        raise LlamaError(ExitCode.BAD_MESH, f"mesh.{name} is {size}, expected 1 or more{extra}")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise LlamaError(
            ExitCode.BAD_MESH, f"mesh.{' and mesh.'.join(open_axes)} are both -1: only one can take what is left of the devices"
        )
    given = math.prod(size for size in sizes.values() if size > 0)
    left, remainder = divmod(num_devices, given)
    if remainder or (left != 1 and not open_axes):
        open_hint = f" times {open_axes[0]}=-1" if open_axes else ""
        product = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 0 and (size > 1 or name != "dcn_data"))
        _refuse(cfg, wanted, num_devices, batch_size, f"{product} is {given} devices{open_hint}, and there are {num_devices:,}")
    if open_axes == ["tensor"]:
        for tensor in reversed(_divisors(left)):
            mesh = dataclasses.replace(wanted, tensor=tensor, data=wanted.data * left // tensor)
            if not why_illegal(cfg, mesh, batch_size):
                return mesh
    mesh = dataclasses.replace(wanted, **{name: left for name in open_axes})
    if reason := why_illegal(cfg, mesh, batch_size):
        _refuse(cfg, mesh, num_devices, batch_size, reason)
    return mesh


def _refuse(cfg: ModelConfig, mesh: MeshShape, num_devices: int, batch_size: int | None, reason: str) -> None:
    legal = list(legal_meshes(cfg, num_devices, dcn_data=max(mesh.dcn_data, 1), batch_size=batch_size))
    if legal:
        nearest = sorted(legal, key=lambda other: _distance(mesh, other))[:NEAREST]
        advice = f"the nearest meshes of {num_devices:,} devices that can: {'; '.join(map(str, nearest))}"
    else:
        batch = "" if batch_size is None else f" with a batch of {batch_size}"
        advice = f"no mesh of {num_devices:,} devices{batch} can: change the number of devices" + (batch and " or the batch")
    raise LlamaError(ExitCode.BAD_MESH, f"this model cannot be spread over {mesh}: {reason}; {advice}")


def _distance(wanted: MeshShape, other: MeshShape) -> float:
    """How far apart two meshes are: doublings of each axis; an axis of -1 may be anything."""
    pairs = zip(dataclasses.astuple(wanted), dataclasses.astuple(other), strict=True)
    return sum(abs(math.log2(b / a)) for a, b in pairs if a > 0)


def _divisors(n: int) -> list[int]:
    small = [d for d in itertools.takewhile(lambda d: d * d <= n, itertools.count(1)) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
