"""Meshes of the eight CPU devices, models on them, and what the partitioner and the compiler say about a program."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.mesh import MeshShape, padded_vocab
from llama_jax.model import Params, param_axes, quantize_axes
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import make_mesh, tree_shardings

MESHES = {"8x1x1": MeshShape(8, 1, 1), "1x8x1": MeshShape(1, 8, 1), "1x1x8": MeshShape(1, 1, 8), "2x2x2": MeshShape(2, 2, 2)}
TABLES = ("embedding", "lm_head")


def mesh_of(name: str) -> Mesh:
    return make_mesh(MESHES[name], jax.devices()[:8])


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Programs in the block are traced for the mesh; None: for one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(cfg: ModelConfig, params: Params, mesh: Mesh, fill: float = 0.0) -> Params:
    """Parameters (layers a list; of floats, or in int8) on a mesh, tables padded with rows of `fill` to what it divides."""
    rows = padded_vocab(cfg.vocab_size, mesh.shape["tensor"])
    pad = ((0, rows - cfg.vocab_size), (0, 0))

    def padded(table: np.ndarray) -> np.ndarray:
        return np.pad(table, pad, constant_values=fill)

    params = {k: jax.tree.map(padded, v) if k in TABLES else v for k, v in params.items()}
    axes = param_axes(cfg)
    if any(isinstance(leaf, QArray) for leaf in params["layers"][0].values()):
        axes = quantize_axes(axes)
    return jax.device_put(params, tree_shardings(mesh, axes, params))


@contextlib.contextmanager
def without_rematerialisation() -> Iterator[None]:
    """Fails when a program compiled in the block has an array that the partitioner could only move by making it whole.

    XLA says so on the process's standard error, not Python's.
    """
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        lines = [line for line in said.read().decode(errors="replace").splitlines() if "ematerialization" in line]
    assert not lines, "\n".join(lines)


def equations(f: Callable, *args: Any) -> list[Any]:
    """Every operation of f's jaxpr whose results are used, with those of its loops, branches and inner functions."""
    found = []

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if not equation.outvars:
                continue
            found.append(equation)
            for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def products(f: Callable, *args: Any) -> list[tuple[np.dtype, np.dtype, np.dtype]]:
    """Dtypes of the operands and of the result of every matrix product in f's jaxpr."""
    found = [equation for equation in equations(f, *args) if equation.primitive.name == "dot_general"]
    return [tuple(v.aval.dtype for v in (*equation.invars, *equation.outvars)) for equation in found]


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
