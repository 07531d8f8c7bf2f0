"""Weights of Meta, Hugging Face or llama2.c -> a checkpoint of ours.

    python -m llama_jax.convert --source llama-2-7b --output checkpoints/llama-2-7b

The kind of source is recognised by its content. One tensor is in memory at a time; sources are memory-mapped.
"""

import argparse
import shlex
import signal
import sys

from llama_jax.choices import STORED_DTYPES
from llama_jax.errors import run_command
from llama_jax.text.chat import FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="folder of Meta's or Hugging Face's, or a .bin file of llama2.c")
    parser.add_argument("--output", required=True, help="directory to make")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="of the checkpoint (default: as in the source)")
    parser.add_argument("--tokenizer", help="its file or folder (default: beside the weights)")
    parser.add_argument("--max-length", type=int, help="context in tokens (default: what the source says)")
    parser.add_argument("--chat-format", choices=("", *FORMATS), help="(default: by the folder's name or the chat template)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the output")
    args = parser.parse_args()
    if args.max_length is not None and args.max_length < 1:
        parser.error(f"--max-length is {args.max_length}, expected at least 1")
    from llama_jax.commands.convert import convert

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    convert(
        args.source,
        args.output,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        max_length=args.max_length,
        chat_format=args.chat_format,
        overwrite=args.overwrite,
        command=shlex.join(["python", "-m", "llama_jax.convert", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    run_command(main)
