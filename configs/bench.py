"""Generation speed: python -m infer.bench --config=configs/bench.py:tinyllama_1b

The preset is a model of llama_jax.config.PRESETS with random weights; prompts are random, too. With a draft, it is
the weights of a checkpoint whose tokens are guessed, and the preset says nothing.
"""

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from configs.sample import mesh, sampling
from llama_jax.choices import check_preset
from llama_jax.config import PRESETS


def get_config(preset: str = "stories110m") -> ml_collections.ConfigDict:
    check_preset(preset, PRESETS)
    c = ml_collections.ConfigDict()
    c.model = dataclasses.asdict(PRESETS[preset])
    c.dtype = "bfloat16"  # of weights and activations: bfloat16, float32, float16
    c.quantize = ""  # int8, fp8: weights rounded to 8 bits; int4; w8a8: int8, fast on a CPU
    c.cache_dtype = "auto"  # of keys and values: auto (as dtype), int8
    c.mesh = mesh()
    c.draft = ""  # instead: measure guesses of several tokens a step: lookup (in the text so far), or a smaller model
    c.draft_tokens = 0  # guesses a step; 0: 7 looked up, 4 of a model
    c.checkpoint = ""  # whose tokens are guessed
    c.adapter = ""  # a LoRA run or PEFT's folder, on that checkpoint
    c.tokenizer = placeholder(str)  # its file or folder, when the checkpoint has none
    c.max_length = 0  # tokens of prompt and answer together; 0: the model's context
    c.batch_sizes = (1, 8)  # one line of output each
    c.prompt_length = min(512, PRESETS[preset].max_length // 2)  # tokens
    c.context = 0  # tokens the cache has room for; 0: the least power of two that holds prompt and timed steps
    c.steps = 64  # decode steps timed, 8 at a time
    c.sampling = sampling()
    c.sampling.temperature = 0.0  # greedy
    for name in ("logit_bias", "stop", "stop_ids", "ignore_eos", "logprobs"):  # no text ends; a bias takes what penalties do
        del c.sampling[name]
    return c
