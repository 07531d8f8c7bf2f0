"""Attention of whole sequences on TPUs: jax's splash attention, which never holds the scores (Dao et al. 2022,
arXiv:2205.14135) and skips the blocks that no query may see."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

BLOCK = 512
SMALLEST_BLOCK = 128  # of a TPU's lanes


def supports(length: int, head_dim: int) -> bool:
    """Whether sequences of this length and heads of this width can be cut into the kernel's blocks."""
    return length % SMALLEST_BLOCK == 0 and head_dim % 64 == 0


def attend_splash(q: Array, k: Array, v: Array, segment_ids: Array | None, *, interpret: bool = False) -> Array:
    """ops.attention.attend_causal by the kernel; what it saves for the backward pass is named "attention" (for remat).

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H]; segment_ids: [B, T] or None.
        interpret: run it in JAX operations (for tests on a CPU).
    """
    return _at_default_precision(functools.partial(_attend, interpret=interpret))(q, k, v, segment_ids)


def _attend(q: Array, k: Array, v: Array, segment_ids: Array | None, *, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    T, N, H = q.shape[1:]
    block = BLOCK
    while T % block:
        block //= 2
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((T, T))] * N), block_sizes=sizes, residual_checkpoint_name="attention", interpret=interpret
    )
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, SegmentIds(segment_ids, segment_ids))
    return checkpoint_name(out.swapaxes(1, 2), "attention").astype(v.dtype)


def _at_default_precision(attend: Callable) -> Callable:
    """attend(q, k, v, segment_ids) and its gradients, whatever jax_default_matmul_precision says: XLA:TPU compiles no kernel
    that multiplies bfloat16 at another."""

    @jax.custom_vjp
    def run(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        with jax.default_matmul_precision("default"):
            return attend(q, k, v, segment_ids)

    def forward(q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, Callable]:
        with jax.default_matmul_precision("default"):
            return jax.vjp(lambda *qkv: attend(*qkv, segment_ids), q, k, v)

    def backward(pull: Callable, d_out: Array) -> tuple[Array, Array, Array, None]:
        with jax.default_matmul_precision("default"):
            return *pull(d_out), None

    run.defvjp(forward, backward)
    return run
