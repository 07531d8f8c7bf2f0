"""Fine-tuning on answers: python -m train.main --config=configs/sft.py --workdir=DIR --config.init_from=CHECKPOINT
--config.data.train=chat.jsonl

Llama 2-Chat's recipe (Touvron et al. 2023, arXiv:2307.09288, section 3.1): 2 epochs, cosine from 2e-5, decay 0.1, 64 rows of
4,096 tokens, loss on the answers only. The model is that of init_from, whatever its size. The preset `tiny` has small batches,
and goes on from the model that ships with the repository.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import pretrain
from configs.sample import BUNDLED
from llama_jax.choices import check_preset

PRESETS = ("full", "tiny")


def get_config(preset: str = "full") -> ml_collections.ConfigDict:
    check_preset(preset, PRESETS, "the model is that of init_from")
    c = ml_collections.ConfigDict()
    c.init_from = placeholder(str)  # a checkpoint, or Meta's or Hugging Face's files
    c.tokenizer = placeholder(str)  # its file or folder; that of init_from when not given
    c.mesh = pretrain.mesh()
    c.train = pretrain.train(64, 4096, epochs=2.0)
    c.optimizer = pretrain.optimizer(2e-5, warmup_steps=0)
    c.data = pretrain.data()
    c.data.long_documents = "truncate"  # the end of a conversation means little without its beginning
    c.save = dict(every=500, keep=2, keep_every=0, keep_best=0)  # steps; checkpoints
    c.eval = pretrain.evaluation(every=100)
    c.log = dict(tensorboard=True, wandb="", report_seconds=60.0)  # wandb: the name of a project
    c.profile = ""  # "20-22": a trace of these steps in WORKDIR/profile
    if preset == "tiny":
        c.init_from = BUNDLED
        c.data.chat_format = "llama2"
        c.train.update(batch_size=4, length=256)
        c.optimizer.update(peak_lr=1e-3)
        c.save.every = c.eval.every = 20
    return c
