"""How fast generation is, and how far that is from what the machine can do.

    python -m infer.bench --config=configs/bench.py:tinyllama_1b [--compare FILE] [--plot bench.png]
    python -m infer.bench --config=configs/bench.py --config.draft=lookup --config.checkpoint=DIR

Prints a line of JSON for each batch size; `> FILE` keeps them for --compare. The floors (infer.floors) are measured in the same
process: `prefill_share` is the rate of the prompt's FLOPs over that of the bare products; `decode_share` is `floor_seconds`, in
which products of one row could read what a step must (weights, and the filled part of the cache), over the step's seconds.
With a draft, a line for plain text and one for repetitive text: tokens a step, and the speed against one token a step.
"""

import json
import sys
from collections.abc import Iterable

import ml_collections
from absl import flags
from ml_collections import config_flags

from infer import program
from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError

CONFIG = program.define_config()
COMPARE = flags.DEFINE_string("compare", None, "file of lines that an earlier run printed: says what has changed")
PLOT = flags.DEFINE_string("plot", None, "file (.png) for a plot of tokens/s against batch size under the floors' roofline")
OF_BATCHES = ("model", "batch_sizes", "context")
OF_GUESSES = ("checkpoint", "adapter", "tokenizer", "max_length", "draft_tokens")


def main() -> None:
    """Prints a line for each batch size, or of guesses for each text."""
    check_read(config_flags.get_override_values(flags.FLAGS["config"]), CONFIG.value.draft)
    if CONFIG.value.draft:
        _print_guesses(CONFIG.value)
    else:
        _print_batches(CONFIG.value)


def check_read(keys: Iterable[str], draft: str) -> None:
    """Raises LlamaError where a key that was given says nothing with this draft, or without one."""
    unread = OF_BATCHES if draft else OF_GUESSES
    if given := [key for key in keys if key.partition(".")[0] in unread]:
        why = "with a draft: one sequence is measured" if draft else "without a draft: random weights are measured"
        raise LlamaError(ExitCode.BAD_REQUEST, f"nothing reads {', '.join(given)} {why}; leave it out")


def _print_batches(config: ml_collections.ConfigDict) -> None:
    from infer import bench_report
    from infer.measure import make_subject, measure

    before = bench_report.read_lines(COMPARE.value) if COMPARE.value else []
    subject = make_subject(config.to_dict())
    lines = []
    for line in measure(subject, config.batch_sizes):
        lines.append(line)
        if distributed.is_main():
            print(json.dumps(line), flush=True)
    if not distributed.is_main():
        return
    if COMPARE.value:
        print(bench_report.compare(before, lines), file=sys.stderr)
    if PLOT.value:
        bench_report.plot(lines, PLOT.value)


def _print_guesses(config: ml_collections.ConfigDict) -> None:
    from infer.guesses import measure_guesses

    if COMPARE.value or PLOT.value:
        raise LlamaError(ExitCode.BAD_REQUEST, "--compare and --plot are of batch sizes: leave them out with --config.draft")
    for line in measure_guesses(program.load(config), config):
        if distributed.is_main():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    program.run(main)
