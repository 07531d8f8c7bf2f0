"""A conversation in the terminal: python -m infer.chat --config=configs/chat.py --config.checkpoint=DIR."""

import ml_collections
from ml_collections.config_dict import placeholder

from configs.sample import BUNDLED, mesh, sampling


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.checkpoint = BUNDLED  # made by llama_jax.convert from a chat or instruct model, or a training run's WORKDIR
    c.adapter = ""  # a LoRA run or PEFT's folder, on that checkpoint; a LoRA run by itself is a checkpoint, too
    c.tokenizer = placeholder(str)  # its file or folder, when the checkpoint has none
    c.dtype = "auto"  # of weights and activations: auto (as stored), bfloat16, float32, float16
    c.quantize = ""  # int8, fp8: weights rounded to 8 bits; int4; w8a8: int8, fast on a CPU
    c.cache_dtype = "auto"  # of keys and values: auto (as dtype), int8
    c.draft = ""  # guesses several tokens a step, for the same text sooner: lookup (in the text so far), or a smaller model
    c.draft_tokens = 0  # guesses a step; 0: 7 looked up, 4 of a model
    c.mesh = mesh()
    c.max_length = 0  # tokens of conversation and answer together; 0: the model's context
    c.max_new_tokens = 512  # of one answer
    c.chat_format = placeholder(str)  # instead of the checkpoint's: llama2, codellama, codellama_70b, llama3, template
    c.system = ""  # system prompt
    c.sampling = sampling()
    return c
