"""Rounding for a text: layer after layer, each weight by GPTQ for what it is multiplied with when a model whose earlier layers
are rounded reads the text. One layer is in memory, and the text's activations [tokens, D]."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.checkpoint.layout import LAYER_NAMES
from llama_jax.config import ModelConfig
from llama_jax.model.block import Block
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.gptq import quantize_for
from llama_jax.ops.linear import project_each
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.qarray import QArray
from llama_jax.ops.rope import rope_angles

MAX_TOKENS = 2**16  # of the text; 7B's activations are 1 GB
MAX_LENGTH = 2048  # tokens of a row, as in the paper
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

Layer = Mapping[str, Array | QArray]


def rows_of(tokens: Sequence[int], cfg: ModelConfig) -> np.ndarray:
    """Tokens of a text in rows [R, T]; what does not fill the last row, and what is beyond MAX_TOKENS, is not used."""
    length = min(len(tokens), cfg.max_length, MAX_LENGTH)
    count = min(len(tokens) // length, MAX_TOKENS // length)
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


class Calibration:
    """The rounded projections and head of a model, made in the order of the layers; safe to use from several threads.

    A layer's are kept until they are taken.
    """

    def __init__(self, cfg: ModelConfig, read: Callable[[str], np.ndarray], rows: np.ndarray, method: str):
        """Nothing is read before the first is taken.

        Args:
            read: returns a weight in memory by its name.
            rows: [R, T] tokens.
            method: of llama_jax.ops.gptq.METHODS_FOR.
        """
        self._cfg, self._read, self._rows, self._method = cfg, read, rows, method
        self._lock = threading.Lock()
        self._layer = 0
        self._states: list[np.ndarray] = []  # of each row, [1, T, D] float32
        self._made: dict[str, QArray] = {}

    def take(self, name: str) -> QArray:
        """A rounded weight by its name; once."""
        with self._lock:
            while name not in self._made:
                self._advance()
            return self._made.pop(name)

    def _advance(self) -> None:
        """Rounds the next layer, or the head after the last, and runs the text through it."""
        if not self._states:
            table = self._read("embedding")
            self._states = [table[row].astype(np.float32)[None] for row in self._rows]
        if self._layer == self._cfg.num_layers:
            norm = jnp.asarray(self._read("final_norm"), jnp.float32)
            gram = sum(_gram(rms_norm(jnp.asarray(x), norm, self._cfg.norm_eps)) for x in self._states)
            self._made["lm_head"] = quantize_for(jnp.asarray(self._read("lm_head")), gram, 1, self._method)
            return
        prefix = f"layers.{self._layer}."
        layer = {leaf: jnp.asarray(self._read(prefix + leaf), jnp.float32) for leaf in LAYER_NAMES}
        grams: dict[str, Array] = {}
        for x in self._states:
            found = _inputs(self._cfg, layer, x)
            grams = {name: gram + grams[name] if grams else gram for name, gram in found.items()}
        for leaf, num_inputs in NUM_INPUTS.items():
            if leaf in layer:
                layer[leaf] = quantize_for(layer[leaf], grams[SAME_INPUTS.get(leaf, leaf)], num_inputs, self._method)
                self._made[prefix + leaf] = layer[leaf]
        self._states = [np.asarray(_run(self._cfg, layer, x)) for x in self._states]
        self._layer += 1


@functools.partial(jax.jit, static_argnums=0)
def _run(cfg: ModelConfig, layer: Layer, x: Array) -> Array:
    """x [1, T, D] after a layer."""
    return _block(cfg, layer, x, None)


@functools.partial(jax.jit, static_argnums=0)
def _inputs(cfg: ModelConfig, layer: Layer, x: Array) -> dict[str, Array]:
    """The sums of x x^T of what the layer's weights are multiplied with, by the first name of those that share it."""
    grams = {}

    def products(equations: dict[str, str], y: Array, weights: list[Array]) -> tuple[Array, ...]:
        grams[next(iter(equations))] = _gram(y)
        return project_each(tuple(equations.values()), y, weights)

    _block(cfg, layer, x, products)
    return grams


def _block(cfg: ModelConfig, layer: Layer, x: Array, products: Callable | None) -> Array:
    length = x.shape[1]
    positions = jnp.arange(length)[None]
    cos, sin = rope_angles(cfg, positions, length)
    with jax.default_matmul_precision("highest"):
        return Block(cfg, adapted=products, kernels=False).apply({"params": layer}, x, positions, cos, sin, None)[0]


@jax.jit
def _gram(y: Array) -> Array:
    """[B, T, in...] -> [I, I] float32."""
    flat = y.reshape(y.shape[0] * y.shape[1], -1)
    return jnp.einsum("MI,MJ->IJ", flat, flat, precision="highest")
