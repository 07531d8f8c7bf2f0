"""What a plan looks like: a table for people, one JSON object for programs."""

import dataclasses
from typing import Any

from llama_jax.plan.chips import GIB, GPU_MEMORY_SHARE
from llama_jax.plan.rank import COST_ORDER, Change, Plan
from llama_jax.plan.request import PlanRequest

ROWS_SHOWN = 12
COLUMNS = (  # title, width
    ("data", 4), ("fsdp", 5), ("tensor", 7), ("weights", 9), ("optim.", 8), ("grads", 8), ("activ.", 8), ("cache", 8),
    ("total GiB", 10), ("HBM", 6), ("step ms", 11), ("tokens/s", 10), ("bound", 6),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything there is to say about a request.

    Attributes:
        plans: best first (rank.plans).
        largest_batch: sequences, on the best mesh; 0 when none fit.
        changes: what would make it fit; empty when something fits.
    """

    request: PlanRequest
    plans: list[Plan]
    largest_batch: int
    changes: list[Change]

    @property
    def best(self) -> Plan:
        return self.plans[0]


def as_text(report: Report) -> str:
    """Lines of at most 100 columns."""
    return "\n".join([*_header(report.request), "", *_table(report.plans), "", *_verdict(report)])


def as_json(report: Report) -> dict[str, Any]:
    """A JSON object; bytes and seconds as they are, in float or int."""
    request, chip = report.request, report.request.topology.chip
    return {
        "model": request.model,
        "parameters": request.config.num_params,
        "topology": {
            "name": request.topology.name,
            "num_devices": request.topology.num_devices,
            "slices": request.topology.slices,
            "chip": dataclasses.asdict(chip),
        },
        "task": request.task,
        "batch": request.batch,
        "length": request.length,
        "dtype": request.dtype,
        "quantize": request.quantize or None,
        "cache_dtype": None if request.trains else request.cache_dtype,
        "optimizer": request.optimizer if request.trains else None,
        "first_moment": request.first_moment if request.trains else None,
        "remat": request.remat if request.trains else None,
        "fits": report.best.fits,
        "missing_bytes": max(0, -report.best.spare_bytes),
        "largest_batch": report.largest_batch,
        "plans": [_plan_json(plan) for plan in report.plans],
        "changes": [{"change": change.text, "cost": change.cost, "plan": _plan_json(change.best)} for change in report.changes],
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    memory = dataclasses.asdict(plan.memory) | {"arguments": plan.memory.arguments, "total": plan.memory.total}
    return {
        "mesh": dataclasses.asdict(plan.mesh),
        "fits": plan.fits,
        "memory_bytes": memory,
        "spare_bytes": plan.spare_bytes,
        "timing": dataclasses.asdict(plan.timing),
    }


def _header(request: PlanRequest) -> list[str]:
    where, cfg = request.topology, request.config
    slices = f" in {where.slices} slices" if where.slices > 1 else ""
    settings = [request.dtype]
    if request.trains:
        moment = f" (first moment {request.first_moment})" if request.first_moment == "bfloat16" else ""
        settings += [f"float32 parameters, {request.optimizer}{moment}", f"remat {request.remat}"]
    else:
        settings += [f"{request.quantize} weights"] if request.quantize else []
        settings += [f"{request.cache_dtype} cache"] if request.cache_dtype != "auto" else []
    each = {"train": "x {} tokens", "decode": "with a cache of {} tokens each", "prefill": "x {} tokens"}[request.task]
    lines = [
        f"{request.model} ({cfg.num_params / 1e9:.2f} B parameters), {request.task} on {where.name}: "
        f"{where.num_devices:,} x {where.chip.hbm_bytes / GIB:.2f} GiB{slices}",
        f"batch {request.batch:,} {each.format(f'{request.length:,}')}, {', '.join(settings)}",
    ]
    if not where.chip.is_tpu:
        lines.append(f"memory: with XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_SHARE} (JAX takes 0.75 unless told)")
    return lines


def _table(plans: list[Plan]) -> list[str]:
    lines = ["".join(f"{title:>{width}}" for title, width in COLUMNS)]
    for plan in plans[:ROWS_SHOWN]:
        m, t, mesh = plan.memory, plan.timing, plan.mesh
        hbm = m.total + plan.spare_bytes
        cache = m.cache + m.new_cache
        sizes = [m.weights, m.optimizer, m.gradients, m.temporary - m.gradients - m.new_cache, cache]
        cells = [
            str(mesh.dcn_data * mesh.data), str(mesh.fsdp), str(mesh.tensor),
            *(_short(size / GIB, 7) if size else "-" for size in sizes),
            _short(m.total / GIB, 9), f"{m.total / hbm:.0%}" if plan.fits else "over",
            _short(t.step_seconds * 1e3, 10), _short(t.tokens_per_second, 9, digits=0), t.bound,
        ]  # fmt: skip
        lines.append("".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    if len(plans) > ROWS_SHOWN:
        lines.append(f"and {len(plans) - ROWS_SHOWN} more (--json has all)")
    return lines


def _short(number: float, width: int, digits: int = 2) -> str:
    """A number in at most so many columns: fewer digits, then millions."""
    written = (f"{number:,.{d}f}" for d in range(digits, -1, -1))
    return next((text for text in written if len(text) <= width), f"{number / 1e6:,.0f}M")


def _verdict(report: Report) -> list[str]:
    best, hbm = report.best, report.request.topology.chip.hbm_bytes
    if best.fits:
        return [
            f"best: {best.mesh}: {best.memory.total / GIB:.2f} of {hbm / GIB:.2f} GiB a device, predicted "
            f"{best.timing.step_seconds * 1e3:,.2f} ms a step",
            f"      {best.timing.tokens_per_second:,.0f} tokens/s, bound by {best.timing.bound}; "
            f"{best.timing.flops_share:.1%} of the peak FLOP/s",
            f"largest batch that fits on it: {report.largest_batch:,}",
        ]
    lines = [f"nothing fits: {best.mesh} misses {-best.spare_bytes / GIB:.2f} GiB a device"]
    if not report.changes:
        return [*lines, "and none of the changes tried, nor two of them, would do: take devices with more memory"]
    lines.append(f"the cheapest changes that fit, where a change costs, from cheap to dear:\n{COST_ORDER}")
    for change in report.changes:
        plan = change.best
        lines.append(f"  {change.text}: {plan.memory.total / GIB:.2f} of {hbm / GIB:.2f} GiB on {plan.mesh}")
    return lines
