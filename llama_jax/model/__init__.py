"""The model: parameters around ops, the key/value cache, the stack."""

from llama_jax.model.cache import CACHE_AXES, KVCache, LayerCache, grow_cache
from llama_jax.model.params import Params, init_params, param_axes, param_shapes, stack_layers, unstack_layers
from llama_jax.model.quantize import quantize_axes, quantize_leaf, quantize_params
from llama_jax.model.stack import REMAT_POLICIES, forward, head, hidden_states, logits, train_states

__all__ = [
    "CACHE_AXES", "REMAT_POLICIES", "KVCache", "LayerCache", "Params", "forward", "grow_cache", "head", "hidden_states",
    "init_params", "logits", "param_axes", "param_shapes", "quantize_axes", "quantize_leaf", "quantize_params",
    "stack_layers", "train_states", "unstack_layers",
]  # fmt: skip
