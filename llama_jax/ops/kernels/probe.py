"""Whether the kernels work on a GPU or TPU, with its driver and this jax: found by running them."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.ops.attention import attend, attend_cached, attend_causal, cache_arrays, of_arrays
from llama_jax.ops.kernels import Kernels, cudnn, decode, flash, gemv, ragged, ragged_chunk, splash
from llama_jax.ops.linear import project
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.qarray import QArray, quantize, quantize_vectors
from llama_jax.ops.rope import rotate

ATTENTION = ("auto", "kernel", "plain")
LENGTH, HEADS, KV_HEADS = 256, 4, 2
FILLED, SLOTS = (700, 130), 1024  # of the rows of a cache: two of the kernel's blocks, and one
STARTS, TOKENS = (300, 0), 640  # of tokens that follow others in a cache: five blocks of queries, and two of slots
ROWS, INPUTS, EPS = 128, 384, 1e-5  # of weights that a row is multiplied with
LARGEST_ERROR = 0.02  # of a result's largest value; bfloat16 rounds to 0.004 of a number


class Case(NamedTuple):
    """A kernel's program and the same in plain JAX, their inputs, and what their results are called."""

    kernel: Callable
    plain: Callable
    inputs: tuple[Any, ...]
    names: tuple[str, ...]


def choose_attention(wanted: str, device: jax.Device, head_dim: int, note: Callable[[str], None]) -> bool:
    """The argument `kernels` of attention's functions (ops.attention, model.attention), for programs to find once and pass on.

    Args:
        wanted: kernel | plain | auto: on a GPU or TPU the kernel if it works, else plain, with a warning; elsewhere as kernel.
        device: of this process; on several processes all have the same kind.
        head_dim: of the model.
        note: takes a line for the user.

    Raises:
        LlamaError: `wanted` is none of these.
    """
    if wanted not in ATTENTION:
        raise LlamaError(ExitCode.BAD_CONFIG, f"attention is {wanted!r}, expected one of {', '.join(ATTENTION)}")
    supports = {"gpu": flash.supports, "tpu": splash.supports}.get(device.platform)
    if wanted != "auto" or supports is None or not supports(LENGTH, head_dim):
        return wanted != "plain"
    fault = find_fault(device, head_dim)
    if fault:
        note(
            f"warning: a kernel does not work on this {device.device_kind} ({fault}): the model runs without kernels, slower, "
            "and its attention takes memory for every pair of tokens"
        )
    return not fault


def choose_kernels(device: jax.Device, head_dim: int, note: Callable[[str], None]) -> Kernels:
    """choose_attention's "auto" for generation, which on a GPU reads prompts by cuDNN if that works.

    Args:
        note: takes a line for the user.
    """
    works = choose_attention("auto", device, head_dim, note)
    if not works or device.platform != "gpu" or not cudnn.supports(LENGTH, head_dim):
        return works
    if fault := find_cudnn_fault(device, head_dim):
        note(f"note: cuDNN's attention does not work on this {device.device_kind} ({fault}): prompts take longer without it")
        return True
    return "cudnn"


@functools.cache
def find_cudnn_fault(device: jax.Device, head_dim: int) -> str:
    """find_fault of cuDNN's attention, whose gradients nobody asks for."""
    draw = _drawing(device)
    inputs = tuple(draw(1, LENGTH, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def ours(*inputs: Array) -> list[Array]:
        return [cudnn.attend_cudnn(*inputs)]

    def plain(*inputs: Array) -> list[Array]:
        return [attend_causal(*inputs, kernels=False)]

    return _difference(ours, plain, inputs, ("out",))


@functools.cache
def find_fault(device: jax.Device, head_dim: int) -> str:
    """What is wrong with a kernel's result or gradients on a device, or the first line of the error; "" if nothing is."""
    cases = CASES[device.platform](_drawing(device), head_dim)
    return next(filter(None, itertools.starmap(_difference, cases)), "")


def _drawing(device: jax.Device) -> Callable[..., Array]:
    """From a shape to numbers, always the same ones in the same order."""
    rng = np.random.default_rng(0)
    return lambda *shape: jax.device_put(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), device)


def gpu_cases(draw: Callable[..., Array], head_dim: int) -> Iterator[Case]:
    """Of the kernels for GPUs, on numbers that `draw` makes in a shape."""
    yield _sequence(flash.attend_flash, draw, head_dim)
    q, k, v = (draw(1, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    angles = jnp.split(draw(1, head_dim).astype(jnp.float32), 2, axis=1)
    cache = (draw(1, KV_HEADS, LENGTH, head_dim) for _ in range(2))
    token = (q, k, v, *angles, *cache, np.array([100], np.int32))
    names = ("a token's out", "its cached key", "its cached value")
    yield Case(decode.rotate_append_attend, _attend_token, token, names)
    yield _tokens_of_a_cache(_attend_tokens_on_gpu, draw, head_dim)
    row, weight = draw(INPUTS), draw(2, ROWS, INPUTS)
    kinds = [weight, *(quantize(weight, 1, method) for method in ("int8", "int4"))]
    names = tuple(f"a row times {kind}" for kind in ("bfloat16", "int8", "int4"))
    yield Case(_multiply_rows, _multiply_rows_plainly, (row, row, kinds), names)


def tpu_cases(draw: Callable[..., Array], head_dim: int) -> Iterator[Case]:
    """Of the kernels for TPUs, on numbers that `draw` makes in a shape."""
    yield _sequence(splash.attend_splash, draw, head_dim)
    if ragged.supports(SLOTS, head_dim):
        q, *cache = (draw(len(FILLED), *shape, head_dim) for shape in ((HEADS,), (KV_HEADS, SLOTS), (KV_HEADS, SLOTS)))
        caches = [cache_arrays(*cache), cache_arrays(*map(quantize_vectors, cache))]
        names = tuple(f"a token's out of a cache in {kind}" for kind in ("bfloat16", "int8"))
        yield Case(_attend_caches, _attend_caches_plainly, (q, np.array(FILLED, np.int32), caches), names)
    if ragged_chunk.supports(TOKENS, SLOTS, head_dim, HEADS // KV_HEADS):
        yield _tokens_of_a_cache(_attend_tokens_on_tpu, draw, head_dim)


CASES = {"gpu": gpu_cases, "tpu": tpu_cases}


def _sequence(kernel: Callable, draw: Callable[..., Array], head_dim: int) -> Case:
    """A kernel of whole sequences, and its gradients."""
    inputs = tuple(draw(1, LENGTH, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    segments = np.repeat([[1, 2, 0]], [100, LENGTH - 107, 7], axis=1).astype(np.int32)

    def both(attend: Callable) -> Callable:
        def run(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
            out, pull = jax.vjp(lambda *a: attend(*a, segments), q, k, v)
            return out, *pull(d_out)

        return run

    plain = both(functools.partial(attend_causal, kernels=False))
    return Case(both(kernel), plain, inputs, ("out", "dq", "dk", "dv"))


def _tokens_of_a_cache(kernel: Callable, draw: Callable[..., Array], head_dim: int) -> Case:
    """Of tokens that follow others, in a cache of floats and one of int8."""
    shapes = (TOKENS, HEADS), (KV_HEADS, SLOTS), (KV_HEADS, SLOTS)
    q, *cache = (draw(len(STARTS), *shape, head_dim) for shape in shapes)
    caches = [cache_arrays(*cache), cache_arrays(*map(quantize_vectors, cache))]
    names = tuple(f"tokens' out of a cache in {kind}" for kind in ("bfloat16", "int8"))
    return Case(kernel, _attend_tokens_plainly, (q, np.array(STARTS, np.int32), caches), names)


def _attend_tokens_on_gpu(q: Array, starts: Array, caches: Sequence[tuple[Array, ...]]) -> list[Array]:
    return [flash.attend_flash_cached(q, *arrays[:2], starts, *arrays[2:]) for arrays in caches]


def _attend_tokens_on_tpu(q: Array, starts: Array, caches: Sequence[tuple[Array, ...]]) -> list[Array]:
    return [ragged_chunk.attend_ragged_chunk(q, *arrays[:2], starts, *arrays[2:]) for arrays in caches]


def _attend_tokens_plainly(q: Array, starts: Array, caches: Sequence[tuple[Array, ...]]) -> list[Array]:
    positions = starts[:, None] + jnp.arange(TOKENS)
    return [attend_cached(q, *of_arrays(arrays), positions, kernels=False) for arrays in caches]


def _attend_caches(q: Array, filled: Array, caches: Sequence[tuple[Array, ...]]) -> list[Array]:
    return [ragged.attend_ragged(q, *arrays[:2], filled, *arrays[2:]) for arrays in caches]


def _attend_caches_plainly(q: Array, filled: Array, caches: Sequence[tuple[Array, ...]]) -> list[Array]:
    return [attend_cached(q[:, None], *of_arrays(arrays), filled[:, None] - 1, kernels=False)[:, 0] for arrays in caches]


def _multiply_rows(x: Array, norm: Array, kinds: Sequence[Array | QArray]) -> list[Array]:
    matrices = [jax.tree.map(lambda part: part.reshape(2 * ROWS, -1), weight) for weight in kinds]
    return [gemv.multiply_row(x, weight, norm=norm, eps=EPS, gated=True) for weight in matrices]


def _multiply_rows_plainly(x: Array, norm: Array, kinds: Sequence[Array | QArray]) -> list[Array]:
    sums = (project("BTD,CFD->BTCF", rms_norm(x, norm, EPS)[None, None], weight)[0, 0] for weight in kinds)
    return [jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up for gate, up in sums]


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
