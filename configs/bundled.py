"""The model that ships with the repository (bundled/README.md has all commands):

    python -m train.main --config=configs/bundled.py:pretrain --workdir=build/bundled/pretrain
    python -m train.main --config=configs/bundled.py:sft --workdir=build/bundled/sft

The data are what `python -m bundled.make_data --output build/bundled/data` writes. The presets are for 2 CPU cores, in bfloat16
where these have matrix units for it (0.46 of the time), otherwise in float32; `pretrain_gpu` and `sft_gpu` have larger batches,
for more data.
"""

import dataclasses

import ml_collections

from configs import pretrain
from llama_jax.choices import check_preset
from llama_jax.config import ModelConfig
from llama_jax.cpu_features import has_amx

FOLDER = "build/bundled"
MODEL = ModelConfig(
    vocab_size=2048,
    embed_dim=256,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=512,
    max_length=512,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied_head=True,
)
RUNS = {  # rows of a step, passes over the data, peak learning rate, warm-up steps
    "pretrain": (8, 1.0, 2e-3, 100),
    "sft": (8, 1.0, 1e-3, 50),
    "pretrain_gpu": (128, 1.5, 3e-3, 100),
    "sft_gpu": (64, 2.0, 1e-3, 50),
}


def get_config(preset: str = "pretrain") -> ml_collections.ConfigDict:
    check_preset(preset, RUNS)
    batch_size, epochs, peak_lr, warmup_steps = RUNS[preset]
    stage = preset.removesuffix("_gpu")
    c = pretrain.get_config("tiny")
    c.model = dataclasses.asdict(MODEL)
    c.train = pretrain.train(batch_size, MODEL.max_length, epochs=epochs)
    c.train.remat = "none"
    c.train.dtype = "float32" if stage == preset and not has_amx() else "bfloat16"
    c.optimizer = pretrain.optimizer(peak_lr, warmup_steps=warmup_steps)
    c.optimizer.eps = 1e-8
    c.data.train = f"{FOLDER}/data/{stage}.jsonl"
    c.data.eval = f"{FOLDER}/data/held_out/stories.jsonl"
    c.eval.every = c.save.every = 500
    c.eval.batches = 4
    c.eval.prompts = "Once upon a time"
    if stage == "pretrain":
        c.tokenizer = f"{FOLDER}/data/tokenizer.model"
    else:
        c.init_from = f"{FOLDER}/pretrain"
        c.data.chat_format = "llama2"
        c.data.eval += f",{FOLDER}/data/held_out/dialogues.jsonl"
        c.eval.prompts = "Who are you?\nWhat is 27 + 14?\nTell me a story about a proud fox named Wanda."
    return c
