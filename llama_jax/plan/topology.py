"""Names of what one can rent -> chips, how many, and how they are wired.

    v5e-16 (or v5litepod-16), v6e-256     N chips, a device each
    v4-128, v5p-128                       N TensorCores: 64 chips, 64 devices
    v7x-128 (or tpu7x-128)                N TensorCores: 64 chips, 128 devices
    2xv5e-256                             two slices, joined by the data-centre network
    h200, h200-8, h100-8x4                one GPU, a node of 8, four nodes of 8; also a100-40, a100-80, b200, l4, t4

Shapes of slices: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, and for those that are cubes the rule of
cloud.google.com/tpu/docs/types-topologies: A <= B <= C, all multiples of 4, as like a cube as the number allows. The arguments
of ahead-of-time compilation agree with AI-Hypercomputer/maxtext, src/maxtext/utils/accelerator_to_spec_map.py.
"""

import dataclasses
import difflib
import math
import re

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.plan.chips import CHIPS, Chip

FLAT_SHAPES = {n: (a, b) for a, b in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)) for n in (a * b,)}
SMALL_SHAPES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}  # chips; of the families with cubes
CUBE = 64  # chips, 4x4x4; optical switches join the faces of whole cubes, so only they have rings (scaling-book, tpus.md)
RING = 16  # side of a full v5e or v6e pod, the length at which a side closes into a ring (scaling-book, tpus.md)
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Family:
    """TPU slices of one generation.

    Attributes:
        chip: key of CHIPS.
        per_chip: what the number in a name counts, per chip: 2 where it counts TensorCores.
        libtpu: the generation's name in libtpu's topology names.
        config: libtpu's chip_config_name; "megacore": a chip's two TensorCores are one device.
        max_chips: of the largest slice.
        has_cubes: wired in three dimensions; otherwise in two.
    """

    chip: str
    per_chip: int
    libtpu: str
    config: str
    max_chips: int
    has_cubes: bool


FAMILIES = {
    "v4": Family("v4", 2, "v4", "megacore", 4096, True),
    "v5e": Family("v5e", 1, "v5e", "default", 256, False),
    "v5p": Family("v5p", 2, "v5", "megacore", 6144, True),
    "v6e": Family("v6e", 1, "v6e", "default", 256, False),
    "v7x": Family("v7x", 2, "tpu7x", "default", 9216, True),
}
ALIASES = {"v5litepod": "v5e", "tpu7x": "v7x", "v5lite": "v5e"}
GPUS = [name for name, chip in CHIPS.items() if not chip.is_tpu]


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """Arguments of jax.experimental.topologies.get_topology_desc(platform="tpu", ...)."""

    topology_name: str
    chip_config_name: str
    chips_per_host_bounds: tuple[int, int, int]
    num_slices: int
    wrap: tuple[bool, bool, bool]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and their wires.

    Attributes:
        name: canonical.
        chip: every device's.
        num_devices: JAX devices in all.
        devices_per_host: of one process.
        slices: TPU slices joined by the data-centre network; 1 for GPUs, whose nodes a mesh axis may cross.
        torus: chips along each dimension of a slice; () for GPUs.
        wrap: whether a dimension is a ring.
        target: for ahead-of-time compilation; None for GPUs.
    """

    name: str
    chip: Chip
    num_devices: int
    devices_per_host: int
    slices: int = 1
    torus: tuple[int, ...] = ()
    wrap: tuple[bool, ...] = ()
    target: CompileTarget | None = None


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
        LlamaError: no such family, or the family has no such size; with those that exist.
    """
    text = name.strip().lower()
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", text):
        slices, family, size = match.groups()
        family = ALIASES.get(family, family)
        if family in FAMILIES:
            return _tpu(name, family, int(size), 1 if slices is None else int(slices))
    if match := re.fullmatch(rf"({'|'.join(GPUS)})(?:-(\d+)(?:x(\d+))?)?", text):
        gpu, size, nodes = match.groups()
        return _gpu(name, gpu, int(size or 1), int(nodes or 1))
    raise LlamaError(
        ExitCode.UNKNOWN_TOPOLOGY,
        f"unknown topology {name!r}; known: TPU slices {', '.join(f'{f}-N' for f in FAMILIES)} (two of them: 2xv5e-256), GPUs "
        f"{', '.join(GPUS)}, also -N for N in a node and -NxM for M nodes; {_nearest(text)}",
    )


def slice_sizes(family: str) -> list[int]:
    """The numbers N for which FAMILY-N exists, ascending."""
    facts = FAMILIES[family]
    if not facts.has_cubes:
        return sorted(FLAT_SHAPES)
    single = [1] if family == "v7x" else []
    chips = [*single, *SMALL_SHAPES, *range(CUBE, facts.max_chips + 1, CUBE)]
    return [facts.per_chip * count for count in chips]


def next_larger(topology: Topology) -> list[Topology]:
    """Topologies of the same chip with more devices, the smallest first: larger slices, or nodes of 8 GPUs, up to 64."""
    if topology.chip.is_tpu:
        names = (f"{topology.chip.name}-{size}" for size in slice_sizes(topology.chip.name))
        prefix = f"{topology.slices}x" if topology.slices > 1 else ""
        candidates = [parse_topology(prefix + name) for name in names]
    else:
        counts = [f"-{n}" for n in (2, 4, 8)] + [f"-{GPUS_PER_NODE}x{nodes}" for nodes in (2, 4, 8, 16, 32, 64)]
        candidates = [parse_topology(topology.chip.name + count) for count in counts]
    return [candidate for candidate in candidates if candidate.num_devices > topology.num_devices]


def cube_shape(chips: int) -> tuple[int, int, int]:
    """Sides of a slice of whole cubes: multiples of 4 with this product, as like a cube as there are."""
    cubes = chips // CUBE
    sides = (
        (a, b, cubes // a // b)
        for a in range(1, math.isqrt(cubes) + 1)
        if cubes % a == 0
        for b in range(a, math.isqrt(cubes // a) + 1)
        if (cubes // a) % b == 0
    )
    a, b, c = min(sides, key=sum)
    return 4 * a, 4 * b, 4 * c


def _tpu(name: str, family: str, size: int, slices: int) -> Topology:
    facts, sizes = FAMILIES[family], slice_sizes(family)
    if size not in sizes:
        near = sorted(sizes, key=lambda other: (abs(math.log(other / max(size, 1))), other))[:2]
        counted = "TensorCores" if facts.per_chip == 2 else "chips"
        raise LlamaError(
            ExitCode.UNKNOWN_TOPOLOGY,
            f"{name!r}: no {family} slice has {size:,} {counted}; there are {_listed(facts, sizes)}; the nearest are "
            f"{' and '.join(f'{family}-{other}' for other in sorted(near))}",
        )
    if slices < 1:
        raise LlamaError(ExitCode.UNKNOWN_TOPOLOGY, f"{name!r} has {slices} slices, expected 1 or more")
    chips, chip = size // facts.per_chip, CHIPS[facts.chip]
    if facts.has_cubes:
        shape = (1, 1, 1) if chips == 1 else SMALL_SHAPES[chips] if chips in SMALL_SHAPES else cube_shape(chips)
        wrap = (chips >= CUBE,) * 3
    else:
        shape = FLAT_SHAPES[chips]
        wrap = tuple(side == RING for side in shape)
    bounds = (1, 1, 1) if chips == 1 else (2, 2, 1)
    target = CompileTarget(
        topology_name=f"{facts.libtpu}:{'x'.join(map(str, shape))}",
        chip_config_name=facts.config,
        chips_per_host_bounds=bounds,
        num_slices=slices,
        wrap=(*wrap, False)[:3],
    )
    return Topology(
        name=f"{f'{slices}x' if slices > 1 else ''}{family}-{size}",
        chip=chip,
        num_devices=slices * chips * chip.devices_per_chip,
        devices_per_host=math.prod(bounds) * chip.devices_per_chip,
        slices=slices,
        torus=shape,
        wrap=wrap,
        target=target,
    )


def _gpu(name: str, gpu: str, size: int, nodes: int) -> Topology:
    if not 1 <= size <= GPUS_PER_NODE:
        raise LlamaError(
            ExitCode.UNKNOWN_TOPOLOGY,
            f"{name!r} has {size} GPUs in a node, expected 1 to {GPUS_PER_NODE}; several nodes are {gpu}-8x2",
        )
    if nodes < 1:
        raise LlamaError(ExitCode.UNKNOWN_TOPOLOGY, f"{name!r} has {nodes} nodes, expected 1 or more")
    canonical = gpu if size == nodes == 1 else f"{gpu}-{size}" + (f"x{nodes}" if nodes > 1 else "")
    return Topology(canonical, CHIPS[gpu], size * nodes, size)


def _listed(facts: Family, sizes: list[int]) -> str:
    if not facts.has_cubes:
        return ", ".join(map(str, sizes))
    cube = facts.per_chip * CUBE
    return f"{', '.join(str(size) for size in sizes if size < cube)} and every multiple of {cube} up to {sizes[-1]:,}"


def _nearest(text: str) -> str:
    names = [f"{family}-{size}" for family in FAMILIES for size in slice_sizes(family)[:12]]
    names += [gpu + size for gpu in GPUS for size in ("", "-2", "-4", "-8", "-8x2")]
    return f"the nearest is {difflib.get_close_matches(text, names, 1, 0)[0]}"
