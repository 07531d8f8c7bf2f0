"""Random models for the tests, and their weights under Meta's names for the reference."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from llama_jax.config import PRESETS, ModelConfig
from llama_jax.model import Params, param_shapes
from llama_jax.reference.llama import forward
from llama_jax.reference.rope import interleave

TINY = PRESETS["tiny"]
SMALL = dataclasses.replace(TINY, num_layers=2)
YARN = dict(rope_type="yarn", rope_factor=8.0, rope_original_length=32, rope_attention_factor=1.2)
CONFIGS: dict[str, ModelConfig] = {
    "tiny": TINY,
    "one key head per query head": dataclasses.replace(SMALL, num_kv_heads=6, norm_eps=1e-6),
    "one key head, tied": dataclasses.replace(SMALL, num_kv_heads=1, tied_head=True),
    "linear": dataclasses.replace(SMALL, rope_type="linear", rope_factor=4.0),
    "dynamic": dataclasses.replace(SMALL, rope_type="dynamic", rope_factor=2.0, rope_original_length=8),
    "yarn": dataclasses.replace(SMALL, **YARN),
    "llama3": dataclasses.replace(SMALL, rope_type="llama3", rope_theta=5e5, rope_factor=8.0, rope_original_length=64),
}


@functools.cache
def params_of(cfg: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Norms of 0.8 to 1.2; weights that keep the size of what they multiply, so that attention is far from uniform."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if len(shape.shape) == 1:
            return jnp.asarray(rng.uniform(0.8, 1.2, size=shape.shape), dtype)
        inputs = math.prod(shape.shape[1:]) if name == "o_proj" else shape.shape[-1]
        scale = 1.5 if name in ("q_proj", "k_proj") else 1.0
        return jnp.asarray(scale * inputs**-0.5 * rng.normal(size=shape.shape), dtype)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(cfg))


def tokens_of(cfg: ModelConfig, B: int, T: int, seed: int = 1) -> np.ndarray:
    """[B, T] int32."""
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, size=(B, T)).astype(np.int32)


def meta_layer(cfg: ModelConfig, params: Params, i: int) -> dict[str, np.ndarray]:
    """Layer i as the reference takes it: Meta's names, two axes, pairs of neighbours."""
    w = {name: np.asarray(value) for name, value in params["layers"][i].items()}
    D, F = cfg.embed_dim, cfg.mlp_dim
    return {
        "attention_norm": w["attn_norm"],
        "wq": interleave(w["q_proj"].reshape(-1, D), cfg.num_heads),
        "wk": interleave(w["k_proj"].reshape(-1, D), cfg.num_kv_heads),
        "wv": w["v_proj"].reshape(-1, D),
        "wo": w["o_proj"].reshape(D, -1),
        "ffn_norm": w["mlp_norm"],
        "w1": w["gate_proj"].reshape(F, D),
        "w3": w["up_proj"].reshape(F, D),
        "w2": w["down_proj"].reshape(D, F),
    }


def reference_of(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    length: int | None = None,
    trace: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """[T] -> [T, V] float64."""
    embedding, final_norm = np.asarray(params["embedding"]), np.asarray(params["final_norm"])
    head = embedding if cfg.tied_head else np.asarray(params["lm_head"])
    layer = functools.partial(meta_layer, cfg, params)
    return forward(cfg, tokens, layer, embedding, final_norm, head, positions, length, trace)
