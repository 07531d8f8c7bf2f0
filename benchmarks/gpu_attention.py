"""Attention kernels on the GPU of this machine: python benchmarks/gpu_attention.py [seconds] -> JSON lines.

First whether the kernel (llama_jax.ops.kernels.flash) is attention, forward and backward; then what the candidates take at two
shapes, a dense and a grouped one, packed and not; then the sizes of the kernel's tiles, one kernel at a time, from which its
default is chosen. cuDNN takes no segments, and is the yardstick of whole rows. FLOPs count the lower triangle only: 2 products
of 2 H per visible pair forward, 5 backward (one of them scores again), as in Dao 2023, section 4; of packed rows, too, so a
kernel that skips what is in other segments may be above the card's peak. A case that fails says why and the others go on; what
there is no time left for is named.
"""

import concurrent.futures
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import flash
from llama_jax.ops.kernels.flash import TILES, Tile, attend_flash
from llama_jax.ops.kernels.probe import find_fault

SECONDS = 85
ITERATIONS = 10
WORKERS = 12  # compilations at a time
COMPILE_SHARE = 0.65  # of the time
CHECKS = [  # B, T, N, K, H, segments in a row (0: not packed)
    (2, 512, 8, 1, 128, 5),
    (2, 1024, 8, 2, 64, 7),
    (1, 2048, 8, 8, 128, 3),
    (1, 4096, 8, 2, 128, 9),
    (1, 4096, 8, 8, 64, 0),
]
SHAPES = {"7B": (4, 4096, 32, 32, 128), "TinyLlama": (8, 2048, 32, 4, 64)}  # B, T, N, K, H
PACKED = 5  # segments in a row of the timed shapes
FORWARD_TILES = [Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)]
DQ_TILES = [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)]
DKV_TILES = [Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(32, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)]


def main() -> None:
    start, device = time.monotonic(), jax.devices()[0]
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    say(case="device", kind=device.device_kind, jax=jax.__version__, platform=device.platform)
    for head_dim in flash.HEAD_DIMS:
        fault = find_fault(device, head_dim)
        say(case="probe", head_dim=head_dim, fault=fault, seconds=round(time.monotonic() - start, 1))
    cases = [*checks(), *candidates(), *tile_sizes()]
    pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
    compilations = [pool.submit(prepare, build) for _, build, _ in cases]
    # All before the first is timed: compilers try out products on the GPU.
    concurrent.futures.wait(compilations, timeout=COMPILE_SHARE * seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    say(case="compiled", seconds=round(time.monotonic() - start, 1))
    for (name, _, measure), compilation in zip(cases, compilations, strict=True):
        if not compilation.done() or compilation.cancelled() or time.monotonic() - start > seconds:
            say(**name, error="no time left")
            continue
        try:
            program, args, compile_seconds = compilation.result()
            say(**name, compile_seconds=round(compile_seconds, 1), **measure(program, args))
        except Exception as error:  # of one case: the others answer
            say(**name, error=(str(error).strip() or repr(error))[:500])
    say(case="done", seconds=round(time.monotonic() - start, 1))
    os._exit(0)  # without waiting for compilations that came too late


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def prepare(build: Callable[[], tuple[Callable, tuple]]) -> tuple[Callable, tuple, float]:
    """The compiled program, its arguments (described), and the seconds it took."""
    start = time.monotonic()
    function, args = build()
    return jax.jit(function).lower(*args).compile(), args, time.monotonic() - start


def draw(args: Any, seed: int = 0) -> Any:
    """Arrays of described shapes: floats normal, integers as they are (NumPy)."""
    leaves, tree = jax.tree.flatten(args)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(leaf: Any, key: jax.Array) -> jax.Array:
        is_given = isinstance(leaf, np.ndarray)
        return jnp.asarray(leaf) if is_given else jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [fill(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def inputs(shape: tuple[int, ...], segments: int) -> tuple:
    """q, k, v, cotangent, segment ids or None."""
    B, T, N, K, H = shape
    q, kv = (jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K))
    return q, kv, kv, q, segment_ids(B, T, segments) if segments else None


def segment_ids(B: int, T: int, count: int) -> np.ndarray:
    """Segments of random lengths, and a little padding."""
    rng = np.random.default_rng(0)
    starts = np.sort(rng.integers(1, T - 16, (B, count - 1)), axis=1)
    ids = 1 + (np.arange(T)[None, :, None] >= starts[:, None, :]).sum(axis=2)
    return np.where(np.arange(T) >= T - 16, 0, ids).astype(np.int32)


def both(attend: Callable, *, with_segments: bool = True) -> Callable:
    """out, dq, dk, dv."""

    def run(q, k, v, d_out, segments):
        out, pull = jax.vjp(lambda *a: attend(*a, segments) if with_segments else attend(*a), q, k, v)
        return out, *pull(d_out)

    return run


plain = functools.partial(attend_causal, kernels=False)


def checks() -> list:
    """The largest errors of the kernel and of plain attention in bfloat16, each against plain attention in float32."""

    def compare(*args):
        floats = [a.astype(jnp.float32) for a in args[:4]]
        with jax.default_matmul_precision("highest"):
            exact = both(plain)(*floats, args[4])
        errors = [
            [jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max() for a, b in zip(both(f)(*args), exact, strict=True)]
            for f in (attend_flash, plain)
        ]
        return [jnp.stack(e) for e in errors]

    def measure(program, args):
        kernel, other = (dict(zip(("out", "dq", "dk", "dv"), e.tolist(), strict=True)) for e in program(*draw(args)))
        ratio = max(kernel[name] / max(other[name], 2**-9) for name in kernel)
        return {"kernel": rounded(kernel), "plain": rounded(other), "right": bool(ratio < 3)}

    return [
        ({"case": "check", "shape": check[:5], "segments": check[5]}, lambda c=check: (compare, inputs(c[:5], c[5])), measure)
        for check in CHECKS
    ]


def candidates() -> list:
    cases = []
    for name, shape in SHAPES.items():
        for candidate, attend, takes_segments, packings in (
            ("flash", attend_flash, True, (0, PACKED)),
            ("cudnn", cudnn, False, (0,)),
            ("plain", plain, True, (0,)),
            ("jax pallas", jax_pallas, True, (PACKED,)),
        ):
            for segments in packings:
                rows = 1 if candidate == "plain" else shape[0]  # of scores: 2 GiB a row
                named = {"case": "time", "shape": name, "rows": rows, "candidate": candidate, "segments": segments}
                args = inputs((rows, *shape[1:]), segments)
                forward = functools.partial(run_forward, attend, takes_segments)
                backward = both(attend, with_segments=takes_segments)
                cases.append((named | {"pass": "forward"}, lambda f=forward, a=args: (f, a), timed(args, 2)))
                cases.append((named | {"pass": "both"}, lambda f=backward, a=args: (f, a), timed(args, 7)))
    return cases


def run_forward(attend: Callable, with_segments: bool, q, k, v, d_out, segments):
    return attend(q, k, v, segments) if with_segments else attend(q, k, v)


def cudnn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def jax_pallas(q, k, v, segments):
    """Its default blocks for the backward pass are 32 x 32; keys and values are repeated."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    sizes = BlockSizes(block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
    return mha(q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=True, block_sizes=sizes)


def tile_sizes() -> list:
    """Each of the three kernels at several tiles, packed, at both shapes."""
    cases = []
    for name, shape in SHAPES.items():
        B, T, N, _, _ = shape
        q, k, v, d_out, segments = inputs(shape, PACKED)
        sums = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        for kind, tiles, products in (("forward", FORWARD_TILES, 2), ("dq", DQ_TILES, 3), ("dkv", DKV_TILES, 4)):
            for tile in tiles:
                args = (q, k, v, segments) if kind == "forward" else (q, k, v, d_out, sums, sums, segments)
                kernel = functools.partial(run_kernel, kind, tile)
                named = {"case": "tile", "shape": name, "kernel": kind, "tile": tile, "default": tile == getattr(TILES, kind)}
                cases.append((named, lambda f=kernel, a=args: (f, a), timed(args, products)))
    return cases


def run_kernel(kind: str, tile: Tile, q, k, v, *rest):
    run = {"forward": flash._forward, "dq": flash._d_queries, "dkv": flash._d_keys_values}[kind]
    spans = flash.segment_spans(rest[-1], TILES._replace(**{kind: tile}))
    return run(q, k, v, *rest[:-1], spans, tile=tile, interpret=False)


def timed(args: tuple, products: int) -> Callable:
    """Measures milliseconds of one call and TFLOP/s of so many products of the lower triangle."""
    B, T, N, H = args[0].shape

    def measure(program: Callable, args: tuple) -> dict[str, float]:
        arrays = draw(args)
        jax.block_until_ready([program(*arrays) for _ in range(2)])
        start = time.perf_counter()
        jax.block_until_ready([program(*arrays) for _ in range(ITERATIONS)][-1])
        seconds = (time.perf_counter() - start) / ITERATIONS
        flops = products * 2 * H * B * N * T * (T + 1) / 2
        return rounded({"milliseconds": seconds * 1e3, "tflops": flops / seconds / 1e12})

    return measure


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{number:.3g}") for name, number in numbers.items()}


if __name__ == "__main__":
    main()
