"""The compiler's word: the real program of a plan, compiled by libtpu or the CUDA plugin, without the hardware."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape
from llama_jax.plan.chips import GIB
from llama_jax.plan.gpu_target import TARGETS
from llama_jax.plan.hlo import collectives
from llama_jax.plan.memory import plan_memory
from llama_jax.plan.request import PlanRequest
from llama_jax.plan.topology import Topology

# Read when libtpu is loaded: it must neither look for a TPU nor ask the metadata server, and others may have it loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class CompilerReport:
    """What the compiler says, per device, in bytes and seconds.

    Attributes:
        compiler: its name and version.
        argument_bytes: what goes in: parameters, optimizer state or cache, batch.
        alias_bytes: of these, what the results overwrite in place.
        peak_bytes: the most that is held at once, arguments included.
        predicted_argument_bytes, predicted_peak_bytes: the closed form's.
        collectives: how many of each the program has; one in a loop counts once.
    """

    compiler: str
    mesh: MeshShape
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    hbm_bytes: float
    predicted_argument_bytes: float
    predicted_peak_bytes: float
    collectives: dict[str, int]

    def __str__(self) -> str:
        lines = [
            f"Compiled for {self.mesh} by {self.compiler} in {self.compile_seconds:.1f} s "
            f"(traced in {self.lower_seconds:.1f} s), GiB per device:",
            f"  {'':<34}{'compiler':>10}{'closed form':>14}",
            _line("weights, optimizer, cache", self.argument_bytes, self.predicted_argument_bytes),
            _line("peak", self.peak_bytes, self.predicted_peak_bytes),
            f"  {'of HBM':<34}{self.hbm_bytes / GIB:>10.2f}",
            "  collectives in the program: "
            + (", ".join(f"{count} {name}" for name, count in self.collectives.items()) or "none"),
        ]
        return "\n".join(lines)


def compile_program(request: PlanRequest, mesh: MeshShape) -> CompilerReport:
    """Compiles the program of a plan on a mesh.

    Raises:
        LlamaError: no compiler for it is installed, or the compiler finds that it does not fit.
    """
    report, _ = compile_with_text(request, mesh)
    return report


def compile_with_text(request: PlanRequest, mesh: MeshShape) -> tuple[CompilerReport, str]:
    """The report, and the compiled program's text."""
    devices, compiler = compiler_devices(request.topology)
    import jax

    from llama_jax.plan.programs import lower_program
    from llama_jax.sharding import make_mesh

    start = time.monotonic()
    lowered = lower_program(request, mesh, make_mesh(mesh, devices))
    traced = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        _refuse_too_large(request, mesh, error)
    done = time.monotonic()
    found, text, predicted = compiled.memory_analysis(), compiled.as_text(), plan_memory(request, mesh)
    report = CompilerReport(
        compiler=compiler,
        mesh=mesh,
        lower_seconds=traced - start,
        compile_seconds=done - traced,
        argument_bytes=found.argument_size_in_bytes,
        alias_bytes=found.alias_size_in_bytes,
        temporary_bytes=found.temp_size_in_bytes,
        peak_bytes=found.peak_memory_in_bytes,
        hbm_bytes=request.topology.chip.hbm_bytes,
        predicted_argument_bytes=predicted.arguments,
        predicted_peak_bytes=predicted.total,
        collectives=collectives(text),
    )
    return report, text


def compiler_devices(topology: Topology) -> tuple[Sequence[Any], str]:
    """The devices of a topology that is not there, and the name and version of their compiler.

    Raises:
        LlamaError: the compiler is not installed, or has no such topology.
    """
    if not topology.chip.is_tpu:
        return _gpu_devices(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            "compiling for TPUs needs libtpu, which is not installed: pip install 'llama_jax[aot]', or, with the version that "
            "fits this jax, pip install 'jax[tpu]' (no TPU is needed)",
        )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, value in (ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": re.sub(r"^\d+x", "", topology.name)}).items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    target = {name: value for name, value in dataclasses.asdict(topology.target).items() if value is not None}
    described = topologies.get_topology_desc(platform="tpu", **target)
    return described.devices, f"libtpu {importlib.metadata.version('libtpu')}"


def _gpu_devices(topology: Topology) -> tuple[Sequence[Any], str]:
    if topology.chip.name not in TARGETS:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"--compile knows no compiler target for {topology.name}, only for TPUs and {', '.join(TARGETS)}; without it the "
            "plan is arithmetic",
        )
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            "compiling for GPUs needs jax's CUDA plugin, which is not installed: pip install --no-deps jax-cuda13-plugin "
            "jax-cuda13-pjrt, both in the version of jax (no GPU and no CUDA is needed)",
        )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    hosts = topology.num_devices // topology.devices_per_host
    described = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[topology.chip.name], topology=f"1x{hosts}x{topology.devices_per_host}"
    )
    return described.devices, f"jax-cuda13-plugin {importlib.metadata.version('jax-cuda13-plugin')}"


def _refuse_too_large(request: PlanRequest, mesh: MeshShape, error: Exception) -> None:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    said = f"it needs {used[1]} of {used[2]}" if used else text.split("\n")[0]
    raise LlamaError(
        ExitCode.DOES_NOT_FIT, f"the compiler finds that {request.model} on {mesh} does not fit: {said}; see the plan's changes"
    ) from None


def _line(name: str, compiler: float, closed_form: float) -> str:
    ratio = f"{closed_form / compiler - 1:+.0%}" if compiler else ""
    return f"  {name:<34}{compiler / GIB:>10.2f}{closed_form / GIB:>14.2f}  {ratio}"
