"""The real programs of a plan, on arrays that are only described: nothing is allocated, any mesh will do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.data.batch import BATCH_AXES, batch_shapes
from llama_jax.generation import programs
from llama_jax.generation.layout import is_fused_on
from llama_jax.generation.request import to_controls
from llama_jax.generation.state import DecodeState, state_axes
from llama_jax.mesh import MeshShape
from llama_jax.model import empty_cache, param_axes, param_shapes, quantize_axes, quantize_params
from llama_jax.model.fused import fuse_layer, fused_axes
from llama_jax.plan.request import PlanRequest
from llama_jax.sharding import sharding, tree_shardings
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.state import state_shapes, state_shardings
from llama_jax.training.step import StepConfig, make_train_step


def lower_program(request: PlanRequest, shape: MeshShape, mesh: Mesh) -> jax.stages.Lowered:
    """Traces the task's program for a mesh; `.compile()` it."""
    build = {"train": _train, "decode": _decode, "prefill": _prefill}[request.task]
    program, args, options = build(request, shape, mesh)
    with jax.set_mesh(mesh):
        return program.lower(*args, **options)


def _train(request: PlanRequest, shape: MeshShape, mesh: Mesh) -> tuple[Any, tuple, dict]:
    scan = request.topology.chip.is_tpu  # design: GPUs train unrolled
    config = StepConfig(dtype=request.dtype, remat=request.remat, scan_layers=scan)
    settings = OptimizerConfig(name=request.optimizer, moment_dtype=request.first_moment)
    optimizer = make_optimizer(settings, param_axes(request.config, scan=scan))
    state = state_shapes(request.config, optimizer, config.form(), tensor=shape.tensor)
    placed = jax.tree.map(_described, state, state_shardings(request.config, optimizer, config.form(), mesh=mesh))
    batch = batch_shapes(request.batch, request.length)
    rows = jax.tree.map(_described, batch, tree_shardings(mesh, BATCH_AXES, batch))
    return make_train_step(request.config, config, optimizer, mesh), (placed, rows), {}


def _decode(request: PlanRequest, shape: MeshShape, mesh: Mesh) -> tuple[Any, tuple, dict]:
    state = _decode_state(request, shape, mesh)
    halt = _described(jax.ShapeDtypeStruct(state.done.shape, bool), NamedSharding(mesh, PartitionSpec()))
    steps = _described(jax.ShapeDtypeStruct((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return programs.decode, (request.config, _params(request, shape, mesh), state, halt, steps), {"num_top": 0}


def _prefill(request: PlanRequest, shape: MeshShape, mesh: Mesh) -> tuple[Any, tuple, dict]:
    state = _decode_state(request, shape, mesh)
    rows = state.lengths.shape[0]
    tokens = _described(jax.ShapeDtypeStruct((rows, request.length), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    args = (request.config, _params(request, shape, mesh), tokens, state.lengths, state.controls)
    return programs.prefill, args, {"cache_length": request.length, "num_top": 0, "cache_dtype": request.cache_dtype}


def _params(request: PlanRequest, shape: MeshShape, mesh: Mesh) -> Any:
    shapes, axes = param_shapes(request.config, request.dtype, tensor=shape.tensor), param_axes(request.config)
    if request.quantize:
        shapes, axes = jax.eval_shape(quantize_params, shapes), quantize_axes(axes)
    if is_fused_on("tpu" if request.topology.chip.is_tpu else "gpu", shapes, mesh):
        layers = [jax.eval_shape(fuse_layer, layer) for layer in shapes["layers"]]
        shapes, axes = shapes | {"layers": layers}, fused_axes(axes)
    return jax.tree.map(_described, shapes, tree_shardings(mesh, axes, shapes))


def _decode_state(request: PlanRequest, shape: MeshShape, mesh: Mesh) -> DecodeState:
    cfg, rows = request.config, request.rows(shape) * shape.batch_shards
    numbers, flags = np.zeros(rows, np.int32), np.zeros(rows, bool)
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(lambda: empty_cache(cfg, (rows, request.length), request.dtype, request.cache_dtype))
    state = DecodeState(
        last_token=numbers,
        lengths=numbers,
        prompt_lengths=numbers,
        done=flags,
        cache=cache,
        controls=to_controls((), rows, cfg.vocab_size),
        history=None,
    )
    return jax.tree.map(lambda x, names: _described(x, sharding(mesh, names, x.shape)), state, state_axes(state))


def _described(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
