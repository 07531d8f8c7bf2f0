"""Weights -> a checkpoint of ours whose projections and head are stored in fewer bits.

    python -m llama_jax.quantize --checkpoint checkpoints/llama-2-7b --output checkpoints/llama-2-7b-int8 --method int8

From a checkpoint, a training run's WORKDIR, an adapter over its base (their sum is rounded), or weights that were not
converted. `llama_jax.load` of the output gives what loading the weights with quantize=METHOD gives, to the bit; with
--calibrate something closer to the float weights, on texts like it. A few tensors are in memory at a time.
docs/quantisation.md says what the methods are and cost.
"""

import argparse
import shlex
import signal
import sys

from llama_jax.choices import COMPUTE_DTYPES, METHODS
from llama_jax.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, help="of ours, a WORKDIR of training, or weights of Meta's or Hugging Face's"
    )
    parser.add_argument("--output", required=True, help="directory to make")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--adapter", default="", help="added to the checkpoint: of a LoRA run, or a folder of PEFT's")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *COMPUTE_DTYPES), help="of what is not rounded (default: as llama_jax.load)"
    )
    parser.add_argument("--calibrate", default="", help="file of text that int8 or int4 weights are rounded for (GPTQ)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the output")
    args = parser.parse_args()
    from llama_jax.commands.quantize import quantize

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    quantize(
        args.checkpoint,
        args.output,
        args.method,
        adapter=args.adapter,
        dtype=args.dtype,
        calibrate=args.calibrate,
        overwrite=args.overwrite,
        command=shlex.join(["python", "-m", "llama_jax.quantize", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    run_command(main)
