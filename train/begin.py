"""What is said and written when a run begins: a table on stderr, WORKDIR/run.json."""

import importlib.metadata
import json
import math
import platform
import subprocess
import time
from pathlib import Path

import jax

from llama_jax import distributed
from llama_jax.errors import LlamaError
from llama_jax.mesh import MESH_AXES, MeshShape
from llama_jax.plan.memory import plan_memory
from llama_jax.plan.request import OPTIMIZERS, PlanRequest
from llama_jax.plan.timing import plan_timing
from llama_jax.plan.topology import parse_topology
from llama_jax.training.state import trained
from train.flops import chip_of
from train.setup import Run

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections")
ROOT = Path(__file__).resolve().parents[1]


def describe(run: Run) -> str:
    """Parameters, mesh, memory, data, steps, time: what one wants to see before hours are spent."""
    recipe, stats = run.recipe, run.dataset.statistics
    trains = sum(leaf.size for leaf in jax.tree.leaves(trained(run.form, run.state.params, run.state.adapter)))
    held = sum(_bytes_here(leaf) for leaf in jax.tree.leaves(run.state))
    tokens = recipe.run.batch_size * recipe.run.length
    device = jax.local_devices()[0]
    lines = {
        "parameters": f"{run.cfg.num_params:,}" + (f", of which {trains:,} train" if trains != run.cfg.num_params else ""),
        "start": recipe.init_from or "random parameters",
        "devices": f"{run.mesh.size} x {device.device_kind} ({jax.process_count()} processes), {_shape(run)}",
        "layers": "scanned" if run.form.scan else "unrolled",
        "state": f"{held / 2**30:.3f} GiB on the first device",
        "data": (
            f"{stats.documents:,} documents, {stats.tokens:,} tokens ({stats.learnt_tokens:,} learnt), "
            f"{len(run.dataset):,} rows, padding {stats.padding_share:.2%}, {stats.skipped:,} records skipped"
        ),
        "step": f"{recipe.run.batch_size:,} rows x {recipe.run.length:,} = {tokens:,} tokens",
        "steps": f"{run.steps:,} ({run.steps * recipe.run.batch_size / max(len(run.dataset), 1):.2f} epochs)",
    }
    if run.first_step:
        lines["steps"] += f", {run.first_step:,} done: going on"
    lines |= _planned(run)
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def record(run: Run) -> None:
    """Adds this start to WORKDIR/run.json: config, command's versions, git revision, devices."""
    if not distributed.is_main():
        return
    file = run.workdir / "run.json"
    starts = json.loads(file.read_text())["starts"] if file.exists() else []
    device = jax.local_devices()[0]
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": run.first_step,
        "config": run.recipe.values,
        "git": _revision(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "mesh": dict(run.mesh.shape),
        "data": dict(vars(run.dataset.statistics)),
    }
    file.write_text(json.dumps({"starts": [*starts, start]}, indent=1, default=str) + "\n")


def _planned(run: Run) -> dict[str, str]:
    """The planner's word, for devices and settings that it knows."""
    recipe, chip = run.recipe, chip_of(jax.local_devices()[0])
    known = recipe.optimizer.name in OPTIMIZERS and not recipe.lora.rank and run.step_config.accumulate == 1
    if chip is None or not known or run.step_config.remat == "offload":
        return {}
    cores = run.mesh.size
    try:
        topology = parse_topology(f"{chip.name}-{cores}")
    except LlamaError:  # a part of a slice, say
        return {}
    request = PlanRequest(
        model="",
        config=run.cfg,
        topology=topology,
        task="train",
        batch=recipe.run.batch_size,
        length=recipe.run.length,
        dtype=run.step_config.dtype,
        optimizer=recipe.optimizer.name,
        first_moment=recipe.optimizer.moment_dtype,
        remat=run.step_config.remat,
    )
    mesh = MeshShape(**{name: run.mesh.shape[name] for name in MESH_AXES})
    memory, timing = plan_memory(request, mesh), plan_timing(request, mesh)
    left = math.ceil((run.steps - run.first_step) * timing.step_seconds / 60)
    return {
        "memory": f"{memory.total / 2**30:.2f} of {chip.hbm_bytes / 2**30:.2f} GiB a device, by closed form",
        "time": f"{timing.step_seconds * 1e3:,.0f} ms a step predicted, {left // 60} h {left % 60:02} min in all",
    }


def _bytes_here(leaf: jax.Array) -> int:
    return leaf.addressable_shards[0].data.nbytes


def _shape(run: Run) -> str:
    return " ".join(f"{name}={size}" for name, size in run.mesh.shape.items())


def _revision() -> str:
    """The checkout's commit, with "+" when it was changed since; "" outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
