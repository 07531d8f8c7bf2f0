"""Two models side by side: python -m infer.compare --config=configs/compare.py --a DIR --b DIR --output report.html."""

import ml_collections
from ml_collections.config_dict import placeholder

from configs.sample import mesh, sampling


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.a = side()  # the one that is compared with: its probabilities weigh the divergence
    c.b = side()
    c.mesh = mesh()  # of both, which are in memory one after the other
    c.max_length = 0  # tokens of prompt and answer, and of a window at most; 0: the shorter one of the models' contexts
    c.window = 0  # tokens of a text that are read at once; 0: max_length, at most 1,024
    c.stride = 0  # tokens between windows; 0: half a window, so that each token sees at least that much before it
    c.max_tokens = 4096  # of the text; a's logits wait on disk, 4 bytes x vocabulary for each (0.5 GB of Llama 2's)
    c.max_new_tokens = 128  # of a sample; 0: as many as the context holds
    c.batch_size = 16  # samples made at once
    c.sampling = sampling()  # of the seeded samples; the greedy ones have temperature 0
    for name in ("stop", "stop_ids", "logprobs"):  # samples end by tokens alone, and are scored whole
        del c.sampling[name]
    return c


def side() -> ml_collections.ConfigDict:
    """One of the two models; the keys are those of configs/sample.py."""
    c = ml_collections.ConfigDict()
    c.checkpoint = ""  # or --a, --b
    c.adapter = ""  # a LoRA run or PEFT's folder, on that checkpoint; a LoRA run by itself is a checkpoint, too
    c.tokenizer = placeholder(str)  # its file or folder, when the checkpoint has none
    c.dtype = "auto"  # of weights and activations: auto (as stored), bfloat16, float32, float16
    c.quantize = ""  # int8, fp8: weights rounded to 8 bits; int4; w8a8: int8, fast on a CPU
    c.cache_dtype = "auto"  # of keys and values: auto (as dtype), int8
    return c
