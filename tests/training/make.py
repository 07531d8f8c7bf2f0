"""A small model, a batch of packed rows, and training states on meshes."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import PRESETS, ModelConfig
from llama_jax.data.batch import Batch
from llama_jax.mesh import MeshShape, padded_vocab
from llama_jax.model import Params, init_params, param_axes, stack_layers, unstack_layers
from llama_jax.sharding import make_mesh, tree_shardings
from llama_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from llama_jax.training.state import StateForm, TrainState, state_shapes, state_shardings, trained_axes
from tests.make_mesh import TABLES, mesh_of

B, T = 8, 24
CFG = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_heads=16, num_kv_heads=2, head_dim=6, vocab_size=321)
TIED = dataclasses.replace(CFG, num_kv_heads=8, vocab_size=320, tied_head=True)
SEGMENTS = (10, 9, 5)  # tokens of the sequences in each row
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=1, total_steps=20)


def training_mesh(name: str | None) -> Mesh:
    """A mesh of MESHES, or of the first device."""
    return make_mesh(MeshShape(), jax.devices()[:1]) if name is None else mesh_of(name)


def batch_of(cfg: ModelConfig = CFG, seed: int = 0) -> Batch:
    """Eight rows of three sequences; a fifth of the targets do not count, the last of each sequence
    among them, and in the first row all but the first four."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (B, T + 1)).astype(np.int32)
    weights = (rng.random((B, T)) < 0.85).astype(np.float32)
    weights[:, np.cumsum(SEGMENTS) - 1] = 0
    weights[0, 4:] = 0
    positions = np.concatenate([np.arange(n) for n in SEGMENTS]).astype(np.int32)
    segments = np.repeat(np.arange(1, len(SEGMENTS) + 1), SEGMENTS).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, np.tile(positions, (B, 1)), np.tile(segments, (B, 1)))


@functools.cache
def initial_params(cfg: ModelConfig) -> Params:
    """In NumPy, layers stacked; matrices five times as large as at the start of training: attention that is not uniform, logits
    of about 1."""
    params = jax.jit(init_params, static_argnums=0, static_argnames="scan")(cfg, jax.random.key(0), scan=True)
    return jax.tree.map_with_path(lambda path, leaf: np.asarray(leaf) * (1 if "norm" in path[-1].key else 5), params)


def params_on(cfg: ModelConfig, mesh: Mesh, *, scan: bool) -> Params:
    """`initial_params` where they lie on a mesh."""
    rows = padded_vocab(cfg.vocab_size, mesh.shape["tensor"]) - cfg.vocab_size
    params = {k: np.pad(v, ((0, rows), (0, 0))) if k in TABLES else v for k, v in initial_params(cfg).items()}
    params = params if scan else unstack_layers(params)
    return jax.device_put(params, tree_shardings(mesh, param_axes(cfg, scan=scan), params))


def state_of(cfg: ModelConfig, mesh: Mesh, form: StateForm) -> tuple[TrainState, Optimizer]:
    """A state that has seen nothing, and its optimizer. (`init_state` makes one, too, but takes long to compile.)"""
    optimizer = make_optimizer(OPTIMIZER, trained_axes(cfg, form))
    shapes = state_shapes(cfg, optimizer, form, tensor=mesh.shape["tensor"])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = jax.device_put(zeros, state_shardings(cfg, optimizer, form, mesh=mesh))
    return dataclasses.replace(state, params=params_on(cfg, mesh, scan=form.scan)), optimizer


def on_host(cfg: ModelConfig, params: Params) -> Params:
    """A tree like the parameters in NumPy, layers stacked, tables without their padding (which is checked to be 0)."""
    params = params if not isinstance(params["layers"], list) else stack_layers(params)
    params = jax.tree.map(np.asarray, params)
    for name in set(TABLES) & set(params):
        np.testing.assert_array_equal(params[name][cfg.vocab_size :], 0)
    return {name: leaf[: cfg.vocab_size] if name in TABLES else leaf for name, leaf in params.items()}


def assert_trees_close(ours: Any, wanted: Any, **tolerance: float) -> None:
    def check(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **dict(rtol=0, atol=1e-5) | tolerance)

    jax.tree.map_with_path(check, ours, wanted)
