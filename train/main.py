"""Trains a model from nothing or from a checkpoint: pretraining, fine-tuning, LoRA, QLoRA.

    python -m train.main --config=configs/pretrain.py:tiny --workdir=DIR --config.data.train=stories.jsonl
    python -m train.main --config=configs/sft.py --workdir=DIR --config.init_from=CHECKPOINT --config.data.train=chat.jsonl

The same command with a WORKDIR that has a checkpoint goes on from its newest. WORKDIR gets checkpoints/STEP (which
`infer.sample` and `llama_jax.export` take, as they take WORKDIR itself), metrics.jsonl, eval.jsonl, tensorboard/, report.png
and run.json. Text goes to stderr.
"""

import shlex
import sys

from absl import flags
from etils import epath

from llama_jax import distributed, program
from llama_jax.errors import ExitCode, LlamaError

CONFIG = program.define_config()
WORKDIR = flags.DEFINE_string("workdir", "", "directory of the run; all processes see it")


def main() -> None:
    from llama_jax.generation.load import keep_compiled_programs
    from train.host_memory import keep_freed_memory
    from train.loop import run_recipe
    from train.recipe import read_recipe

    recipe, workdir = read_recipe(CONFIG.value), distributed.broadcast(WORKDIR.value)
    if not workdir:
        raise LlamaError(ExitCode.BAD_REQUEST, "no --workdir=DIR: where checkpoints and metrics go")
    keep_freed_memory()
    keep_compiled_programs()
    run_recipe(recipe, epath.Path(workdir), shlex.join(["python", "-m", "train.main", *sys.argv[1:]]))


if __name__ == "__main__":
    program.run(main)
