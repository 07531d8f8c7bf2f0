"""Weights as they are read, and as the platform that generates with them reads them best."""

import contextlib

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.source import Source
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.model import Params
from llama_jax.model.fused import can_fuse, fuse_layer


def load_laid_out(opened: Checkpoint | Source, dtype: np.dtype, *, mesh: Mesh | None, quantize: str) -> Params:
    """load_params, laid out for the devices that the weights are read to."""
    return laid_out(load_params(opened, dtype, mesh=mesh, quantize=quantize), mesh)


def laid_out(params: Params, mesh: Mesh | None) -> Params:
    """The same weights; on GPUs, those of the same activations in one array (llama_jax.model.fused).

    Args:
        params: where they are fused their list of layers is emptied, so that no more than one layer is there twice.
        mesh: what they lie on; None for one device.
    """
    if not is_fused_on(_platform(params), params, mesh):
        return params
    fuse, layers = jax.jit(fuse_layer), []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        while params["layers"]:
            layers.append(jax.block_until_ready(fuse(params["layers"].pop(0))))
    return {**params, "layers": layers}


def is_fused_on(platform: str, params: Params, mesh: Mesh | None) -> bool:
    """Whether a platform's generation takes such weights (or their shapes) fused: on a GPU, where XLA would join some products
    by itself and copy their weights to do so at each call; not in float32, in which speed is not what is asked for."""
    return platform == "gpu" and params["embedding"].dtype != np.float32 and can_fuse(params["layers"][0], mesh)


def _platform(params: Params) -> str:
    (platform,) = {device.platform for device in params["embedding"].devices()}
    return platform
