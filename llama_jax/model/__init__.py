"""The model: parameters around ops, the key/value cache, the stack."""

from llama_jax.model.cache import KVCache, LayerCache, cache_axes, empty_cache, grow_cache, num_slots, round_cache
from llama_jax.model.lora import LoraConfig, adapter_axes, adapter_shapes, init_adapter, merge_adapter
from llama_jax.model.params import Params, init_params, param_axes, param_shapes, stack_layers, unstack_layers
from llama_jax.model.quantize import quantize_axes, quantize_leaf, quantize_params
from llama_jax.model.stack import REMAT_POLICIES, forward, head, hidden_states, logits, train_states

__all__ = [
    "REMAT_POLICIES", "KVCache", "LayerCache", "LoraConfig", "Params", "adapter_axes", "adapter_shapes",
    "cache_axes", "empty_cache", "forward", "grow_cache", "head", "hidden_states", "init_adapter", "init_params", "logits",
    "merge_adapter", "num_slots", "param_axes", "param_shapes", "quantize_axes", "quantize_leaf", "quantize_params",
    "round_cache", "stack_layers", "train_states", "unstack_layers",
]  # fmt: skip
