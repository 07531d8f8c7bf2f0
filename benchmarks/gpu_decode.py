"""Decoding on one GPU, part after part: python benchmarks/gpu_decode.py OUTPUT_DIR PART... -> OUTPUT_DIR/PART.json

equal          logits of a token and of a prompt by the kernels and by plain JAX, on the card, two layers of 7B's shape
tiles          the kernel of a row's products (llama_jax.ops.kernels.gemv): microseconds of 7B's shapes by tile; parts after it
               use the best
decode:Q:C:B   a step at context 512 of 7B's shape, random weights in Q (bfloat16, int8, int4, w8a8, fp8), cache in C (auto,
               int8), batch B, and the kernels that it is made of
prefill:T[:K]  a prompt of T tokens, with kernels K: what is found to work, or own, without cuDNN

LLAMA_JAX=DIR measures the package of another directory, MODEL=NAME another preset.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ.get("LLAMA_JAX", str(Path(__file__).resolve().parents[1])))

import jax
import jax.numpy as jnp
import numpy as np

from configs import bench as config
from infer import measure
from llama_jax.config import PRESETS, ModelConfig
from llama_jax.generation import programs
from llama_jax.generation.request import Row, to_controls
from llama_jax.model import grow_cache, hidden_states, logits, round_cache

CONTEXT, SLOTS, STEPS, CALLS = 512, 1024, 32, 6
SEVEN = PRESETS[os.environ.get("MODEL", "llama2_7b")]
BITS = {"bfloat16": 16, "int8": 8, "int4": 4}
FLOAT_TILES = "4,1,8 4,2,8 4,4,8 4,1,4 4,2,4 4,4,4 2,2,8 2,4,8 2,4,4 8,1,8 8,2,8 2,4,2 4,4,2 2,8,4"  # outputs, repeats, warps
INTEGER_TILES = "4,1,4 4,2,4 4,4,4 2,4,4 2,8,4 8,2,4 4,2,2 4,4,2 4,4,8 4,2,8 2,4,8 8,1,4 2,4,2 8,2,8"


def subject(cfg: ModelConfig = SEVEN, **settings: Any) -> measure.Subject:
    asked = {"model": dataclasses.asdict(cfg), "prompt_length": 1, "context": SLOTS}
    return measure.make_subject(config.get_config().to_dict() | asked | settings)


def decode(quantize: str, cache_dtype: str, batch: str) -> dict[str, Any]:
    of = subject(quantize="" if quantize == "bfloat16" else quantize, cache_dtype=cache_dtype)
    cfg, B = of.cfg, int(batch)
    rows = [Row([1], dataclasses.replace(of.settings, max_new_tokens=SLOTS), ())] * B
    controls, lengths = to_controls(rows, B, cfg.vocab_size), np.ones(B, np.int32)
    options = dict(cache_length=SLOTS, num_top=0, kernels=of.kernels, cache_dtype=cache_dtype)
    shapes = jax.eval_shape(functools.partial(programs.prefill, cfg, **options), of.params, lengths[:, None], lengths, controls)
    state = dataclasses.replace(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0]),
        lengths=jnp.full(B, CONTEXT, jnp.int32),
        last_token=jnp.ones(B, jnp.int32),
        controls=jax.tree.map(jnp.asarray, controls),
    )
    halt, n = np.zeros(B, bool), np.int32(STEPS)
    start = time.perf_counter()
    with jax.set_mesh(of.mesh):
        run = programs.decode.lower(cfg, of.params, state, halt, n, num_top=0, kernels=of.kernels).compile()
    compile_seconds, found = time.perf_counter() - start, []
    for _ in range(CALLS):
        start = time.perf_counter()
        state, output = run(of.params, state, halt, n)
        assert (np.asarray(output.tokens)[:, :STEPS] >= 0).all()
        found.append((time.perf_counter() - start) / STEPS)
    seconds = statistics.median(found[2:])
    nbytes = sum(measure.step_bytes(of, B, CONTEXT + STEPS * (CALLS // 2 + 1)).values())
    return {
        "ms": 1e3 * seconds,
        "least": 1e3 * min(found),
        "tokens_per_second": B / seconds,
        "bytes": nbytes,
        "TB_per_second": nbytes / seconds / 1e12,
        "compile_seconds": compile_seconds,
        "kernels": launched(lambda: run(of.params, state, halt, n)[1].tokens),
    }


def prefill(length: str, kernels: str = "found") -> dict[str, Any]:
    of, T = subject(), int(length)
    chosen = of.kernels if kernels == "found" else True
    cfg, controls = of.cfg, to_controls([Row([1], of.settings, ())], 1, of.cfg.vocab_size)
    inputs = (of.params, np.ones((1, T), np.int32), np.full(1, T, np.int32), controls)
    with jax.set_mesh(of.mesh):
        run = programs.prefill.lower(cfg, *inputs, cache_length=2 * T, num_top=0, kernels=chosen).compile()
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        np.asarray(run(*inputs)[1].tokens)
        found.append(time.perf_counter() - start)
    layers, head = measure.linear_params(cfg)
    flops = 2 * layers * T + 2 * T**2 * cfg.num_heads * cfg.head_dim * cfg.num_layers + 2 * head
    rate = flops / min(found) / 1e12
    launches = launched(lambda: run(*inputs)[1].tokens)
    return {"ms": 1e3 * min(found), "TFLOP_per_second": rate, "attention": chosen, "kernels": launches}


def equal() -> dict[str, Any]:
    from llama_jax.model.fused import is_fused

    cfg, found = dataclasses.replace(SEVEN, num_layers=2), {}
    tokens = jax.random.randint(jax.random.key(1), (1, 70), 0, cfg.vocab_size)
    positions = jnp.arange(70)[None]

    @functools.partial(jax.jit, static_argnums=0)
    def read(cache_dtype: str, params: Any) -> Any:
        _, cache = hidden_states(cfg, params, tokens[:, :69], positions[:, :69])
        return grow_cache(round_cache(cache, cache_dtype), 256)

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernels: bool, params: Any, cache: Any) -> tuple[Any, Any]:
        x, written = hidden_states(cfg, params, tokens[:, 69:], positions[:, 69:], cache, kernels=kernels)
        return logits(cfg, params, x, kernels=kernels)[0, 0], written

    for dtype, method, cache_dtype in (
        ("bfloat16", "", "auto"),
        ("bfloat16", "int8", "int8"),
        ("bfloat16", "int4", "auto"),
        ("float16", "", "auto"),
    ):
        params = subject(cfg, dtype=dtype, quantize=method).params
        cache = read(cache_dtype, params)
        assert is_fused(params["layers"][0])
        (plain, there), (ours, here) = (run(kernels, params, cache) for kernels in (False, True))
        pairs = zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True)
        found[f"{dtype} {method} {cache_dtype}"] = {
            "difference": float(jnp.abs(ours - plain).max()),
            "largest": float(jnp.abs(plain).max()),
            "caches": max(float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()) for a, b in pairs),
            "calls": run.lower(True, params, cache).compile().as_text().count("multiply_row"),
        }
    of = subject(cfg)
    whole = jax.random.randint(jax.random.key(2), (1, 2048), 0, cfg.vocab_size)

    @functools.partial(jax.jit, static_argnums=0)
    def last(kernels: bool | str, params: Any) -> jax.Array:
        x, _ = hidden_states(cfg, params, whole, jnp.arange(2048)[None], kernels=kernels)
        return logits(cfg, params, x[:, -1:])[0, 0]

    plain = last(False, of.params)
    for kernels in (True, of.kernels):
        ours = last(kernels, of.params)
        found[f"a prompt, kernels {kernels}"] = {
            "difference": float(jnp.abs(ours - plain).max()),
            "largest": float(jnp.abs(plain).max()),
        }
    return found


def tiles() -> dict[str, Any]:
    from llama_jax.ops.kernels import gemv

    width, hidden = SEVEN.embed_dim, SEVEN.mlp_dim
    shapes = {"qkv": 3 * width, "o": width, "mlp": 2 * hidden, "down": width, "head": SEVEN.vocab_size}
    found: dict[str, Any] = {}
    for method in BITS:
        texts = (FLOAT_TILES if method == "bfloat16" else INTEGER_TILES).split()
        totals = {text: [0.0, 0.0] for text in texts}  # of rows of D, and of rows of F
        for name, outputs in shapes.items():
            try:
                times = times_by_tile(method, name, outputs, texts)
            except Exception as error:
                times = {text: repr(error)[:300] for text in texts}
            found[f"{method} {name}"] = times
            print(method, name, times, flush=True)
            for text, us in times.items():
                us = us if isinstance(us, float) else float("inf")
                totals[text][name == "down"] += us / (SEVEN.num_layers if name == "head" else 1)
        best = [min(texts, key=lambda text, i=i: totals[text][i]) for i in range(2)]
        gemv.TILES[BITS[method]] = tuple(gemv.Tile(*map(int, text.split(","))) for text in best)
        found[f"{method} best"] = best
    return found


def times_by_tile(method: str, name: str, outputs: int, texts: list[str]) -> dict[str, float | str]:
    """Median microseconds of a kernel, over more weights than the card's cache holds; or what went wrong."""
    from llama_jax.ops.kernels.gemv import Tile, multiply_row

    inputs = SEVEN.mlp_dim if name == "down" else SEVEN.embed_dim
    make = jax.jit(random_weight, static_argnums=(1, 2))
    count = max(4, round(4e8 / (outputs * inputs * BITS[method] / 8)))
    weights = [make(jax.random.key(i), (outputs, inputs), method) for i in range(count)]
    x, norm, residual = (jax.random.normal(jax.random.key(1), n, jnp.bfloat16) for n in (inputs, inputs, outputs))
    normed = dict(norm=norm, eps=1e-5)
    options = {"qkv": normed, "mlp": normed | {"gated": True}, "head": normed}
    asked = options.get(name, {"residual": residual})

    def build(text: str) -> Callable[[], Any]:
        tile = Tile(*map(int, text.split(",")))
        program = jax.jit(lambda x, weights: [multiply_row(x, weight, tile=tile, **asked) for weight in weights])
        return functools.partial(program.lower(x, weights).compile(), x, weights)

    found, runs = {}, []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {text: pool.submit(build, text) for text in texts}
    for text, future in futures.items():
        try:
            jax.block_until_ready(future.result()())
            runs.append((text, future.result()))
        except Exception as error:
            found[text] = repr(error)[:160]
    times = [us for kernel, us in traced(lambda: [jax.block_until_ready(run()) for _, run in runs]) if "multiply_row" in kernel]
    for i, (text, _) in enumerate(runs):
        found[text] = round(statistics.median(times[i * count : (i + 1) * count]), 2)
    return found


def random_weight(key: jax.Array, shape: tuple[int, int], method: str) -> Any:
    from llama_jax.ops.qarray import GROUP, QArray

    if method == "bfloat16":
        return jax.random.normal(key, shape, jnp.bfloat16)
    levels = jax.random.randint(key, shape, -7, 8, jnp.int8)
    if method == "int8":
        return QArray(levels, jnp.ones((shape[0], 1)))
    return QArray(levels.astype(jnp.int4), jnp.ones((shape[0], shape[1] // GROUP), jnp.bfloat16))


def launched(run: Callable[[], Any]) -> dict[str, list[float]] | str:
    """[launches, microseconds each] by kernel, of one call, the most expensive first."""
    found: dict[str, list[float]] = {}
    try:
        for name, microseconds in traced(run):
            found.setdefault(name, []).append(microseconds)
    except Exception as error:
        return repr(error)[:300]
    order = sorted(found, key=lambda name: -sum(found[name]))[:24]
    return {name[:60]: [len(found[name]), round(sum(found[name]) / len(found[name]), 2)] for name in order}


def traced(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel, in the order they ran."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = [plane for plane in jax.profiler.ProfileData.from_file(path).planes if "GPU" in plane.name]
        events = [event for plane in planes for line in plane.lines if "Stream" in line.name for event in line.events]
        return [(event.name, event.duration_ns / 1e3) for event in sorted(events, key=lambda event: event.start_ns)]


def main() -> None:
    output = Path(sys.argv[1])
    for part in sys.argv[2:]:
        name, *arguments = part.split(":")
        start = time.perf_counter()
        found = {"equal": equal, "tiles": tiles, "decode": decode, "prefill": prefill}[name](*arguments)
        found |= {"part": part, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        found |= {"seconds": time.perf_counter() - start}
        (output / f"{part.replace(':', '_')}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
