"""Proves a checkpoint: the float64 reference, run from the source files, against the JAX model, run from the checkpoint.

    python -m llama_jax.verify --checkpoint checkpoints/llama-2-7b --source llama-2-7b

Both run layer by layer, so that one layer of each is in memory: 7B needs less than 8 GiB. The reference (llama_jax.reference)
shares no code with the model and works in Meta's conventions. Exits with code 30 when they differ, and says where and why.
"""

import argparse
import sys
from pathlib import Path

from llama_jax.errors import ExitCode, LlamaError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="directory made by llama_jax.convert")
    parser.add_argument("--source", required=True, help="what it was converted from")
    parser.add_argument("--tokens", type=int, default=64, help="how many positions to compare (default: 64)")
    args = parser.parse_args()
    from llama_jax.checkpoint.source import open_source
    from llama_jax.checkpoint.store import Checkpoint
    from llama_jax.commands.verify import verify

    checkpoint, source = Checkpoint.open(args.checkpoint), open_source(Path(args.source))
    if not 1 <= args.tokens <= checkpoint.config.max_length:
        parser.error(f"--tokens is {args.tokens}, expected 1 to the context of {checkpoint.config.max_length}")
    print("place        largest difference, of largest value")
    report = verify(checkpoint, source, args.tokens, show=True)
    print(f"greedy agreement: {report.greedy_agreement} of {report.tokens} positions")
    if report.faults:
        print("verdict: NOT equal")
        for fault in report.faults[1:10]:
            print(f"  {fault}", file=sys.stderr)
        raise LlamaError(ExitCode.NOT_EQUAL, report.faults[0])
    largest = max(error / (scale or 1.0) for error, scale in report.errors.values())
    print(f"verdict: equal (every weight to the bit; every layer to {largest:.1e} of its largest value)")


if __name__ == "__main__":
    run_command(main)
