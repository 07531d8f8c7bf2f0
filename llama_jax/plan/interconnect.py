"""How fast arrays move along a mesh axis.

Collectives of V bytes (the whole array) over n devices: all-gather and reduce-scatter V (n-1)/n / W, all-reduce twice that,
with W the one-way bandwidth of all the wires an axis has; never less than one hop's latency for each hop (jax-ml/scaling-book,
sharding.md and gpus.md). An axis has two wires along a ring of the torus, and one along a side that is no ring or only part of
a side. Axes are laid on the torus as jax.experimental.mesh_utils does it: tensor first, on as many whole sides as fit.
"""

import dataclasses
import itertools
import math

from llama_jax.mesh import MeshShape
from llama_jax.plan.topology import Topology

HOP_SECONDS = 1e-6  # a hop over ICI (scaling-book, sharding.md); assumed of NVLink, too
CHIPLET_LINKS = 6  # the wire between the two devices of a v7x chip, in ICI links (Google's TPU7x page, as quoted by others)


@dataclasses.dataclass(frozen=True)
class Wire:
    """What one mesh axis moves arrays over.

    Attributes:
        size: devices along it.
        seconds_per_byte: of the whole array, for an all-gather.
        hops: of the longest way.
        network: whether it leaves the slice or node.
    """

    size: int
    seconds_per_byte: float
    hops: float
    network: bool = False

    def gather_seconds(self, nbytes: float) -> float:
        """An all-gather to, or a reduce-scatter of, an array of so many bytes."""
        return 0.0 if self.size == 1 else max(self.hops * HOP_SECONDS, nbytes * self.seconds_per_byte)

    def reduce_seconds(self, nbytes: float) -> float:
        """An all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather_seconds(nbytes)


def wires(topology: Topology, mesh: MeshShape) -> dict[str, Wire]:
    """The wires of each axis of a mesh: data (inside a slice), fsdp, tensor and dcn_data."""
    inside = _torus_wires(topology, mesh) if topology.chip.is_tpu else _node_wires(topology, mesh)
    slices = mesh.dcn_data
    network = _share(slices) / topology.chip.network_bandwidth
    return inside | {"dcn_data": Wire(slices, network, 1, network=True)}


def _share(n: int) -> float:
    """The part of an array that a device lacks."""
    return (n - 1) / n


def _node_wires(topology: Topology, mesh: MeshShape) -> dict[str, Wire]:
    """GPUs: devices are numbered along tensor, then fsdp, then data; consecutive ones share a node."""
    found, stride, chip = {}, 1, topology.chip
    for axis, size in (("tensor", mesh.tensor), ("fsdp", mesh.fsdp), ("data", mesh.data)):
        near = math.gcd(size, max(1, topology.devices_per_host // stride))
        far = size // near
        seconds = _share(near) / chip.link_bandwidth
        if far > 1:  # each of the near devices brings its part of what other nodes hold through its own port
            seconds = max(seconds, _share(far) / (near * chip.network_bandwidth))
        found[axis] = Wire(size, seconds, math.log2(size), network=far > 1)
        stride *= size
    return found


def _torus_wires(topology: Topology, mesh: MeshShape) -> dict[str, Wire]:
    """TPUs: pieces of the torus's sides go to tensor, then fsdp, then data."""
    link = topology.chip.link_bandwidth
    sides = [(side, ring, link) for side, ring in zip(topology.torus, topology.wrap, strict=True)]
    between = 2 * link * CHIPLET_LINKS  # bytes/s; link is a device's half of an ICI link
    if topology.chip.devices_per_chip == 2:
        sides.insert(0, (2, False, between))
    found = {}
    for axis, size in (("tensor", mesh.tensor), ("fsdp", mesh.fsdp), ("data", mesh.data)):
        pieces, sides = _take(sides, size)
        hops = sum(side / 2 if ring else side - 1 for side, ring, _ in pieces)
        whole_chips = any(rate == between for _, _, rate in pieces)  # the group has both devices of its chips
        links = sum(rate * (2 if ring else 1) for _, ring, rate in pieces if rate == link) * (2 if whole_chips else 1)
        seconds = _share(size // (2 if whole_chips else 1)) / links if links else 0.0
        found[axis] = Wire(size, max(seconds, _share(2) / between if whole_chips else 0.0), hops)
    return found


Side = tuple[int, bool, float]  # devices along it, whether it is a ring, bytes/s of one wire


def _take(sides: list[Side], size: int) -> tuple[list[Side], list[Side]]:
    """Sides whose product is the size, as many as there are; otherwise parts of sides. Returns them and what is left."""
    sides = [side for side in sides if side[0] > 1]
    if size == 1:
        return [], sides
    for count in range(len(sides), 0, -1):
        for chosen in itertools.combinations(range(len(sides)), count):
            if math.prod(sides[i][0] for i in chosen) == size:
                return [sides[i] for i in chosen], [side for i, side in enumerate(sides) if i not in chosen]
    pieces, left = [], []
    for side, ring, rate in sorted(sides, key=lambda side: -side[2]):
        part = math.gcd(size, side)
        size //= part
        if part > 1:
            pieces.append((part, ring and part == side, rate))
        if part < side:
            left.append((side // part, False, rate) if part > 1 else (side, ring, rate))
    return pieces, left
