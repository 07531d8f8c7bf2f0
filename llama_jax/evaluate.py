"""Scores a model on the tasks of EleutherAI's lm-evaluation-harness, by its own command line.

    python -m llama_jax.evaluate --checkpoint DIR --tasks arc_easy,gsm8k [OPTIONS OF lm-eval run]
    python -m llama_jax.evaluate --config=configs/eval.py:commonsense --checkpoint DIR --published llama2_7b [OPTIONS]

The second runs a column of Llama 2's table and prints its numbers beside the published ones. `ls` and `validate` are lm-eval's,
and `run --help` lists its options: --limit, --batch_size, --num_fewshot, --apply_chat_template, --output_path and more.
"""

import argparse
import glob
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llama_jax.errors import ExitCode, LlamaError, run_command
from llama_jax.evaluation.arguments import ModelArgs
from llama_jax.evaluation.columns import FILE, Column, load_column

INSTALL = 'pip install "lm-eval>=0.4.13"'


def main() -> None:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_parser().format_help().rstrip())
        return
    if argv[0] in ("ls", "validate") or (argv[0] == "run" and {"-h", "--help"} & set(argv)):
        run_harness(argv)
        return
    args, rest = _parser().parse_known_args(argv[1:] if argv[0] == "run" else argv)
    if args.model not in (None, "llama_jax"):
        raise LlamaError(ExitCode.BAD_REQUEST, f"--model {args.model}: this command runs llama_jax; lm-eval runs the others")
    is_column = FILE.fullmatch(args.config)  # otherwise a file of lm-eval's own, in YAML, which may say the batch size
    options = ["run", "--model", "llama_jax"]
    if args.batch_size or is_column or not args.config:
        options += ["--batch_size", args.batch_size or "auto"]
    if args.checkpoint:
        options += ["--model_args", json.dumps({"checkpoint": args.checkpoint})]
    if not is_column:
        if args.published:
            raise LlamaError(ExitCode.BAD_REQUEST, "--published goes with --config=FILE.py:COLUMN (configs/eval.py)")
        run_harness([*options, *(["--config", args.config] if args.config else []), *rest])
        return
    column = load_column(args.config, args.published)
    print(run_column(column, options, rest, args.published))


def run_column(column: Column, options: Sequence[str], rest: Sequence[str], model: str) -> str:
    """Runs a column's tasks and reports on them; options and rest are lm-eval's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (("--output_path", "-o"), ("--include_path",), ("--tasks", "-t")):
        parser.add_argument(*flag, default="")
    own, rest = parser.parse_known_args(rest)
    if own.tasks:
        raise LlamaError(ExitCode.BAD_REQUEST, f"--tasks {own.tasks}: {column.name} says which tasks; leave out one of both")
    with tempfile.TemporaryDirectory() as scratch:
        tasks = Path(scratch) / "tasks"
        if own.include_path:  # lm-eval takes one folder
            shutil.copytree(own.include_path, tasks / "included")
        tasks.mkdir(exist_ok=True)
        (tasks / "column.yaml").write_text(column.yaml())
        output = Path(own.output_path or Path(scratch) / "results")
        before = set(_results(output))
        run_harness([*options, "--tasks", column.name, "--include_path", str(tasks), "--output_path", str(output), *rest])
        written = [path for path in _results(output) if path not in before]
        if not written:
            raise LlamaError(ExitCode.BAD_REQUEST, f"lm-eval wrote no results to {output}: can it be written?")
        return column.report(json.loads(Path(written[0]).read_text())["results"], model)


def run_harness(argv: Sequence[str]) -> None:
    """lm-eval's command line, in this process, with our model among its own.

    Raises:
        LlamaError: it is not installed, or knows no such task.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise LlamaError(ExitCode.BAD_REQUEST, f"lm-eval is not installed ({error}): {INSTALL}") from None
    import llama_jax.evaluation.harness  # noqa: F401  which registers the model

    sys.argv = ["lm-eval", *argv]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise LlamaError(ExitCode.BAD_REQUEST, f"{error} (`python -m llama_jax.evaluate ls tasks` lists them)") from None


def _results(output: Path) -> list[str]:
    """The files of results that lm-eval has written to --output_path, a folder or a name that it adds the time to."""
    if output.suffix == ".json":
        return sorted(map(str, output.parent.glob(f"{glob.escape(output.stem)}_*.json")))
    return sorted(map(str, output.glob("**/results_*.json")))


def _parser() -> argparse.ArgumentParser:
    fields = inspect.cleandoc(ModelArgs.__doc__).split("Attributes:\n")[1].replace("    ", "  ")
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.evaluate",
        description=__doc__,
        epilog=f"--model_args KEY=VALUE,KEY=VALUE:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage="python -m llama_jax.evaluate [--checkpoint DIR] [--config FILE] [--published MODEL] [OPTIONS OF lm-eval run]",
    )
    parser.add_argument("--checkpoint", default="", help="as --model_args checkpoint=DIR")
    parser.add_argument(
        "--config", "-C", default="", help="FILE.py:COLUMN (configs/eval.py), or a file of YAML with lm-eval's options"
    )
    parser.add_argument("--published", default="", metavar="MODEL", help="print its published numbers, such as llama2_7b's")
    parser.add_argument("--batch_size", "-b", default="", help="sequences at once (default: auto, which is 16)")
    parser.add_argument("--model", "-M", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_command(main)
