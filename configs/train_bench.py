"""Training speed: python -m train.bench --config=configs/train_bench.py:stories110m

The preset is a model of llama_jax.config.PRESETS with random weights; documents are random, too.
"""

import dataclasses

import ml_collections

from configs import pretrain
from configs.lora import lora
from llama_jax.choices import check_preset
from llama_jax.config import PRESETS


def get_config(preset: str = "stories110m") -> ml_collections.ConfigDict:
    check_preset(preset, PRESETS)
    model = PRESETS[preset]
    c = ml_collections.ConfigDict()
    c.model = dataclasses.asdict(model)
    c.mesh = pretrain.mesh()
    c.train = pretrain.train(8, min(512, model.max_length))
    c.train.remat = "none"
    del c.train.steps, c.train.epochs, c.train.freeze, c.train.nonfinite
    c.optimizer = pretrain.optimizer(3e-4, warmup_steps=10)
    c.lora = lora()
    c.lora.update(rank=0, base_dtype="float32")  # rank 16 and base_dtype=bfloat16 for LoRA
    c.documents = 4  # in a row
    c.parts = True  # time gradient, optimizer and products alone, too, which compiles more
    c.steps = 10  # timed, after two that are not
    return c
