"""What training carries from step to step, and where it lies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import ModelConfig
from llama_jax.mesh import MESH_AXES, MeshShape, resolve_mesh
from llama_jax.model import Params, init_params, param_axes, param_shapes
from llama_jax.sharding import tree_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: int32 scalar, updates made.
    params: float32 master weights.
    opt_state: of the optimizer; moments lie where their parameters do.
    """

    step: Array
    params: Params
    opt_state: Any


def init_state(cfg: ModelConfig, optimizer: optax.GradientTransformation, key: Array, *, mesh: Mesh, scan: bool) -> TrainState:
    """Random parameters and an optimizer that has seen nothing, made in place on the mesh."""

    def init(key: Array) -> TrainState:
        params = init_params(cfg, key, scan=scan, tensor=mesh.shape["tensor"])
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=state_shardings(cfg, optimizer, mesh=mesh, scan=scan))(key)


def state_shapes(cfg: ModelConfig, optimizer: optax.GradientTransformation, *, tensor: int, scan: bool) -> TrainState:
    """The state as ShapeDtypeStructs; allocates nothing."""
    params = param_shapes(cfg, scan=scan, tensor=tensor)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def check_mesh(cfg: ModelConfig, mesh: Mesh, batch_size: int | None = None) -> None:
    """Refuses a mesh that does not divide the model, or the rows of a batch."""
    shape = MeshShape(**{name: mesh.shape[name] for name in MESH_AXES})
    resolve_mesh(cfg, shape, mesh.size, batch_size=batch_size)


def state_shardings(cfg: ModelConfig, optimizer: optax.GradientTransformation, *, mesh: Mesh, scan: bool) -> TrainState:
    """Where every array of the state lies: parameters by their logical axes, what is shaped like them beside them."""
    check_mesh(cfg, mesh)
    shapes = state_shapes(cfg, optimizer, tensor=mesh.shape["tensor"], scan=scan)
    params = tree_shardings(mesh, param_axes(cfg, scan=scan), shapes.params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state)
