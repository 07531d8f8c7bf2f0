"""Times a step of training and its parts."""

import contextlib
import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from llama_jax.config import ModelConfig
from llama_jax.data.batch import Batch
from llama_jax.data.opening import DataConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape, resolve_mesh
from llama_jax.model import LoraConfig, param_shapes
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.kernels.probe import choose_attention
from llama_jax.ops.linear import matmul
from llama_jax.sharding import make_mesh
from llama_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from llama_jax.training.state import StateForm, TrainState, init_state, trained, trained_axes, with_trained
from llama_jax.training.step import StepConfig, batch_loss, make_train_step
from train.feed import train_feed
from train.flops import chip_of, flops_per_token
from train.random_data import random_dataset

REPEATS, UNCOUNTED = 5, 2
DATASET_BATCHES = 4


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """The object that is printed."""
    subject = _subject(config)
    cfg, tokens = subject.cfg, subject.batch_size * subject.length
    with jax.set_mesh(subject.mesh):
        found = _whole_step(subject, config["steps"], config["parts"])
    seconds = found["step_seconds"]
    device = subject.mesh.devices.flat[0]
    frozen = subject.form.lora.rank > 0
    found = {
        "model_parameters": cfg.num_params,
        "batch_size": subject.batch_size,
        "length": subject.length,
        "device": device.device_kind,
        "jax": jax.__version__,
        "mesh": dict(subject.mesh.shape),
        "step": dataclasses.asdict(subject.step),
        "lora_rank": subject.form.lora.rank,
        "tokens_per_second": tokens / seconds,
        **found,
    }
    if chip := chip_of(device):
        peak = chip.peak(subject.step.dtype) * subject.mesh.size
        for name in ("causal", "palm"):
            flops = flops_per_token(cfg, subject.length, causal=name == "causal", frozen=frozen)
            found[f"mfu_{name}"] = tokens / seconds * flops / peak
    if config["parts"] and subject.mesh.size == 1 and not frozen:
        found |= _against_products(cfg, tokens, subject.step.dtype, seconds)
    return found


@dataclasses.dataclass(frozen=True)
class _Subject:
    cfg: ModelConfig
    mesh: jax.sharding.Mesh
    step: StepConfig
    form: StateForm
    optimizer: Optimizer
    batch_size: int
    length: int
    documents: int


def _subject(config: dict[str, Any]) -> _Subject:
    cfg, train, lora = ModelConfig(**config["model"]), dict(config["train"]), dict(config["lora"])
    batch_size, length, scan = (train.pop(name) for name in ("batch_size", "length", "scan_layers"))
    attention, documents = train.pop("attention"), config["documents"]
    _check("train.batch_size", batch_size, 1)
    _check("train.length", length, 2, cfg.max_length)
    _check("documents", documents, 1, length // 2)
    _check("steps", config["steps"], 1)
    mesh = make_mesh(resolve_mesh(cfg, MeshShape(**config["mesh"]), jax.device_count(), batch_size=batch_size))
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    kernels = choose_attention(attention, mesh.devices.flat[0], cfg.head_dim, lambda line: print(line, file=sys.stderr))
    step = StepConfig(**train, scan_layers=on_tpu if scan == "auto" else scan == "true", kernels=kernels)
    base = {name: lora.pop(name) for name in ("base_dtype", "quantize")}
    form = step.form(LoraConfig(**lora), **base)
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), trained_axes(cfg, form))
    return _Subject(cfg, mesh, step, form, optimizer, batch_size, length, documents)


def _check(name: str, value: int, least: int, most: int | None = None) -> None:
    if not least <= value <= (value if most is None else most):
        wanted = f"{least} or more" if most is None else f"{least} to {most:,}"
        raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {value:,}, expected {wanted}")


def _whole_step(subject: _Subject, steps: int, parts: bool) -> dict[str, float]:
    """Seconds of compiling, of a step, of its input and of its parts alone; and what the compiler says of memory."""
    cfg, form, optimizer = subject.cfg, subject.form, subject.optimizer
    step = make_train_step(
        cfg, subject.step, optimizer, subject.mesh, lora=form.lora, base_dtype=form.base_dtype, quantize=form.quantize
    )
    state = init_state(cfg, optimizer, jax.random.key(0), form, mesh=subject.mesh)
    with tempfile.TemporaryDirectory() as folder:
        feed = _feeder(subject, Path(folder))
        batch = next(feed(0))
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        seconds, waited = [], []
        with contextlib.closing(feed(DataConfig.prefetch)) as batches:
            for _ in range(UNCOUNTED + steps):
                start = time.perf_counter()
                batch = next(batches)
                waited.append(time.perf_counter() - start)
                state, numbers = compiled(state, batch)
                jax.block_until_ready((state, numbers))
                seconds.append(time.perf_counter() - start)
        with contextlib.closing(feed(0)) as batches:
            input_work = _seconds(lambda: next(batches))
    seconds, waited = seconds[UNCOUNTED:], waited[UNCOUNTED:]
    found = {
        "compile_seconds": compile_seconds,
        "step_seconds": statistics.median(seconds),
        "step_seconds_least": min(seconds),
        "input_seconds": statistics.median(waited),
        "input_work_seconds": input_work,
        "peak_bytes_compiled": compiled.memory_analysis().peak_memory_in_bytes,
        "peak_bytes": _peak_bytes(),
    }
    if parts:
        found["forward_backward_seconds"], found["optimizer_seconds"] = _parts(subject, state, batch)
    return found


def _parts(subject: _Subject, state: TrainState, batch: Batch) -> tuple[float, float]:
    """Seconds of the gradient alone, and of the optimizer alone."""
    form, optimizer = subject.form, subject.optimizer

    def loss(weights: Any, state: TrainState, batch: Batch) -> jax.Array:
        params, adapter = with_trained(form, state.params, state.adapter, weights)
        return batch_loss(subject.cfg, subject.step, params, batch, adapter=adapter, lora=form.lora)[0]

    def update(grads: Any, state: TrainState, weights: Any) -> Any:
        updates, opt_state = optimizer.update(grads, state.opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state

    weights = trained(form, state.params, state.adapter)
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(update)
    grads = gradient(weights, state, batch)
    return _seconds(lambda: gradient(weights, state, batch)), _seconds(lambda: update(grads, state, weights))


def _against_products(cfg: ModelConfig, tokens: int, dtype: str, step_seconds: float) -> dict[str, float]:
    """The step's rate as a share of the products' alone."""
    flops = forward = backward = 0.0
    timed: dict[tuple[int, int], tuple[float, float]] = {}
    for outputs, inputs, count in _matrices(cfg):
        if (outputs, inputs) not in timed:
            timed[outputs, inputs] = _product_seconds(tokens, outputs, inputs, dtype)
        flops += count * 2.0 * tokens * outputs * inputs
        forward += count * timed[outputs, inputs][0]
        backward += count * timed[outputs, inputs][1]
    return {
        "products_flops_per_second": 3 * flops / (forward + backward),
        "forward_products_flops_per_second": flops / forward,
        "products_share": (forward + backward) / step_seconds,
        "forward_share": 3 * forward / step_seconds,
    }


def _matrices(cfg: ModelConfig) -> list[tuple[int, int, int]]:
    """(outputs, inputs, how many) of every weight that activations are multiplied with, the head included."""
    shapes, found = param_shapes(cfg), []
    layer = {name: leaf.shape for name, leaf in shapes["layers"][0].items() if name in NUM_INPUTS}
    for name, shape in layer.items():
        inputs = int(np.prod(shape[-NUM_INPUTS[name] :]))
        found.append((int(np.prod(shape)) // inputs, inputs, cfg.num_layers))
    return [*found, (cfg.vocab_size, cfg.embed_dim, 1)]


def _product_seconds(tokens: int, outputs: int, inputs: int, dtype: str) -> tuple[float, float]:
    """Of y = x W^T, and of dx = dy W and dW = dy^T x together; operands in dtype, sums in float32."""
    key = jax.random.key(0)
    x, w, dy = (jax.random.normal(key, shape, dtype) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))

    def product(equation: str, result: str) -> Callable[..., jax.Array]:
        return jax.jit(lambda a, b: matmul(equation, a, b).astype(result))

    y, dx, dw = product("MI,OI->MO", dtype), product("MO,OI->MI", dtype), product("MO,MI->OI", "float32")
    return _seconds(lambda: y(x, w)), _seconds(lambda: dx(dy, w)) + _seconds(lambda: dw(dy, x))


def _seconds(run: Callable[[], Any]) -> float:
    """The median of several runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _feeder(subject: _Subject, folder: Path) -> Callable[[int], Iterator[Batch]]:
    """From a number of batches made ahead to batches as train.main has them, of random tokens."""
    dataset = random_dataset(
        folder,
        vocab_size=subject.cfg.vocab_size,
        length=subject.length,
        rows=DATASET_BATCHES * subject.batch_size,
        documents=subject.documents,
    )
    return lambda prefetch: train_feed(dataset, subject.mesh, batch_size=subject.batch_size, seed=0, prefetch=prefetch)


def _peak_bytes() -> int:
    """Of the fullest device's memory; of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
