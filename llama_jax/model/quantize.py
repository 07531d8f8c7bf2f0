"""Models in fewer bits (llama_jax.ops.qarray): the projections and the head, which a decode step reads whole; embedding (and
with it a tied head) and norms keep their dtype."""

from collections.abc import Callable
from typing import Any

from llama_jax.model.params import Params
from llama_jax.ops.qarray import QArray, W8A8Array, quantize

NUM_INPUTS = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 1, "up_proj": 1, "down_proj": 1, "lm_head": 1}


def quantize_params(params: Params, method: str = "int8") -> dict[str, Any]:
    """Arrays -> QArrays; method: a key of llama_jax.choices.METHODS."""
    return _map_named(params, lambda name, weight: quantize_leaf(name, weight, method))


def quantize_leaf(name: str, weight: Any, method: str = "int8") -> Any:
    """A weight by the last part of its name, as `quantize_params` has it."""
    return quantize(weight, NUM_INPUTS[name], method) if name in NUM_INPUTS else weight


def quantize_axes(axes: Params, method: str = "int8") -> dict[str, Any]:
    """Logical axes of the quantised tree."""
    kind = W8A8Array if method == "w8a8" else QArray

    def leaf(name: str, names: tuple[str, ...]) -> Any:
        return kind(names, (*names[: -NUM_INPUTS[name]], "group")) if name in NUM_INPUTS else names

    return _map_named(axes, leaf)


def _map_named(tree: Params, f: Callable[[str, Any], Any]) -> dict[str, Any]:
    layers = tree["layers"]
    mapped = {name: f(name, leaf) for name, leaf in tree.items() if name != "layers"}
    if isinstance(layers, list):
        return mapped | {"layers": [{name: f(name, leaf) for name, leaf in layer.items()} for layer in layers]}
    return mapped | {"layers": {name: f(name, leaf) for name, leaf in layers.items()}}
