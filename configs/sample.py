"""Sampling: python -m infer.sample --config=configs/sample.py --config.checkpoint=DIR --prompt "Once upon a time"."""

import ml_collections
from ml_collections.config_dict import placeholder

BUNDLED = "bundled/checkpoint"  # the small model that ships with the repository


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.checkpoint = BUNDLED  # made by llama_jax.convert, a training run's WORKDIR, or Meta's or HF's folder
    c.adapter = ""  # a LoRA run or PEFT's folder, on that checkpoint; a LoRA run by itself is a checkpoint, too
    c.tokenizer = placeholder(str)  # its file or folder, when the checkpoint has none
    c.dtype = "auto"  # of weights and activations: auto (as stored), bfloat16, float32, float16
    c.quantize = ""  # int8, fp8: weights rounded to 8 bits; int4; w8a8: int8, fast on a CPU
    c.cache_dtype = "auto"  # of keys and values: auto (as dtype), int8
    c.draft = ""  # guesses several tokens a step, for the same text sooner: lookup (in the text so far), or a smaller model
    c.draft_tokens = 0  # guesses a step; 0: 7 looked up, 4 of a model
    c.mesh = mesh()
    c.max_length = 0  # tokens of prompt and answer together; 0: the model's context
    c.max_new_tokens = 256  # 0: as many as the context holds
    c.batch_size = 16  # sequences generated at once
    c.suffix_first = False  # order of a prompt with <FILL_ME> (Code Llama): SPM instead of PSM
    c.sampling = sampling()
    c.sampling.n = 1  # answers per prompt
    c.sampling.echo = True  # print the prompt too
    return c


def mesh() -> ml_collections.ConfigDict:
    """How the model is spread over all devices of all processes; llama_jax.mesh.MeshShape explains the axes."""
    c = ml_collections.ConfigDict()
    c.data = 1
    c.fsdp = 1
    c.tensor = -1  # as many as the model allows
    c.dcn_data = 1  # slices of a TPU multi-slice
    return c


def sampling() -> ml_collections.ConfigDict:
    """What every program that generates can be told; llama_jax.generation.request.Settings explains each."""
    c = ml_collections.ConfigDict()
    c.temperature = 0.6  # 0: greedy
    c.top_k = 0  # 0: all
    c.top_p = 0.9
    c.min_p = 0.0
    c.repetition_penalty = 1.0
    c.frequency_penalty = 0.0
    c.presence_penalty = 0.0
    c.logit_bias = ""  # "ID:BIAS,ID:BIAS"
    c.seed = 0
    c.stop = ("",)[:0]  # strings that end the answer
    c.stop_ids = (0,)[:0]  # token ids that do
    c.ignore_eos = False
    c.logprobs = -1  # 0 and up: report log-probabilities, and so many alternatives, as JSON lines on stderr
    return c
