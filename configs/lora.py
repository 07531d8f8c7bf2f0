"""LoRA: python -m train.main --config=configs/lora.py --workdir=DIR --config.init_from=CHECKPOINT
--config.data.train=chat.jsonl

Hu et al. 2021, arXiv:2106.09685, with torchtune's and TRL's usual numbers for Llama: rank 16, alpha 32, all projections, 3e-4.
What is saved is the adapter; `infer.sample` loads it over its base, `llama_jax.export` makes PEFT files of it or merges it.
"""

import ml_collections

from configs import pretrain, sft

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def get_config(preset: str = "full") -> ml_collections.ConfigDict:
    c = sft.get_config(preset)
    c.optimizer = pretrain.optimizer(3e-4, warmup_steps=100)
    c.optimizer.weight_decay = 0.01
    c.lora = lora()
    if preset == "tiny":
        c.optimizer.update(peak_lr=3e-3, warmup_steps=0)
        c.lora.update(rank=4, alpha=8.0)
    return c


def lora() -> ml_collections.ConfigDict:
    """llama_jax.model.lora.LoraConfig explains each."""
    c = ml_collections.ConfigDict()
    c.rank = 16
    c.alpha = 32.0
    c.dropout = 0.05
    c.targets = PROJECTIONS
    c.rslora = False
    c.dora = False
    c.base_dtype = "bfloat16"  # of the frozen weights, or float32
    c.quantize = ""  # int8: the frozen projections and head in 8 bits
    return c
