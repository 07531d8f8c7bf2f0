"""One decoder layer: Flax Linen lives here and nowhere else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.config import ModelConfig
from llama_jax.model.cache import LayerCache, write
from llama_jax.ops.attention import attend
from llama_jax.ops.linear import project
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.rope import rotate

INIT_STDDEV = 0.02  # Meta published no initialisation; this is transformers' for Llama


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + swiglu(norm(x)) (Touvron et al. 2023, arXiv:2302.13971, 2.2)."""

    cfg: ModelConfig
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cos: Array, sin: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache]:
        """Returns x and the cache with this call's keys and values in it.

        Args:
            x: [B, T, D].
            positions: [B, T]; a token's place in its sequence, and in the cache; consecutive.
            cos, sin: [B, T, H/2], of these positions.
            cache: k, v [B, K, S, H]; without one, queries see the keys of this call, and these are the cache returned.
        """
        D, N, K, H, F = (getattr(self.cfg, f) for f in ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"))

        y = rms_norm(x, self.weight("attn_norm", (D,), ("norm",)), self.cfg.norm_eps)
        q = project("BTD,NHD->BTNH", y, self.weight("q_proj", (N, H, D), ("heads", "head_dim", "embed")))
        k = project("BTD,KHD->BTKH", y, self.weight("k_proj", (K, H, D), ("kv_heads", "head_dim", "embed")))
        v = project("BTD,KHD->BTKH", y, self.weight("v_proj", (K, H, D), ("kv_heads", "head_dim", "embed")))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            cache, key_positions = LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2)), positions[:, None, :]
        else:
            cache, key_positions = write(cache, k, v, positions[:, 0]), jnp.arange(cache.k.shape[2])
        y = attend(q, cache.k, cache.v, key_positions <= positions[:, :, None])
        x = x + project("BTNH,DNH->BTD", y, self.weight("o_proj", (D, N, H), ("embed", "heads", "head_dim")))

        y = rms_norm(x, self.weight("mlp_norm", (D,), ("norm",)), self.cfg.norm_eps)
        gate = project("BTD,FD->BTF", y, self.weight("gate_proj", (F, D), ("mlp", "embed")))
        up = project("BTD,FD->BTF", y, self.weight("up_proj", (F, D), ("mlp", "embed")))
        y = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
        return x + project("BTF,DF->BTD", y, self.weight("down_proj", (D, F), ("embed", "mlp"))), cache

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
        """A parameter under this name, its axes carrying logical names (llama_jax.sharding)."""
        init = nn.initializers.ones if axes == ("norm",) else nn.initializers.normal(INIT_STDDEV)
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
