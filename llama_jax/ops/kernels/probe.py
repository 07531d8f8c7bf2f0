"""Whether the attention kernels work on a GPU, with its driver and this jax: found by running them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import flash

ATTENTION = ("auto", "kernel", "plain")
LENGTH, HEADS, KV_HEADS = 256, 4, 2
LARGEST_ERROR = 0.02  # of a result's largest value; bfloat16 rounds to 0.004 of a number


def choose_attention(wanted: str, device: jax.Device, head_dim: int, note: Callable[[str], None]) -> bool:
    """The argument `kernels` of ops.attention.attend_causal, for programs to find once and pass on.

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
            f"warning: the attention kernel does not work on this {device.device_kind} ({fault}): attention is computed "
            "without it, slower, and with memory for every pair of tokens"
        )
    return not fault


@functools.cache
def find_fault(device: jax.Device, head_dim: int) -> str:
    """What is wrong with the kernel's result or gradients on a device, or the first line of the error; "" if nothing is."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.normal(size=(1, LENGTH, heads, head_dim)) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    inputs = jax.device_put([jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, d_out)], device)
    segments = jax.device_put(np.repeat([[1, 2, 0]], [100, LENGTH - 107, 7], axis=1).astype(np.int32), device)

    def run(attend: Callable) -> list[np.ndarray]:
        def both(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
            out, pull = jax.vjp(lambda *a: attend(*a, segments), q, k, v)
            return out, *pull(d_out)

        return [np.asarray(a, np.float32) for a in jax.jit(both)(*inputs)]

    try:
        results = run(flash.attend_flash)
    except Exception as error:  # a compiler's, a driver's or jax's own
        return (str(error).strip() or repr(error)).splitlines()[0]
    for name, ours, wanted in zip(
        ("out", "dq", "dk", "dv"), results, run(functools.partial(attend_causal, kernels=False)), strict=True
    ):
        if not np.abs(ours - wanted).max() <= LARGEST_ERROR * np.abs(wanted).max():
            return f"{name} is wrong by {np.abs(ours - wanted).max():.2g} of {np.abs(wanted).max():.2g}"
    return ""
