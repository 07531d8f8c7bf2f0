"""What XLA:CPU makes of a decode step: weights are read as they lie, in the dtype they have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import PRESETS
from llama_jax.generation import programs
from llama_jax.generation.request import Row, Settings, to_controls
from llama_jax.model import quantize_params
from llama_jax.plan.hlo import instructions
from tests.model.make import params_of

MHA = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_kv_heads=6)
GQA = dataclasses.replace(PRESETS["tiny"], num_layers=2)
CACHE_LENGTH = 251  # a prime: no array of the cache or of its scores has as many numbers as a weight


def decode_program(cfg, params, batch: int):
    rows = [Row([1, 2, 3], Settings(max_new_tokens=50, temperature=0), ())] * batch
    tokens, controls = np.ones((batch, 16), np.int32), to_controls(rows, batch, cfg.vocab_size)
    lengths = np.full(batch, 3, np.int32)
    state, _ = programs.prefill(cfg, params, tokens, lengths, controls, cache_length=CACHE_LENGTH, num_top=0)
    lowered = programs.decode.lower(cfg, params, state, np.zeros(batch, bool), np.int32(8), num_top=0)
    return list(instructions(lowered.compile().as_text()))


def touched(program, opcodes: tuple[str, ...], sizes: set[int], dtypes: tuple[str, ...]) -> list[str]:
    """Instructions of these kinds that make an array of one of these sizes."""
    made = [(i, dtype, math.prod(shape)) for i in program if i.opcode in opcodes for dtype, shape in i.arrays]
    return [str(i) for i, dtype, size in made if dtype in dtypes and size in sizes]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("cfg", [MHA, GQA], ids=["one key head per query head", "grouped"])
@pytest.mark.parametrize("method", ["", "w8a8"])
def test_no_weight_is_made_wider_or_moved(cfg, batch, method):
    params = params_of(cfg, jnp.bfloat16)
    params = jax.jit(quantize_params, static_argnums=1)(params, method) if method else params
    weights = {leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1 and leaf.shape[-1] > 1}
    found = decode_program(cfg, params, batch)
    assert not touched(found, ("convert",), weights, ("f32", "s32"))
    assert not touched(found, ("copy", "transpose"), weights, ("bf16", "s8", "f32"))


def test_float32_weights_are_not_moved():
    params = params_of(GQA)
    weights = {leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert not touched(decode_program(GQA, params, 1), ("copy", "transpose"), weights, ("f32",))
