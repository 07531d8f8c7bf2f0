"""Whether the kernels work on a GPU, with its driver and this jax: found by running them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.ops.attention import attend, attend_causal
from llama_jax.ops.kernels import decode, flash, gemv
from llama_jax.ops.linear import project_each
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.qarray import QArray, quantize
from llama_jax.ops.rope import rotate

ATTENTION = ("auto", "kernel", "plain")
LENGTH, HEADS, KV_HEADS = 256, 4, 2
ROWS, INPUTS, EPS = 128, 384, 1e-5  # of weights that a row is multiplied with
LARGEST_ERROR = 0.02  # of a result's largest value; bfloat16 rounds to 0.004 of a number


def choose_attention(wanted: str, device: jax.Device, head_dim: int, note: Callable[[str], None]) -> bool:
    """The argument `kernels` of attention's functions (ops.attention, model.attention), for programs to find once and pass on.

    Args:
        wanted: kernel | plain | auto: on a GPU the kernel if it works, else plain, with a warning; elsewhere as kernel.
        device: of this process; on several processes all have the same kind.
        head_dim: of the model.
        note: takes a line for the user.

    Raises:
        LlamaError: `wanted` is none of these.
    """
    if wanted not in ATTENTION:
        raise LlamaError(ExitCode.BAD_CONFIG, f"attention is {wanted!r}, expected one of {', '.join(ATTENTION)}")
    if wanted != "auto" or device.platform != "gpu" or not flash.supports(LENGTH, head_dim):
        return wanted != "plain"
    fault = find_fault(device, head_dim)
    if fault:
        note(
            f"warning: a kernel does not work on this {device.device_kind} ({fault}): the model runs without kernels, slower, "
            "and its attention takes memory for every pair of tokens"
        )
    return not fault


@functools.cache
def find_fault(device: jax.Device, head_dim: int) -> str:
    """What is wrong with a kernel's result or gradients on a device, or the first line of the error; "" if nothing is."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return jax.device_put(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), device)

    q, k, v, d_out = (draw(1, LENGTH, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    segments = jax.device_put(np.repeat([[1, 2, 0]], [100, LENGTH - 107, 7], axis=1).astype(np.int32), device)

    def both(attend: Callable) -> Callable:
        def run(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
            out, pull = jax.vjp(lambda *a: attend(*a, segments), q, k, v)
            return out, *pull(d_out)

        return run

    plain = both(functools.partial(attend_causal, kernels=False))
    fault = _difference(both(flash.attend_flash), plain, (q, k, v, d_out), ("out", "dq", "dk", "dv"))
    cache = (draw(1, KV_HEADS, LENGTH, head_dim) for _ in range(2))
    token = (
        q[:, 0],
        k[:, 0],
        v[:, 0],
        *jnp.split(draw(1, head_dim).astype(jnp.float32), 2, axis=1),
        *cache,
        segments[:, 0] + 99,
    )
    fault = fault or _difference(
        decode.rotate_append_attend, _attend_token, token, ("a token's out", "its cached key", "its cached value")
    )
    row, weights = draw(INPUTS), [draw(ROWS, INPUTS) for _ in range(2)]
    kinds = [weights, *([quantize(weight, 1, method) for weight in weights] for method in ("int8", "int4"))]
    names = tuple(f"a row times {kind}" for kind in ("bfloat16", "int8", "int4"))
    return fault or _difference(_multiply_rows, _multiply_rows_plainly, (row, row, kinds), names)


def _multiply_rows(x: Array, norm: Array, kinds: Sequence[Sequence[Array | QArray]]) -> list[Array]:
    return [gemv.multiply_row(x, weights, norm=norm, eps=EPS, gated=True)[0] for weights in kinds]


def _multiply_rows_plainly(x: Array, norm: Array, kinds: Sequence[Sequence[Array | QArray]]) -> list[Array]:
    x = rms_norm(x, norm, EPS)[None, None]
    sums = (project_each(("BTD,FD->BTF",) * 2, x, weights) for weights in kinds)
    return [(jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up)[0, 0] for gate, up in sums]


def _attend_token(
    q: Array, k: Array, v: Array, cos: Array, sin: Array, k_cache: Array, v_cache: Array, positions: Array
) -> tuple[Array, Array, Array]:
    """decode.rotate_append_attend of one row, in plain JAX."""
    q, k = (rotate(x[:, None], cos[:, None], sin[:, None]) for x in (q, k))
    k_cache, v_cache = k_cache.at[:, :, positions[0]].set(k[:, 0]), v_cache.at[:, :, positions[0]].set(v)
    return attend(q, k_cache, v_cache, (jnp.arange(LENGTH) <= positions)[None, None])[:, 0], k_cache, v_cache


def _difference(by_kernel: Callable, plain: Callable, inputs: tuple[Any, ...], names: tuple[str, ...]) -> str:
    try:
        results = [np.asarray(a, np.float32) for a in jax.jit(by_kernel)(*inputs)]
    except Exception as error:  # a compiler's, a driver's or jax's own
        return (str(error).strip() or repr(error)).splitlines()[0]
    for name, ours, wanted in zip(names, results, jax.jit(plain)(*inputs), strict=True):
        wanted = np.asarray(wanted, np.float32)
        if not np.abs(ours - wanted).max() <= LARGEST_ERROR * np.abs(wanted).max():
            return f"{name} is wrong by {np.abs(ours - wanted).max():.2g} of {np.abs(wanted).max():.2g}"
    return ""
