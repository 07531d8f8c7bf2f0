"""What a checkpoint is.

python -m llama_jax.inspect --checkpoint checkpoints/llama-2-7b
"""

import argparse

from llama_jax.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    args = parser.parse_args()
    from llama_jax.checkpoint.store import Checkpoint
    from llama_jax.commands.inspect import describe

    print(describe(Checkpoint.open(args.checkpoint)))


if __name__ == "__main__":
    run_command(main)
