"""QLoRA: LoRA over frozen weights of 8 bits: python -m train.main --config=configs/qlora.py --workdir=DIR
--config.init_from=CHECKPOINT --config.data.train=chat.jsonl

Dettmers et al. 2023, arXiv:2305.14314, appendix B.2: rank 64, alpha 16, all projections, constant 2e-4, second moment 0.999,
gradients clipped at 0.3, batches of 16. Their base is NF4; ours is int8 with one scale per output channel.
"""

import ml_collections

from configs import lora, pretrain


def get_config(preset: str = "full") -> ml_collections.ConfigDict:
    c = lora.get_config(preset)
    c.lora.update(rank=64, alpha=16.0, quantize="int8")
    c.train.batch_size = 16
    c.optimizer = pretrain.optimizer(2e-4, warmup_steps=0, schedule="constant")
    c.optimizer.update(b2=0.999, clip_norm=0.3, weight_decay=0.0)
    if preset == "tiny":
        c.lora.update(rank=4, alpha=8.0)
        c.train.batch_size = 4
        c.optimizer.peak_lr = 3e-3
    return c
