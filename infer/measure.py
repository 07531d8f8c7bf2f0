"""Times prefill and decode of random weights, and how far that is from the floors of the machine."""

import dataclasses
import functools
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from infer import floors
from llama_jax.checkpoint.quantized import check_quantize
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation import programs
from llama_jax.generation.layout import laid_out
from llama_jax.generation.load import check_cache_dtype
from llama_jax.generation.reading import MIN_PROMPT_BUCKET, bucket
from llama_jax.generation.request import Row, Settings, to_controls
from llama_jax.mesh import MeshShape, resolve_mesh
from llama_jax.model import Params, param_axes, param_shapes
from llama_jax.model.block import INIT_STDDEV
from llama_jax.model.quantize import NUM_INPUTS, quantize_axes, quantize_leaf
from llama_jax.ops.kernels import Kernels
from llama_jax.ops.kernels.probe import choose_kernels
from llama_jax.plan.timing import linear_params
from llama_jax.sharding import make_mesh, sharding

STEPS = 8  # of one decode call
UNCOUNTED = 2  # calls before the clock starts
PREFILLS = 3  # the best of these counts


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed."""

    cfg: ModelConfig
    params: Params
    mesh: jax.sharding.Mesh
    dtype: str
    quantize: str
    cache_dtype: str
    settings: Settings
    prompt_length: int
    context: int
    steps: int
    kernels: Kernels


def make_subject(config: dict[str, Any], devices: Sequence[jax.Device] | None = None) -> Subject:
    """Random weights on the devices (all, unless given), and what is asked of them.

    Raises:
        LlamaError: a setting is out of range.
    """
    cfg = ModelConfig(**config["model"])
    prompt, steps, dtype, quantize = (config[name] for name in ("prompt_length", "steps", "dtype", "quantize"))
    if dtype not in floors.OPERANDS or dtype == "int8":
        raise LlamaError(ExitCode.BAD_REQUEST, f"dtype is {dtype!r}, expected bfloat16, float32 or float16")
    check_quantize(quantize)
    check_cache_dtype(config["cache_dtype"])
    if min(prompt, steps, *config["batch_sizes"]) < 1:
        raise LlamaError(ExitCode.BAD_REQUEST, "prompt_length, steps and batch_sizes are numbers from 1 up")
    steps = STEPS * -(-steps // STEPS)
    needed = prompt + 1 + STEPS * UNCOUNTED + steps
    context = config["context"] or bucket(needed, 2**30)
    if context < needed:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"context is {context:,}, and the prompt's {prompt:,} tokens, {steps} timed steps and {STEPS * UNCOUNTED} before "
            f"them need {needed:,}: raise it, or lower the others",
        )
    if context > cfg.max_length:
        raise LlamaError(ExitCode.BAD_REQUEST, f"context is {context:,}, and the model's is {cfg.max_length:,}: lower it")
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(resolve_mesh(cfg, MeshShape(**config["mesh"]), len(devices)), devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if any(batch % shards for batch in config["batch_sizes"]):
        raise LlamaError(
            ExitCode.BAD_REQUEST, f"batch_sizes are {config['batch_sizes']}, expected multiples of data * fsdp, {shards}"
        )
    device = mesh.local_devices[0]
    kernels = dtype == "float32" or choose_kernels(device, cfg.head_dim, lambda line: print(line, file=sys.stderr))
    asked = Settings(max_new_tokens=needed - prompt, **config["sampling"])
    params = laid_out(random_params(cfg, mesh, dtype, quantize), mesh)
    return Subject(cfg, params, mesh, dtype, quantize, config["cache_dtype"], asked, prompt, context, steps, kernels)


def random_params(cfg: ModelConfig, mesh: jax.sharding.Mesh, dtype: str, quantize: str) -> Params:
    """Weights made where they lie, one at a time, so that no more than one is ever there unquantised."""
    tensor = mesh.shape["tensor"]
    shapes = param_shapes(cfg, dtype, tensor=tensor)
    axes = quantize_axes(param_axes(cfg), quantize) if quantize else param_axes(cfg)
    seeds = itertools.count()

    def make(name: str, shape: tuple[int, ...], key: jax.Array) -> Any:
        value = jax.random.normal(key, shape, dtype) * INIT_STDDEV if len(shape) > 1 else jax.numpy.ones(shape, dtype)
        return quantize_leaf(name, value, quantize) if quantize else value

    @functools.cache
    def compiled(name: str, shape: tuple[int, ...], places: Any) -> Any:
        return jax.jit(functools.partial(make, name, shape), out_shardings=places)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct, names: Any) -> Any:
        name, key = path[-1].key, jax.random.key(next(seeds))
        parts = jax.eval_shape(functools.partial(make, name, shape.shape), key)
        if isinstance(parts, tuple):
            places = type(parts)(*(sharding(mesh, axis, part.shape) for axis, part in zip(names, parts, strict=True)))
        else:
            places = sharding(mesh, names, parts.shape)
        return jax.block_until_ready(compiled(name, shape.shape, places)(key))

    return jax.tree_util.tree_map_with_path(leaf, shapes, axes)


def measure(subject: Subject, batch_sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The object that is printed, of each batch size."""
    dtypes = [subject.dtype] + (["int8"] if subject.quantize or subject.cache_dtype == "int8" else [])
    device = subject.mesh.local_devices[0]
    found = floors.measure_floors(matrices(subject.cfg), subject.prompt_length, dtypes, device)
    for batch in batch_sizes:
        with jax.set_mesh(subject.mesh):
            timed = time_batch(subject, batch)
        yield {
            "model_parameters": subject.cfg.num_params,
            "dtype": subject.dtype,
            "quantize": subject.quantize,
            "cache_dtype": subject.cache_dtype,
            "mesh": dict(subject.mesh.shape),
            "batch": batch,
            "prompt_length": subject.prompt_length,
            "context": subject.context,
            "device": device.device_kind,
            "jax": jax.__version__,
            **timed,
            **_shares(subject, batch, timed, found),
            "peak_bytes": _peak_bytes(device),
            "floors": dataclasses.asdict(found),
        }


def time_batch(subject: Subject, batch: int) -> dict[str, float]:
    """Seconds of prefill and of a decode step, compiling apart."""
    cfg, prompt = subject.cfg, subject.prompt_length
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, bucket(prompt, 2**30, MIN_PROMPT_BUCKET)), np.int32)
    rows = [Row(row[:prompt].tolist(), subject.settings, ()) for row in tokens]
    inputs = (subject.params, tokens, np.full(batch, prompt, np.int32), to_controls(rows, batch, cfg.vocab_size))
    start = time.perf_counter()
    options = dict(cache_length=subject.context, num_top=0, kernels=subject.kernels, cache_dtype=subject.cache_dtype)
    prefill = programs.prefill.lower(cfg, *inputs, **options).compile()
    compile_seconds = time.perf_counter() - start
    state, _ = jax.block_until_ready(prefill(*inputs))
    prefill_seconds = []
    for _ in range(PREFILLS):
        del state  # its cache makes room for the next
        start = time.perf_counter()
        state, output = prefill(*inputs)
        np.asarray(output.tokens)
        prefill_seconds.append(time.perf_counter() - start)
    halt, n = np.zeros(batch, bool), np.int32(STEPS)
    start = time.perf_counter()
    decode = programs.decode.lower(cfg, subject.params, state, halt, n, num_top=0, kernels=subject.kernels).compile()
    decode_compile_seconds = time.perf_counter() - start
    step_seconds = []
    for _ in range(UNCOUNTED + subject.steps // STEPS):
        start = time.perf_counter()
        state, output = decode(subject.params, state, halt, n)
        np.asarray(output.tokens)
        step_seconds.append((time.perf_counter() - start) / STEPS)
    step_seconds = step_seconds[UNCOUNTED:]
    memory = decode.memory_analysis()
    return {
        "prefill_compile_seconds": compile_seconds,
        "decode_compile_seconds": decode_compile_seconds,
        "first_token_seconds": min(prefill_seconds),
        "prefill_tokens_per_second": batch * prompt / min(prefill_seconds),
        "step_seconds": statistics.median(step_seconds),
        "step_seconds_least": min(step_seconds),
        "tokens_per_second": batch / statistics.median(step_seconds),
        "decode_temporary_bytes": memory.temp_size_in_bytes,
    }


def _shares(subject: Subject, batch: int, timed: dict[str, float], found: floors.Floors) -> dict[str, float]:
    """What was moved and multiplied, and how fast for this machine."""
    cfg, devices = subject.cfg, subject.mesh.size
    layers, head = linear_params(cfg)
    T, width = subject.prompt_length, cfg.num_heads * cfg.head_dim * cfg.num_layers
    flops = batch * (2 * layers * T + 2 * T**2 * width + 2 * head)
    prefill_rate = flops / timed["first_token_seconds"] / devices
    filled = T + 1 + STEPS * UNCOUNTED + subject.steps // 2  # tokens that the middle one of the timed steps reads
    nbytes = step_bytes(subject, batch, filled)
    floor = sum(size / found.gemv_bytes_per_second[dtype] for dtype, size in nbytes.items())
    multiplied = "int8" if subject.quantize == "w8a8" else subject.dtype
    return {
        "prefill_flops_per_second": prefill_rate,
        "prefill_share": prefill_rate / found.matmul_flops_per_second[multiplied],
        "step_bytes": sum(nbytes.values()),
        "step_bytes_per_second": sum(nbytes.values()) / timed["step_seconds_least"],
        "floor_seconds": floor,
        "decode_share": floor / timed["step_seconds_least"],
    }


def step_bytes(subject: Subject, batch: int, filled: int) -> dict[str, int]:
    """Bytes that one device must read in a decode step: its weights but for the embedding's table, its rows' filled cache.

    By the dtype of the product that could read them: "int8" for weights, keys and values in 8 bits or fewer.
    """
    device = subject.mesh.local_devices[0]
    read = {k: v for k, v in subject.params.items() if k != "embedding" or subject.cfg.tied_head}
    nbytes = {subject.dtype: 0, "int8": 0}
    for leaf in jax.tree.leaves(read):
        size = sum(shard.data.size for shard in leaf.addressable_shards if shard.device == device)
        bits = jax.dtypes.itemsize_bits(leaf.dtype)
        nbytes["int8" if bits <= 8 else subject.dtype] += size * bits // 8
    cfg, mesh = subject.cfg, subject.mesh.shape
    heads = -(-cfg.num_kv_heads // mesh["tensor"])
    rows = -(-batch // (mesh["data"] * mesh["fsdp"]))
    vectors = 2 * cfg.num_layers * rows * heads * filled
    if subject.cache_dtype == "int8":
        nbytes["int8"] += vectors * cfg.head_dim
        nbytes[subject.dtype] += vectors * 4  # scales
    else:
        nbytes[subject.dtype] += vectors * cfg.head_dim * np.dtype(floors.OPERANDS[subject.dtype]).itemsize
    return {dtype: size for dtype, size in nbytes.items() if size}


def matrices(cfg: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's weights."""
    found = []
    for name, leaf in param_shapes(cfg)["layers"][0].items():
        if name in NUM_INPUTS:
            inputs = int(np.prod(leaf.shape[-NUM_INPUTS[name] :]))
            found.append((leaf.size // inputs, inputs))
    return found


def _peak_bytes(device: jax.Device) -> int:
    """Of the device's memory; of this process on a CPU."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
