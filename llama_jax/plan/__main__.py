"""Does a model fit on an accelerator, on which mesh, and how fast would it be?

    python -m llama_jax.plan --model llama2_70b --topology v5p-128 --task train

Closed-form arithmetic, in a second and without the hardware; --compile also compiles the real program ahead of time for the
best mesh. Without --batch, training has one sequence per device, decode 8 and prefill 1. Exits with 33 when nothing fits.
"""

import argparse
import dataclasses
import json
from typing import Any

from llama_jax.choices import CACHE_DTYPES
from llama_jax.errors import ExitCode, LlamaError, run_command
from llama_jax.plan.chips import GIB
from llama_jax.plan.rank import cheapest_changes, largest_batch, plans
from llama_jax.plan.report import Report, as_json, as_text
from llama_jax.plan.request import DTYPES, OPTIMIZERS, REMAT, TASKS, PlanRequest, make_request

MESH_FLAGS = ("data", "fsdp", "tensor", "dcn_data")


def make_report(request: PlanRequest) -> Report:
    """Plans a request by arithmetic alone."""
    ranked = plans(request)
    best = ranked[0]
    if best.fits:
        return Report(request, ranked, largest_batch(request, best.mesh), [])
    return Report(request, ranked, 0, cheapest_changes(request))


def compile_best(report: Report) -> Any:
    """The compiler's own account of the best plan (llama_jax.plan.compile.CompilerReport)."""
    try:
        from llama_jax.plan.compile import compile_program
    except ImportError as error:
        raise LlamaError(
            ExitCode.BAD_REQUEST, f"--compile cannot be had here ({error}); without it the plan is arithmetic only"
        ) from None
    return compile_program(report.request, report.best.mesh)


def _parse() -> tuple[PlanRequest, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a preset (llama2_7b), or the directory of a checkpoint")
    parser.add_argument("--topology", required=True, help="v5e-16, v5p-128, 2xv6e-256, h200, h100-8x4, ...")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--batch", type=int, help="sequences in all (default: train one per device, decode 8, prefill 1)")
    parser.add_argument("--length", type=int, help="tokens a sequence (default: train 4096, decode and prefill 2048)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the computation (default: bfloat16)")
    parser.add_argument("--quantize", choices=("int8",), help="the weights of inference")
    parser.add_argument("--cache_dtype", choices=CACHE_DTYPES, help="keys and values of inference (default: auto, as --dtype)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="of training (default: adamw)")
    parser.add_argument("--first_moment", choices=DTYPES, help="its dtype, in adamw and lion (default: float32)")
    parser.add_argument("--remat", choices=REMAT, help="what training computes again (default: full)")
    for name in MESH_FLAGS:
        parser.add_argument(f"--{name}", type=int, help="size of this mesh axis; -1: what is left (default: all are tried)")
    parser.add_argument("--compile", action="store_true", help="compile the program for the best mesh, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    fields = ("batch", "length", "dtype", "quantize", "cache_dtype", "optimizer", "first_moment", "remat")
    mesh = {name: getattr(args, name) for name in MESH_FLAGS if getattr(args, name) is not None}
    request = make_request(args.model, args.topology, args.task, **{name: getattr(args, name) for name in fields}, mesh=mesh)
    return request, args


def main() -> None:
    request, args = _parse()
    report = make_report(request)
    compiled = compile_best(report) if args.compile else None
    if args.json:
        print(json.dumps(as_json(report) | {"compiled": None if compiled is None else dataclasses.asdict(compiled)}, indent=1))
    else:
        print(as_text(report))
        if compiled is not None:
            print(f"\n{compiled}")
    if not report.best.fits:
        raise LlamaError(
            ExitCode.DOES_NOT_FIT,
            f"{request.model} does not fit on {request.topology.name} for {request.task}: "
            f"{-report.best.spare_bytes / GIB:.2f} GiB a device are missing",
        )


if __name__ == "__main__":
    run_command(main)
