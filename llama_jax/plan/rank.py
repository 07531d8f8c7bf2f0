"""Every legal mesh with its memory and time, best first; the largest batch; and what to change when nothing fits."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape, legal_meshes
from llama_jax.plan.memory import Memory, plan_memory
from llama_jax.plan.request import REMAT, PlanRequest
from llama_jax.plan.timing import Timing, plan_timing
from llama_jax.plan.topology import next_larger

MAX_ROWS = 2**20  # sequences per device tried
MIN_LENGTH = 128
MAX_SLICES_TRIED = 12  # larger topologies tried
CHANGES_SHOWN = 3
FLAGS = ("remat", "dtype", "quantize", "cache_dtype", "first_moment", "optimizer", "batch", "length")  # that a change may set

# What a change costs, cheapest first: a step's time; digits; sequences per step; context; the recipe; more devices.
TIME, PRECISION, BATCH, LENGTH, RECIPE, HARDWARE = range(1, 7)
COST_ORDER = "time, precision, batch, length, optimizer, more devices"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request on a mesh.

    Attributes:
        spare_bytes: of HBM, per device; negative when it does not fit.
    """

    mesh: MeshShape
    memory: Memory
    timing: Timing
    spare_bytes: float

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


@dataclasses.dataclass(frozen=True)
class Change:
    """A request that fits where the one asked for does not.

    Attributes:
        text: what to change, as flags.
        cost: sum of the ranks of what it gives up (TIME ... HARDWARE).
        best: its best plan.
    """

    text: str
    cost: int
    request: PlanRequest
    best: Plan


def plans(request: PlanRequest) -> list[Plan]:
    """Those that fit first, by predicted step; then the others, by what they miss."""
    found = [plan_on(request, mesh) for mesh in meshes(request)]
    return sorted(found, key=lambda p: (not p.fits, p.timing.step_seconds if p.fits else -p.spare_bytes, p.memory.total))


def plan_on(request: PlanRequest, mesh: MeshShape) -> Plan:
    """Memory and time of a request on one mesh."""
    memory = plan_memory(request, mesh)
    return Plan(mesh, memory, plan_timing(request, mesh), request.topology.chip.hbm_bytes - memory.total)


def meshes(request: PlanRequest) -> list[MeshShape]:
    """The mesh asked for, or all that are legal.

    Raises:
        LlamaError: there is none.
    """
    if found := _legal(request):
        return found
    where = request.topology
    raise LlamaError(
        ExitCode.BAD_MESH,
        f"no mesh of {where.name} ({where.num_devices:,} devices) can train {request.model} with a batch of {request.batch}: "
        f"a multiple of {where.slices} that shares factors with {where.num_devices:,} would do",
    )


def largest_batch(request: PlanRequest, mesh: MeshShape) -> int:
    """The most sequences that fit on a mesh, a multiple of what divides the batch; 0 when not even one per group does."""

    def fits(rows: int) -> bool:
        filled = dataclasses.replace(request, batch=rows * mesh.batch_shards)
        return plan_memory(filled, mesh).total <= request.topology.chip.hbm_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MAX_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * mesh.batch_shards


def cheapest_changes(request: PlanRequest) -> list[Change]:
    """The three cheapest changes, single or two at once, with which something fits.

    Of a change with degrees (half the batch, a quarter) the mildest that fits counts. Two at once only where neither is enough
    alone.
    """
    kinds = _kinds(request)
    found, enough = [], set()
    for count in (1, 2):
        for chosen in itertools.combinations(range(len(kinds)), count):
            if enough.isdisjoint(chosen) and (change := _mildest(request, [kinds[i] for i in chosen])):
                found.append(change)
                if count == 1:
                    enough.update(chosen)
    return sorted(found, key=lambda change: change.cost)[:CHANGES_SHOWN]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of change: its cost, and how its degrees change a request, mildest first."""

    cost: int
    degrees: list[Callable[[PlanRequest], PlanRequest]]


def _kinds(request: PlanRequest) -> list[_Kind]:
    def degree(**changes) -> Callable[[PlanRequest], PlanRequest]:
        return lambda request: dataclasses.replace(request, **changes)

    kinds = []
    if request.trains:
        stronger = REMAT[REMAT.index(request.remat) + 1 :]
        kinds.append(_Kind(TIME, [degree(remat=policy) for policy in stronger]))
        if request.optimizer != "sgd" and request.first_moment == "float32":
            kinds.append(_Kind(PRECISION, [degree(first_moment="bfloat16")]))
        if request.optimizer == "adamw":
            kinds.append(_Kind(RECIPE, [degree(optimizer="lion")]))
    else:
        if not request.quantize:
            kinds.append(_Kind(PRECISION, [degree(quantize="int8")]))
        if request.cache_dtype != "int8":
            kinds.append(_Kind(PRECISION, [degree(cache_dtype="int8")]))
    if request.dtype == "float32":
        kinds.append(_Kind(PRECISION, [degree(dtype="bfloat16")]))
    kinds.append(_Kind(BATCH, [degree(batch=n) for n in _halves(request.batch, 1)]))
    kinds.append(_Kind(LENGTH, [degree(length=n) for n in _halves(request.length, MIN_LENGTH)]))
    kinds.append(_Kind(HARDWARE, list(_larger(request))))
    return kinds


def _larger(request: PlanRequest) -> Iterator[Callable[[PlanRequest], PlanRequest]]:
    """More devices of the same kind; a training batch grows with them, and a mesh asked for no longer counts."""
    for topology in next_larger(request.topology)[:MAX_SLICES_TRIED]:

        def change(request: PlanRequest, topology=topology) -> PlanRequest:
            more = topology.num_devices // request.topology.num_devices if request.trains else 1
            return dataclasses.replace(request, topology=topology, batch=request.batch * max(more, 1), mesh=None)

        yield change


def _mildest(request: PlanRequest, kinds: list[_Kind]) -> Change | None:
    for degrees in itertools.product(*(kind.degrees for kind in kinds)):
        changed = request
        for change in degrees:
            changed = change(changed)
        if _fits_somewhere(changed):
            return Change(_flags(request, changed), sum(kind.cost for kind in kinds), changed, plans(changed)[0])
    return None


def _flags(before: PlanRequest, after: PlanRequest) -> str:
    """The flags that turn one request into the other."""
    named = {field: getattr(after, field) for field in FLAGS if getattr(after, field) != getattr(before, field)}
    if after.topology != before.topology:
        named = {"topology": after.topology.name} | named
    return " ".join(f"--{field} {value}" for field, value in named.items())


def _fits_somewhere(request: PlanRequest) -> bool:
    return any(plan_memory(request, mesh).total <= request.topology.chip.hbm_bytes for mesh in _legal(request))


def _legal(request: PlanRequest) -> list[MeshShape]:
    where, batch = request.topology, request.batch if request.trains else None
    if request.mesh is not None:
        return [] if batch is not None and batch % request.mesh.batch_shards else [request.mesh]
    return list(legal_meshes(request.config, where.num_devices, dcn_data=where.slices, batch_size=batch))


def _halves(number: int, least: int) -> list[int]:
    """number/2, number/4, ... down to the least."""
    return [number >> i for i in range(1, number.bit_length()) if number >> i >= least]
