"""The model: parameters around ops, the key/value cache, the stack."""

from llama_jax.model.cache import KVCache, LayerCache, grow_cache
from llama_jax.model.stack import Params, forward, hidden_states, init_params, logits, param_axes, param_shapes

__all__ = [
    "KVCache", "LayerCache", "Params", "forward", "grow_cache", "hidden_states", "init_params", "logits",
    "param_axes", "param_shapes",
]  # fmt: skip
