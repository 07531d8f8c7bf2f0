"""What training carries from step to step, and where it lies.

What trains, the weights of the functions below, is the adapter with LoRA and otherwise the parameters, with None in the place
of those that `freeze` names; gradients, the optimizer's state and the average are trees like it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MESH_AXES, MeshShape, resolve_mesh
from llama_jax.model import (
    LoraConfig,
    Params,
    adapter_axes,
    adapter_shapes,
    init_adapter,
    init_params,
    param_axes,
    param_shapes,
    quantize_axes,
    quantize_params,
)
from llama_jax.sharding import sharding, tree_shardings
from llama_jax.training.optimizer import Optimizer, evaluation_weights
from llama_jax.training.weights import combine, is_axes, without_frozen

NO_LORA = LoraConfig()
BASE_DTYPES = ("float32", "bfloat16")
ADAPTER_KEY = 1  # folded into the key of the parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: int32 scalar, batches seen.
    params: float32 master weights; with LoRA the base, which does not change: float32, bfloat16, or in int8.
    adapter: float32; {} without LoRA.
    opt_state: of the optimizer; moments lie where their weights do.
    ema: float32 average of what trains; {} without one.
    """

    step: Array
    params: Params
    adapter: Any
    opt_state: Any
    ema: Any


@dataclasses.dataclass(frozen=True)
class StateForm:
    """What a state is made of.

    Attributes:
        scan: layers as one dict of [L, ...].
        lora: rank 0 trains the parameters.
        base_dtype, quantize: with LoRA, of the base: float32 | bfloat16, and "" | int8 of its projections and head.
        freeze: regular expressions of the names of parameters that do not train (weights.without_frozen).
        ema: whether there is an average.
    """

    scan: bool
    lora: LoraConfig = NO_LORA
    base_dtype: str = "float32"
    quantize: str = ""
    freeze: tuple[str, ...] = ()
    ema: bool = False

    def __post_init__(self):
        for name, value, known in (("base_dtype", self.base_dtype, BASE_DTYPES), ("quantize", self.quantize, ("", "int8"))):
            if value not in known:
                _refuse(f"lora.{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
        if not self.lora.rank and (self.base_dtype != "float32" or self.quantize):
            _refuse(
                f"the base is {self.quantize or self.base_dtype}, and without LoRA parameters train in float32: set lora.rank, "
                "or leave lora.base_dtype and lora.quantize out"
            )
        if self.lora.rank and self.freeze:
            _refuse(f"freeze is {self.freeze}, and with LoRA only the adapter trains: leave freeze empty")


def trained_axes(cfg: ModelConfig, form: StateForm) -> Any:
    """Logical axes of what trains: what make_optimizer is made for."""
    if form.lora.rank:
        return adapter_axes(cfg, form.lora, scan=form.scan)
    return without_frozen(param_axes(cfg, scan=form.scan), form.freeze)


def trained(form: StateForm, params: Params, adapter: Any) -> Any:
    """What trains, of a state's two trees."""
    return adapter if form.lora.rank else without_frozen(params, form.freeze)


def with_trained(form: StateForm, params: Params, adapter: Any, weights: Any) -> tuple[Params, Any]:
    """params and adapter with `weights`, a tree like what trains, in its place."""
    return (params, weights) if form.lora.rank else (combine(weights, params), adapter)


def evaluated(form: StateForm, state: TrainState) -> tuple[Params, Any]:
    """params and adapter to evaluate, to sample with and to give away: the average if there is one, or schedule_free's."""
    weights = state.ema or evaluation_weights(state.opt_state, trained(form, state.params, state.adapter))
    return with_trained(form, state.params, state.adapter, weights)


def init_state(
    cfg: ModelConfig, optimizer: Optimizer, key: Array, form: StateForm, *, mesh: Mesh, params: Params | None = None
) -> TrainState:
    """A state that has seen nothing, made in place on the mesh.

    Args:
        key: of random parameters, and of the adapter.
        params: to start from, in `form` and with the vocabulary padded for the mesh; random when not given. Arrays that lie
            where they should are taken as they are, and a step that is given the state frees them.
    """
    places = state_shardings(cfg, optimizer, form, mesh=mesh)
    if params is not None:
        _check_params(params, state_shapes(cfg, optimizer, form, tensor=mesh.shape["tensor"]).params)
        params = jax.device_put(params, places.params)

    def init_base(key: Array) -> Params:
        return _base(init_params(cfg, key, form.base_dtype, scan=form.scan, tensor=mesh.shape["tensor"]), form)

    def init_rest(key: Array, params: Params) -> tuple[Any, Any, Any]:
        adapter = {}
        if form.lora.rank:
            adapter = init_adapter(cfg, form.lora, params, jax.random.fold_in(key, ADAPTER_KEY), scan=form.scan)
        weights = trained(form, params, adapter)
        return adapter, optimizer.init(weights), jax.tree.map(jnp.copy, weights) if form.ema else {}

    with jax.set_mesh(mesh):
        if params is None:
            params = jax.jit(init_base, out_shardings=places.params)(key)
        rest = jax.jit(init_rest, out_shardings=(places.adapter, places.opt_state, places.ema))(key, params)
    return TrainState(jax.device_put(jnp.int32(0), places.step), params, *rest)


def state_shapes(cfg: ModelConfig, optimizer: Optimizer, form: StateForm, *, tensor: int) -> TrainState:
    """The state as ShapeDtypeStructs; allocates nothing."""
    params = param_shapes(cfg, form.base_dtype, scan=form.scan, tensor=tensor)
    params = jax.eval_shape(lambda params: _base(params, form), params)
    adapter = adapter_shapes(cfg, form.lora, scan=form.scan) if form.lora.rank else {}
    weights = trained(form, params, adapter)
    opt_state = jax.eval_shape(optimizer.init, weights)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, adapter, opt_state, weights if form.ema else {})


def check_mesh(cfg: ModelConfig, mesh: Mesh, batch_size: int | None = None) -> None:
    """Refuses a mesh that does not divide the model, or the rows of a batch."""
    shape = MeshShape(**{name: mesh.shape[name] for name in MESH_AXES})
    resolve_mesh(cfg, shape, mesh.size, batch_size=batch_size)


def state_shardings(cfg: ModelConfig, optimizer: Optimizer, form: StateForm, *, mesh: Mesh) -> TrainState:
    """Where every array of the state lies: weights by their logical axes, what is shaped like them beside them."""
    check_mesh(cfg, mesh)
    shapes = state_shapes(cfg, optimizer, form, tensor=mesh.shape["tensor"])
    axes = param_axes(cfg, scan=form.scan)
    params = tree_shardings(mesh, quantize_axes(axes) if form.quantize else axes, shapes.params)
    axes = trained_axes(cfg, form)
    adapter = tree_shardings(mesh, axes, shapes.adapter) if form.lora.rank else {}
    opt_state = _beside(mesh, axes, trained(form, shapes.params, shapes.adapter), shapes.opt_state)
    return TrainState(_everywhere(mesh), params, adapter, opt_state, trained(form, params, adapter) if form.ema else {})


def _beside(mesh: Mesh, axes: Any, weights: Any, opt_state: Any) -> Any:
    """Where an optimizer's arrays lie, from the axes and shapes of its weights: beside the weight if shaped like it, else
    everywhere (counts, and Adafactor's means over rows and columns: 0.05 GB for 70B)."""

    def place(names: tuple[str, ...], weight: Any, part: Any) -> Any:
        there = sharding(mesh, names, weight.shape)
        return jax.tree.map(lambda leaf: there if leaf.shape == weight.shape else _everywhere(mesh), part)

    def visit(node: Any) -> Any:  # dicts are trees like the weights
        return jax.tree.map(place, axes, weights, node, is_leaf=is_axes) if isinstance(node, dict) else _everywhere(mesh)

    return jax.tree.map(visit, opt_state, is_leaf=lambda node: isinstance(node, dict))


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _base(params: Params, form: StateForm) -> Params:
    return quantize_params(params) if form.quantize else params


def _check_params(params: Params, wanted: Params) -> None:
    def described(tree: Params) -> dict[str, str]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

    found, expected = described(params), described(wanted)
    for path in expected | found:
        if found.get(path) != expected.get(path):
            _refuse(
                f"params{path} is {found.get(path, 'missing')}, expected {expected.get(path, 'none')}: it is of another model"
            )


def _refuse(message: str) -> None:
    raise LlamaError(ExitCode.BAD_CONFIG, message)
