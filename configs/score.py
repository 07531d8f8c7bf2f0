"""Log-likelihood and perplexity: python -m infer.score --config=configs/score.py --config.checkpoint=DIR --text FILE."""

import ml_collections
from ml_collections.config_dict import placeholder

from configs.sample import BUNDLED, mesh


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.checkpoint = BUNDLED  # made by llama_jax.convert, a training run's WORKDIR, or Meta's or HF's folder
    c.adapter = ""  # a LoRA run or PEFT's folder, on that checkpoint; a LoRA run by itself is a checkpoint, too
    c.tokenizer = placeholder(str)  # its file or folder, when the checkpoint has none
    c.dtype = "auto"  # of weights and activations: auto (as stored), bfloat16, float32, float16
    c.quantize = ""  # int8, fp8: weights rounded to 8 bits; int4; w8a8: int8, fast on a CPU
    c.cache_dtype = "auto"  # of the keys and values that tokens read: auto (as dtype); int8, as decoding with such a cache
    c.mesh = mesh()
    c.max_length = 0  # the most tokens the model may read at once; 0: its context
    c.window = 0  # tokens of a window; 0: max_length
    c.stride = 0  # tokens between windows; 0: half a window, so that each token sees at least that much before it
    return c
