"""The planner's closed form against the compiler, and the documents that say so.

    python benchmarks/plan.py --compile [WORDS]   compiles the points that benchmarks/plan.json lacks (whose name has all words)
    python benchmarks/plan.py                     writes docs/plan.md's table and plot, and docs/tpu.md

A point is compiled once per version of its compiler, and stored as soon as it is done; --again compiles it anew. TPUs need
libtpu, the H200 jax's CUDA plugin, and neither needs the hardware (llama_jax.plan.compile).
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from llama_jax.plan.__main__ import make_report
from llama_jax.plan.chips import GIB
from llama_jax.plan.compile import CompilerReport
from llama_jax.plan.memory import Memory, plan_memory
from llama_jax.plan.rank import plans
from llama_jax.plan.report import as_text
from llama_jax.plan.request import PlanRequest, make_request

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "plan.json"
PLAN, TPU, PLOT = (ROOT / "docs" / name for name in ("plan.md", "tpu.md", "plan.svg"))


@dataclasses.dataclass(frozen=True)
class Point:
    """A program to compile: make_request's arguments."""

    model: str
    topology: str
    task: str
    batch: int
    length: int
    mesh: dict[str, int]
    settings: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        settings = "".join(f" {key}={value}" for key, value in self.settings.items())
        return f"{self.model} {self.topology} {self.task} {self.batch}x{self.length} {mesh}{settings}"

    def request(self) -> PlanRequest:
        given = dict(batch=self.batch, length=self.length, **self.settings)
        return make_request(self.model, self.topology, self.task, mesh=self.mesh, **given)


KEPT = ("argument_bytes", "alias_bytes", "temporary_bytes", "peak_bytes", "hbm_bytes", "collectives")  # of CompilerReport
PROJECTIONS, INT8 = {"remat": "projections"}, {"quantize": "int8"}
POINTS = (
    Point("llama2_70b", "v5p-128", "train", 16, 4096, {"fsdp": 16, "tensor": 4}),
    Point("llama2_70b", "v5p-128", "train", 128, 4096, {"fsdp": 64}),
    Point("llama2_70b", "v6e-256", "train", 256, 4096, {"fsdp": 256}),
    Point("llama2_70b", "v5e-256", "train", 128, 4096, {"fsdp": 128, "tensor": 2}),
    Point("llama3_1_405b", "v5p-1024", "train", 64, 4096, {"fsdp": 64, "tensor": 8}),
    Point("llama2_7b", "v5e-16", "train", 64, 4096, {"fsdp": 16}),
    Point("llama2_7b", "v6e-8", "train", 8, 4096, {"fsdp": 8}, PROJECTIONS),
    Point("llama2_13b", "v5e-64", "train", 64, 4096, {"fsdp": 32, "tensor": 2}),
    Point("llama2_13b", "v4-64", "train", 32, 4096, {"fsdp": 32}, {"optimizer": "lion"}),
    Point("llama3_8b", "v5p-16", "train", 8, 8192, {"fsdp": 8}),
    Point("llama3_8b", "v6e-16", "train", 16, 4096, {"fsdp": 4, "tensor": 4}, PROJECTIONS),
    Point("llama2_7b", "2xv5e-16", "train", 64, 2048, {"fsdp": 16, "dcn_data": 2}),
    Point("llama2_7b", "v5p-16", "train", 8, 2048, {"fsdp": 8}, {"remat": "none"}),
    Point("llama3_2_1b", "h200", "train", 4, 4096, {"fsdp": 1}),
    Point("llama2_7b", "h200-8", "train", 8, 4096, {"fsdp": 8}),
    Point("llama3_8b", "h200-8", "train", 16, 2048, {"fsdp": 8}),
    Point("llama2_13b", "h200-8", "train", 16, 2048, {"fsdp": 4, "tensor": 2}, PROJECTIONS),
    Point("llama2_7b", "v5e-8", "decode", 64, 2048, {"tensor": 8}),
    Point("llama2_70b", "v5e-16", "decode", 8, 2048, {"tensor": 16}, INT8),
    Point("llama2_70b", "v5p-16", "decode", 8, 2048, {"tensor": 8}),
    Point("llama2_70b", "v6e-8", "decode", 8, 2048, {"fsdp": 2, "tensor": 4}, INT8),
    Point("llama3_8b", "v6e-4", "decode", 32, 8192, {"tensor": 4}),
    Point("llama2_13b", "v7x-8", "decode", 16, 4096, {"data": 2, "tensor": 4}),
    Point("llama2_7b", "h200", "decode", 8, 2048, {"tensor": 1}),
    Point("llama3_1_405b", "h200-8", "decode", 8, 4096, {"tensor": 8}, INT8),
    Point("llama2_70b", "v5p-16", "prefill", 1, 2048, {"tensor": 8}),
    Point("llama2_7b", "v5e-4", "prefill", 4, 4096, {"tensor": 4}),
    Point("llama3_8b", "v6e-1", "prefill", 1, 4096, {"tensor": 1}, INT8),
    Point("llama2_13b", "h200", "prefill", 2, 2048, {"tensor": 1}),
)
SHORT = {
    "all-gather": "AG", "all-reduce": "AR", "reduce-scatter": "RS", "all-to-all": "AA", "collective-permute": "CP",
}  # fmt: skip
MODELS = ("llama2_7b", "llama2_13b", "llama2_70b", "llama3_1_8b", "llama3_1_405b")
SLICES = (
    "v5e-1", "v5e-8", "v5e-16", "v5e-256", "v6e-1", "v6e-8", "v6e-256", "v4-64", "v5p-8", "v5p-16", "v5p-128", "v5p-1024",
    "v7x-128",
)  # fmt: skip
TIGHT = 0.9  # of a device's memory
MARKED = re.compile(r"(<!-- (.*?): written by benchmarks/plan.py -->)\n.*?\n?(<!-- end -->)", re.DOTALL)
COLOURS = {"train": "C0", "decode": "C1", "prefill": "C2"}
TICKS = (5, 10, 20, 50)


def read_results() -> dict[str, dict[str, Any]]:
    """By point and compiler: "llama2_7b v5e-8 decode ... | libtpu 0.0.42.1" -> what the compiler said."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def compile_points(words: list[str], again: bool) -> None:
    """Compiles what is missing; a point that cannot be compiled here is named and left out."""
    from llama_jax.errors import LlamaError
    from llama_jax.plan.compile import compile_program, compiler_devices

    for point in POINTS:
        if not all(word in point.name for word in words):
            continue
        request = point.request()
        try:
            _, compiler = compiler_devices(request.topology)
            key = f"{point.name} | {compiler}"
            if key in read_results() and not again:
                continue
            found = dataclasses.asdict(compile_program(request, request.mesh))
        except LlamaError as error:
            print(f"{point.name}: {error}", flush=True)
            continue
        kept = {name: found[name] for name in KEPT}
        kept |= {name: round(found[name], 1) for name in ("lower_seconds", "compile_seconds")}
        kept |= {"jax": importlib.metadata.version("jax")}
        RESULTS.write_text(json.dumps(read_results() | {key: kept}, indent=1) + "\n")
        print(f"{key}: {found['peak_bytes'] / 2**30:.2f} GiB in {found['compile_seconds']:.0f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """A point that was compiled, beside what the closed form says."""

    point: Point
    compiler: str
    found: dict[str, Any]
    predicted: Memory

    @property
    def ratio(self) -> float:
        """Of the peaks: closed form over compiler."""
        return self.predicted.total / self.found["peak_bytes"]


def rows() -> list[Row]:
    """In the order of POINTS."""
    results, found = read_results(), []
    for point in POINTS:
        request = point.request()
        for key, result in results.items():
            name, compiler = key.split(" | ")
            if name == point.name:
                found.append(Row(point, compiler, result, plan_memory(request, request.mesh)))
    return found


def accuracy() -> str:
    """The table of docs/plan.md."""
    lines = [
        "| program | mesh | arguments: compiler | closed form | peak: compiler | closed form | | compiled in | collectives |",
        "|-|-|-:|-:|-:|-:|-:|-:|-|",
    ]
    for row in rows():
        point, found, predicted = row.point, row.found, row.predicted
        settings = "".join(f", {name} {value}" for name, value in point.settings.items())
        program = f"{point.model} {point.topology} {point.task} {point.batch} x {point.length:,}{settings}"
        mesh = ", ".join(f"{axis} {size}" for axis, size in point.mesh.items())
        counts = ", ".join(f"{count} {SHORT[name]}" for name, count in found["collectives"].items()) or "none"
        sizes = (found["argument_bytes"], predicted.arguments, found["peak_bytes"], predicted.total)
        cells = [program, mesh, *(f"{size / GIB:.2f}" for size in sizes), f"{row.ratio - 1:+.1%}"]
        lines.append("| " + " | ".join([*cells, f"{found['compile_seconds']:.0f} s", counts]) + " |")
    return "\n".join(lines)


def summary() -> str:
    """What the table comes to."""
    found = sorted(rows(), key=lambda row: abs(row.ratio - 1))
    arguments = max(abs(row.predicted.arguments / row.found["argument_bytes"] - 1) for row in found)
    lines = [f"{len(found)} programs. Arguments (weights, optimizer, cache) agree to {arguments:.2%}."]
    for name, is_tpu in (("TPU", True), ("GPU", False)):
        kind = [row for row in found if row.point.request().topology.chip.is_tpu == is_tpu]
        middle, worst = kind[len(kind) // 2], kind[-1]
        lines.append(
            f"Peaks of {len(kind)} {name} programs: half of them within {abs(middle.ratio - 1):.1%}, "
            f"the worst {worst.ratio - 1:+.1%} ({worst.point.name})."
        )
    compilers = sorted({f"{row.compiler} (jax {row.found['jax']})" for row in found})
    return "\n".join([*lines, f"Compiled by {' and '.join(compilers)}."])


def example(*, model: str, topology: str, task: str, **settings: Any) -> str:
    """What a command prints."""
    flags = " ".join(f"--{name} {value}" for name, value in settings.items())
    command = f"$ python -m llama_jax.plan --model {model} --topology {topology} --task {task} {flags}".rstrip()
    return f"```\n{command}\n{as_text(make_report(make_request(model, topology, task, **settings)))}\n```"


def compiled_example(name: str) -> str:
    """What --compile adds, of a point."""
    row = next(row for row in rows() if row.point.name == name)
    found = {name: value for name, value in row.found.items() if name != "jax"}
    report = CompilerReport(
        compiler=row.compiler,
        mesh=row.point.request().mesh,
        predicted_argument_bytes=row.predicted.arguments,
        predicted_peak_bytes=row.predicted.total,
        **found,
    )
    return f"```\n{report}\n```"


def matrix(task: str, **settings: Any) -> str:
    """A table of docs/tpu.md: slices x models, the best mesh by the closed form."""
    lines = ["| | " + " | ".join(MODELS) + " |", "|-|" + "-|" * len(MODELS)]
    for slice_name in SLICES:
        cells = [cell(make_request(model, slice_name, task, **settings)) for model in MODELS]
        lines.append(f"| {slice_name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(request: PlanRequest) -> str:
    """Mesh, bytes, tokens/s and bound of the best plan; in inference with int8 weights where bfloat16 does not fit."""
    best, note = plans(request)[0], ""
    if not best.fits and not request.trains:
        best, note = plans(dataclasses.replace(request, quantize="int8"))[0], "int8 "
    if not best.fits:
        return f"over by {-best.spare_bytes / GIB:,.1f} GiB"
    mesh = f"{best.mesh.data}x{best.mesh.fsdp}x{best.mesh.tensor}"
    tight = " (tight)" if best.memory.total > TIGHT * request.topology.chip.hbm_bytes else ""
    size = f"{best.memory.total / GIB:.1f} GiB{tight}"
    return f"{note}{mesh}, {size}, **{best.timing.tokens_per_second:,.0f}**, {best.timing.bound}"


def documents() -> dict[Path, str]:
    """The documents as they should be: what stands between their markers is written anew."""
    blocks = {
        "train": example(model="llama2_70b", topology="v5p-128", task="train", batch=16),
        "compiled": compiled_example("llama2_70b v5p-128 train 16x4096 fsdp=16 tensor=4"),
        "too large": example(model="llama2_70b", topology="v5e-8", task="decode"),
        "accuracy": accuracy(),
        "summary": summary(),
        "matrix of train": matrix("train"),
        "matrix of decode": matrix("decode"),
        "matrix of prefill": matrix("prefill"),
    }

    def fill(found: re.Match) -> str:
        return f"{found[1]}\n{blocks[found[2]]}\n{found[3]}"

    return {path: MARKED.sub(fill, path.read_text()) for path in (PLAN, TPU)}


def draw() -> None:
    """The plot of docs/plan.md."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": 9}
    found = rows()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.26 * len(found) + 1.6), width_ratios=(1, 1.1))
    peaks = [row.found["peak_bytes"] / GIB for row in found]
    ends = min(peaks) * 0.8, max(peaks) * 1.25
    for share, shade in ((0.25, "0.93"), (0.1, "0.85")):
        left.fill_between(ends, [e * (1 - share) for e in ends], [e * (1 + share) for e in ends], color=shade, zorder=0)
        right.axvspan(-100 * share, 100 * share, color=shade, zorder=0, label=f"within {share:.0%}")
    left.plot(ends, ends, color="0.5", linewidth=0.8)
    for (task, colour), marker in zip(COLOURS.items(), "osD", strict=True):
        chosen = [i for i, row in enumerate(found) if row.point.task == task]
        left.scatter(
            [peaks[i] for i in chosen],
            [found[i].predicted.total / GIB for i in chosen],
            color=colour,
            marker=marker,
            label=task,
        )
        right.scatter([100 * (found[i].ratio - 1) for i in chosen], chosen, color=colour, marker=marker)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="peak by the compiler, GiB a device")
    left.set(ylabel="peak by the closed form, GiB a device", xticks=TICKS, yticks=TICKS)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    left.legend()
    right.set_yticks(range(len(found)), [row.point.name for row in found], fontsize=7)
    right.axvline(0, color="0.5", linewidth=0.8)
    right.set(xlabel="closed form above (+) or below (-) the compiler, %", xlim=(-30, 30))
    right.invert_yaxis()
    right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="*", metavar="WORD", help="compile the points whose name has all words")
    parser.add_argument("--again", action="store_true", help="also those that are in benchmarks/plan.json")
    args = parser.parse_args()
    if args.compile is not None:
        compile_points(args.compile, args.again)
        return
    for path, text in documents().items():
        path.write_text(text)
    draw()


if __name__ == "__main__":
    main()
