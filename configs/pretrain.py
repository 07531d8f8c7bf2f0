"""Pretraining: python -m train.main --config=configs/pretrain.py:llama2_7b --workdir=DIR --config.data.train=FILES
--config.tokenizer=tokenizer.model

The preset after the colon is a model of llama_jax.config.PRESETS, with the hyperparameters that its paper trained it with
(Touvron et al. 2023, arXiv:2302.13971, section 2.3 and table 2; arXiv:2307.09288, section 2.2; Dubey et al. 2024,
arXiv:2407.21783, section 3.4 for the rates and the first batch of Llama 3): AdamW, cosine to a tenth, batches of 4M tokens.
"""

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from configs.sample import BUNDLED
from llama_jax.choices import check_preset
from llama_jax.config import PRESETS

BATCH_TOKENS = 4 * 2**20
# Peak learning rate and tokens trained on, of models whose papers say; of the others those of 7B and 100 tokens a parameter.
PUBLISHED = {
    "llama1_7b": (3e-4, 1.0e12), "llama1_13b": (3e-4, 1.0e12), "llama1_33b": (1.5e-4, 1.4e12), "llama1_65b": (1.5e-4, 1.4e12),
    "llama2_7b": (3e-4, 2e12), "llama2_13b": (3e-4, 2e12), "llama2_34b": (1.5e-4, 2e12), "llama2_70b": (1.5e-4, 2e12),
    "llama3_8b": (3e-4, 15e12), "llama3_70b": (1.5e-4, 15e12),
    "llama3_1_8b": (3e-4, 15e12), "llama3_1_70b": (1.5e-4, 15e12), "llama3_1_405b": (8e-5, 15.6e12),
    "tinyllama_1b": (4e-4, 3e12),  # Zhang et al. 2024, arXiv:2401.02385, section 2: batches of 2M
}  # fmt: skip
LENGTHS = {"llama3": 8192}  # of training, where the context was stretched afterwards


def get_config(preset: str = "llama2_7b") -> ml_collections.ConfigDict:
    check_preset(preset, PRESETS)
    model = PRESETS[preset]
    peak_lr, tokens = PUBLISHED.get(preset, (3e-4, 100 * model.num_params))
    length = min(model.max_length, next((n for family, n in LENGTHS.items() if preset.startswith(family)), 4096))
    c = ml_collections.ConfigDict()
    c.model = dataclasses.asdict(model)
    c.init_from = placeholder(
        str
    )  # a checkpoint (or Meta's or Hugging Face's files) to go on from; its shapes must be c.model's
    c.tokenizer = placeholder(str)  # its file or folder; that of init_from when not given
    c.mesh = mesh()
    c.train = train(BATCH_TOKENS // length, length, steps=int(tokens / BATCH_TOKENS))
    c.optimizer = optimizer(peak_lr, warmup_steps=8000 if preset == "llama3_1_405b" else 2000)
    c.data = data()
    c.save = dict(every=1000, keep=2, keep_every=0, keep_best=0)  # steps; checkpoints
    c.eval = evaluation(every=1000)
    c.log = dict(tensorboard=True, wandb="", report_seconds=60.0)  # wandb: the name of a project
    c.profile = ""  # "20-22": a trace of these steps in WORKDIR/profile
    if preset == "tiny":  # with the tokenizer that ships with the repository
        c.tokenizer, c.model.vocab_size = BUNDLED, 2048
        c.train.update(steps=200, batch_size=8, length=128, remat="none")
        c.optimizer.update(peak_lr=3e-3, warmup_steps=20)
        c.save.every = c.eval.every = 100
    return c


def mesh() -> ml_collections.ConfigDict:
    """How state and batch are spread over all devices; llama_jax.mesh.MeshShape explains the axes."""
    return ml_collections.ConfigDict(dict(data=1, fsdp=-1, tensor=1, dcn_data=1))  # -1: what is left of the devices


def train(batch_size: int, length: int, *, steps: int = 0, epochs: float = 0.0) -> ml_collections.ConfigDict:
    """The run, and how a step computes (llama_jax.training.step.StepConfig explains each)."""
    c = ml_collections.ConfigDict()
    c.steps = steps  # 0: as many as `epochs` are
    c.epochs = epochs
    c.batch_size = batch_size  # rows, over all devices
    c.length = length  # tokens of a row
    c.seed = 0
    c.dtype = "bfloat16"  # of the computation; parameters are float32
    c.remat = "full"  # none, projections, full, offload: from most memory to least
    c.scan_layers = "auto"  # true, false; auto: on TPUs
    c.attention = "auto"  # kernel, plain; auto: the GPU's or TPU's kernel if it works
    c.accumulate = 1  # parts of a batch, one after the other
    c.z_loss = 0.0
    c.ema_decay = 0.0  # of an average of the weights, which is then what is evaluated and saved to sample with
    c.freeze = ("",)[:0]  # regular expressions of weights that stay as they are: embedding, layers.q_proj, layers[.].*_norm
    c.nonfinite = "stop"  # or skip: what a step does whose loss or gradient is not finite
    return c


def optimizer(peak_lr: float, *, warmup_steps: int, schedule: str = "cosine") -> ml_collections.ConfigDict:
    """Llama 2's; llama_jax.training.optimizer.OptimizerConfig explains each. Without total_steps, which are the run's."""
    c = ml_collections.ConfigDict()
    c.name = "adamw"  # adafactor, lion, muon, schedule_free, sgd
    c.peak_lr = peak_lr
    c.schedule = schedule  # linear, constant
    c.warmup_steps = warmup_steps
    c.final_ratio = 0.1
    c.b1 = 0.9
    c.b2 = 0.95
    c.eps = 1e-5
    c.weight_decay = 0.1
    c.clip_norm = 1.0
    c.moment_dtype = "float32"
    return c


def data() -> ml_collections.ConfigDict:
    """llama_jax.data.pipeline.DataConfig explains each."""
    c = ml_collections.ConfigDict()
    c.train = ""  # "a.jsonl@0.7,chat/*.jsonl@0.3": files, or folders that llama_jax.data.prepare wrote, with weights
    c.eval = ""  # held-out sets
    c.packing = "best_fit"  # or concat
    c.window = 10_000  # documents that best_fit packs together
    c.long_documents = "split"  # truncate, drop
    c.on_bad_record = "error"  # or skip
    c.chat_format = ""  # of conversations: llama2, llama3, template; that of init_from when not given
    c.cache = ""  # a directory on a disk; WORKDIR/data
    c.prefetch = 4
    c.workers = 0  # processes that tokenise; as many as there are CPUs
    return c


def evaluation(every: int) -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.every = every  # steps
    c.batches = 0  # of each held-out set; 0: all
    c.prompts = ""  # to continue, or to answer, one a line
    c.max_new_tokens = 64
    return c
