"""Low-rank adapters beside the weights: what they are, their trees, and adding them to the weights.

A tree like the parameters': {"layers": [{"q_proj": {"a": [R, in...], "b": [out..., R]}}]}, with "magnitude" [out...] for DoRA,
or one dict of [L, ...] for scanned training. All float32; llama_jax.ops.lora has the mathematics.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model.params import Params, param_axes, param_shapes, unstack_layers
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.lora import Adapter, project_adapted
from llama_jax.ops.qarray import QArray, dequantize

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights have an adapter, and how it acts: y = W x + scale * B A dropout(x).

    Attributes:
        rank: R, the width between A and B; 0 for no adapter.
        alpha: scale is alpha / rank (Hu et al. 2021, arXiv:2106.09685),
        rslora: or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: share of A's inputs that a training step sets to zero; every weight of every layer draws its own.
        targets: names of the adapted projections, kept in the order of TARGETS.
        dora: rows are rescaled to a trained magnitude (Liu et al. 2024, arXiv:2402.09353).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        if isinstance(self.targets, str) or (unknown := [name for name in self.targets if name not in TARGETS]):
            given = repr(self.targets) if isinstance(self.targets, str) else ", ".join(map(repr, unknown))
            raise LlamaError(ExitCode.BAD_CONFIG, f"lora.targets has {given}, expected names among {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in self.targets))
        if type(self.rank) is not int or self.rank < 0:
            raise LlamaError(ExitCode.BAD_CONFIG, f"lora.rank is {self.rank!r}, expected a whole number, or 0 for no adapter")
        if self.rank and not self.targets:
            raise LlamaError(ExitCode.BAD_CONFIG, f"lora.targets is empty, expected some of {', '.join(TARGETS)}")
        if not 0 < self.alpha < math.inf:
            raise LlamaError(ExitCode.BAD_CONFIG, f"lora.alpha is {self.alpha}, expected a positive number")
        if not 0 <= self.dropout < 1:
            raise LlamaError(ExitCode.BAD_CONFIG, f"lora.dropout is {self.dropout}, expected 0 or more, below 1")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init_adapter(cfg: ModelConfig, lora: LoraConfig, params: Params | None, key: Array, *, scan: bool) -> dict[str, Any]:
    """An adapter that changes nothing yet: A uniform in +-1 / sqrt(inputs), B zero, magnitudes those of the weights.

    A is PEFT's kaiming_uniform_(a=sqrt(5)); values depend on key, layer and projection only, not on the other targets.

    Args:
        params: in the form that `scan` says; read for DoRA only.
        scan: layers as one dict of [L, ...].
    """
    shapes = _layer(cfg, lora, lambda shape, axes: shape)

    def init(key: Array) -> dict[str, Any]:
        keys, layer = _fold_in_each(key, len(TARGETS)), {}
        for name, parts in shapes.items():
            bound = math.prod(parts["a"][1:]) ** -0.5
            a = jax.random.uniform(keys[TARGETS.index(name)], parts["a"], minval=-bound, maxval=bound)
            layer[name] = {"a": a, "b": jnp.zeros(parts["b"])}
        return layer

    stacked = {"layers": jax.vmap(init)(_fold_in_each(key, cfg.num_layers))}
    adapter = stacked if scan else unstack_layers(stacked)
    if not lora.dora:
        return adapter

    def with_magnitudes(weights: Params, layer: Mapping[str, Adapter]) -> dict[str, Any]:
        return {name: {**parts, "magnitude": _row_norms(weights[name], NUM_INPUTS[name])} for name, parts in layer.items()}

    return {"layers": _per_layer(with_magnitudes, params["layers"], adapter["layers"])}


def adapter_shapes(cfg: ModelConfig, lora: LoraConfig, *, scan: bool) -> dict[str, Any]:
    """The tree of ShapeDtypeStructs."""
    L = (cfg.num_layers,) if scan else ()
    layer = _layer(cfg, lora, lambda shape, axes: jax.ShapeDtypeStruct((*L, *shape), jnp.float32))
    return {"layers": layer if scan else [jax.tree.map(lambda leaf: leaf, layer) for _ in range(cfg.num_layers)]}


def adapter_axes(cfg: ModelConfig, lora: LoraConfig, *, scan: bool) -> dict[str, Any]:
    """The same tree with a tuple of logical axis names in the place of each array."""
    layer = _layer(cfg, lora, lambda shape, axes: (*(("layers",) if scan else ()), *axes))
    return {"layers": layer if scan else [{name: dict(parts) for name, parts in layer.items()} for _ in range(cfg.num_layers)]}


def merge_adapter(cfg: ModelConfig, params: Params, adapter: Params, lora: LoraConfig) -> dict[str, Any]:
    """Parameters that compute what weights and adapter compute together: W + scale * B A, rows rescaled for DoRA.

    Sums are float32 and rounded once, to the weight's dtype. A weight in int8 becomes one in the embedding's dtype, since
    rounding it to 8 bits again would lose most of what the adapter learnt.
    """
    dtype = params["embedding"].dtype

    def merge(weights: Params, layer: Mapping[str, Adapter]) -> dict[str, Any]:
        merged = {name: _merged(weights[name], parts, lora.scale, NUM_INPUTS[name], dtype) for name, parts in layer.items()}
        return {**weights, **merged}

    return {**params, "layers": _per_layer(merge, params["layers"], adapter["layers"])}


class LayerAdapter:
    """What Block calls for its products: those of one layer's weights and adapters."""

    def __init__(self, lora: LoraConfig, adapter: Mapping[str, Adapter], seed: Array | None):
        """seed: of this layer's dropout, uint32 [2]; None for none."""
        self._lora, self._adapter, self._seed = lora, adapter, seed

    def __call__(self, equations: Mapping[str, str], x: Array, weights: list[Array | QArray]) -> tuple[Array, ...]:
        """equations: by the weights' names."""
        seeds = None
        if self._seed is not None:
            seeds = [self._seed + jnp.array([0, TARGETS.index(name)], jnp.uint32) for name in equations]
        adapters = [self._adapter.get(name) for name in equations]
        return project_adapted(tuple(equations.values()), x, weights, adapters, self._lora.scale, self._lora.dropout, seeds)


def layer_seeds(lora: LoraConfig, key: Array | None, num_layers: int) -> Array | None:
    """Seeds [L, 2] of the layers' dropout; None when there is none."""
    return None if key is None or not lora.dropout else jax.random.bits(key, (num_layers, 2), jnp.uint32)


def _fold_in_each(key: Array, count: int) -> Array:
    """Keys [count], of 0, 1, ..."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


@functools.cache
def _weights(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of a layer's weights; finding them traces the layer."""
    shapes, axes = param_shapes(cfg)["layers"][0], param_axes(cfg)["layers"][0]
    return {name: (shapes[name].shape, axes[name]) for name in TARGETS}


def _layer(cfg: ModelConfig, lora: LoraConfig, leaf: Callable[[tuple[int, ...], tuple[str, ...]], Any]) -> dict[str, Any]:
    """leaf(shape, axes) of every array of a layer's adapter."""
    weights, layer = _weights(cfg), {}
    for name in lora.targets if lora.rank else ():
        shape, names = weights[name]
        outputs = len(names) - NUM_INPUTS[name]
        layer[name] = {
            "a": leaf((lora.rank, *shape[outputs:]), ("lora_rank", *names[outputs:])),
            "b": leaf((*shape[:outputs], lora.rank), (*names[:outputs], "lora_rank")),
        }
        if lora.dora:
            layer[name]["magnitude"] = leaf(shape[:outputs], names[:outputs])
    return layer


def _per_layer(f: Callable[[Params, Params], dict[str, Any]], weights: Any, adapter: Any) -> Any:
    """f of each layer's weights and adapter, layers a list or stacked."""
    if isinstance(weights, list):
        return [f(*pair) for pair in zip(weights, adapter, strict=True)]
    return jax.vmap(f)(weights, adapter)


def _merged(weight: Array | QArray, adapter: Adapter, scale: float, num_inputs: int, dtype: DTypeLike) -> Array:
    dtype = dtype if isinstance(weight, QArray) else weight.dtype
    product = jnp.tensordot(adapter["b"], adapter["a"], axes=1, precision=jax.lax.Precision.HIGHEST)
    total = _as_float(weight) + scale * product
    if "magnitude" in adapter:
        ratio = adapter["magnitude"] / _row_norms(total, num_inputs)
        total *= ratio.reshape(*ratio.shape, *[1] * num_inputs)
    return total.astype(dtype)


def _row_norms(weight: Array | QArray, num_inputs: int) -> Array:
    """Euclidean norm over the inputs of each output."""
    weight = _as_float(weight)
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(weight.ndim - num_inputs, weight.ndim))))


def _as_float(weight: Array | QArray) -> Array:
    if isinstance(weight, QArray):
        return dequantize(weight, jnp.float32)
    return weight.astype(jnp.float32)
