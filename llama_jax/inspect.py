"""What a checkpoint is.

python -m llama_jax.inspect --checkpoint checkpoints/llama-2-7b
"""

import argparse
import dataclasses

from llama_jax.checkpoint.store import Checkpoint
from llama_jax.config import PRESETS
from llama_jax.errors import run_command


def describe(checkpoint: Checkpoint) -> str:
    """Lines of text: path, model, source, and what made it."""
    config, source = checkpoint.config, checkpoint.source
    same = [name for name, preset in PRESETS.items() if preset == config]
    size = config.num_params * checkpoint.dtype.itemsize
    lines = [
        f"checkpoint   {checkpoint.path}",
        f"parameters   {config.num_params:,} in {checkpoint.dtype}, {size / 1e9:.2f} GB",
        f"published as {', '.join(same) or '-'}",
        f"chat format  {checkpoint.chat_format or '- (a base model)'}",
        f"tokenizer    {', '.join(checkpoint.tokenizer) or '-'}",
        f"source       {source.get('kind', '-')} {source.get('path', '')}".rstrip(),
        *(f"  {f['name']}  {f['bytes']:,} bytes  sha256 {f['sha256']}" for f in source.get("files", ())),
        f"made by      {checkpoint.command}",
        "config",
        *(f"  {name:24}{value}" for name, value in dataclasses.asdict(config).items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    print(describe(Checkpoint.open(parser.parse_args().checkpoint)))


if __name__ == "__main__":
    run_command(main)
