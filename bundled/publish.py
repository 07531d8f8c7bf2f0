"""The end of a training run as the checkpoint that ships: python -m bundled.publish --run WORKDIR --output bundled/checkpoint

Parameters in bfloat16 and the tokenizer, without the optimizer's state; of paths, only what the run's command holds.
"""

import argparse
import dataclasses

import jax.numpy as jnp
from etils import epath

from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.save import save_params
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.errors import run_command


def publish(run: epath.PathLike, output: epath.PathLike, *, overwrite: bool = False) -> Checkpoint:
    """Writes the newest checkpoint of a run anew.

    Raises:
        LlamaError: there is no complete checkpoint in the run; or there is one at the output, and not `overwrite`.
    """
    trained = Checkpoint.open(run)
    params = load_params(trained, jnp.dtype(jnp.bfloat16))
    source = dict(kind="trained", path="bundled.make_data", files=[])
    ours = dataclasses.replace(trained, path=epath.Path(output), source=source)
    return save_params(ours, params, tokenizer_files=[trained.path / name for name in trained.tokenizer], overwrite=overwrite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="WORKDIR of the last training run")
    parser.add_argument("--output", required=True, help="checkpoint directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace the one that is there")
    args = parser.parse_args()
    publish(args.run, args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    run_command(main)
