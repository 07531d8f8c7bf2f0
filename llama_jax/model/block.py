"""One decoder layer: Flax Linen lives here and nowhere else."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.model.attention import attend_and_write
from llama_jax.model.cache import LayerCache, repeat_heads
from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import Kernels
from llama_jax.ops.linear import WEIGHT_AXES, project_each
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import rotate

INIT_STDDEV = 0.02  # Meta published no initialisation; this is transformers' for Llama


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + swiglu(norm(x)) (Touvron et al. 2023, arXiv:2302.13971, 2.2).

    Attributes:
        adapted: makes the products instead of `project_each`, from equations by name, x and weights (llama_jax.model.lora).
        kernels: whether attention may use the platform's kernels (the functions say which).
    """

    cfg: ModelConfig
    param_dtype: jnp.dtype = jnp.float32
    adapted: Callable[[dict[str, str], Array, list[Array]], tuple[Array, ...]] | None = None
    kernels: Kernels = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        cos: Array,
        sin: Array,
        cache: LayerCache | None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, LayerCache]:
        """Returns x and the cache with this call's keys and values in it.

        Args:
            x: [B, T, D].
            positions: [B, T]; a token's place in its sequence, and in the cache; consecutive.
            cos, sin: [B, T, H/2], of these positions.
            cache: k, v [B, K', S, H]; without one, queries see the keys of this call, and these are the cache returned.
            segment_ids: [B, T] of rows that hold several sequences; without a cache.
        """
        q, k, v = self.project_qkv(self.norm("attn_norm", x))
        if cache is None:
            q, k, v = rotate(q, cos, sin), repeat_heads(rotate(k, cos, sin)), repeat_heads(v)
            y = attend_causal(q, k, v, segment_ids, kernels=self.kernels)
            cache = LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
        else:
            y, cache = attend_and_write(q, k, v, cos, sin, cache, positions, kernels=self.kernels)
        x = x + self.project(y, o_proj="BTNH,DNH->BTD")[0]

        gate, up = self.project_gate_up(self.norm("mlp_norm", x))
        y = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
        return x + self.project(y, down_proj="BTF,DF->BTD")[0], cache

    def norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.weight(name, (self.cfg.embed_dim,), ("norm",)), self.cfg.norm_eps)

    def project_qkv(self, x: Array) -> tuple[Array, ...]:
        """[B, T, D] -> q [B, T, N, H], k and v [B, T, K, H]."""
        return self.project(x, q_proj="BTD,NHD->BTNH", k_proj="BTD,KHD->BTKH", v_proj="BTD,KHD->BTKH")

    def project_gate_up(self, x: Array) -> tuple[Array, ...]:
        """[B, T, D] -> two of [B, T, F]."""
        return self.project(x, gate_proj="BTD,FD->BTF", up_proj="BTD,FD->BTF")

    def project(self, x: Array, **equations: str) -> tuple[Array, ...]:
        """Products of x with the weights of these names; results carry the names, too, for policies that save them.

        The letters of an equation are the shape of its weight, and its logical axes.
        """
        sizes = self.sizes()
        weights = []
        for name, equation in equations.items():
            letters = equation.split("->")[0].split(",")[1]
            axes = tuple(WEIGHT_AXES[letter] for letter in letters)
            weights.append(self.weight(name, tuple(sizes[letter] for letter in letters), axes))
        if self.adapted is None:
            results = project_each(tuple(equations.values()), x, weights)
        else:
            results = self.adapted(equations, x, weights)
        return tuple(checkpoint_name(y, name) for name, y in zip(equations, results, strict=True))

    def sizes(self) -> dict[str, int]:
        """Of the letters of equations."""
        c = self.cfg
        return {"D": c.embed_dim, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim, "F": c.mlp_dim}

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
        """A parameter under this name, its axes carrying logical names (llama_jax.sharding)."""
        init = nn.initializers.ones if axes == ("norm",) else nn.initializers.normal(INIT_STDDEV)
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
