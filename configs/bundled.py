"""The model that ships with the repository: python -m train.main --config=configs/bundled.py:pretrain --workdir=DIR/pretrain,
then :sft (bundled/README.md has all commands).

The data are what `python -m bundled.make_data --output bundled/data` writes. The presets are for 2 CPU cores; `pretrain_gpu`
and `sft_gpu` have larger batches and read the data several times.
"""

import dataclasses

import ml_collections

from configs import pretrain
from llama_jax.config import ModelConfig

DATA, PRETRAINED = "bundled/data", "bundled/runs/pretrain"
MODEL = ModelConfig(
    vocab_size=2048,
    embed_dim=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=512,
    max_length=512,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied_head=True,
)
# Rows of a step, passes over the data, peak learning rate, warm-up steps.
RUNS = {
    "pretrain": (16, 1.0, 2e-3, 200),
    "sft": (16, 1.0, 1e-3, 50),
    "pretrain_gpu": (128, 3.0, 3e-3, 200),
    "sft_gpu": (64, 2.0, 1e-3, 100),
}
PROMPTS = "Who are you?\nWhat is 27 + 14?\nTell me a story about a proud fox named Wanda."


def get_config(preset: str = "pretrain") -> ml_collections.ConfigDict:
    if preset not in RUNS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(RUNS)}")
    batch_size, epochs, peak_lr, warmup_steps = RUNS[preset]
    stage = preset.partition("_")[0]
    c = pretrain.get_config("tiny")
    c.model = dataclasses.asdict(MODEL)
    c.train = pretrain.train(batch_size, MODEL.max_length, epochs=epochs)
    c.train.remat = "none"
    c.optimizer = pretrain.optimizer(peak_lr, warmup_steps=warmup_steps)
    c.optimizer.eps = 1e-8
    c.data.train = f"{DATA}/{stage}.jsonl"
    c.data.eval = f"{DATA}/held_out/stories.jsonl"
    c.eval.every = c.save.every = 500
    c.eval.prompts = "Once upon a time"
    c.tokenizer = f"{DATA}/tokenizer.model"
    if stage == "sft":
        c.init_from = PRETRAINED
        c.data.chat_format = "llama2"
        c.data.eval += f",{DATA}/held_out/dialogues.jsonl"
        c.eval.prompts = PROMPTS
    return c
