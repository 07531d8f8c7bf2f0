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


def decode_program(cfg, params, batch: int, cache_dtype: str = "auto"):
    rows = [Row([1, 2, 3], Settings(max_new_tokens=50, temperature=0), ())] * batch
    tokens, controls = np.ones((batch, 16), np.int32), to_controls(rows, batch, cfg.vocab_size)
    lengths = np.full(batch, 3, np.int32)
    options = dict(cache_length=CACHE_LENGTH, num_top=0, cache_dtype=cache_dtype)
    state, _ = programs.prefill(cfg, params, tokens, lengths, controls, **options)
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
    assert not touched(found, ("fusion", "call"), weights, ("u16",))  # the embedding's bits, of which a row is read


def test_float32_weights_are_not_moved():
    params = params_of(GQA)
    weights = {leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert not touched(decode_program(GQA, params, 1), ("copy", "transpose"), weights, ("f32",))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("cfg", [MHA, GQA], ids=["one key head per query head", "grouped"])
@pytest.mark.parametrize("dtype, name", [(jnp.float32, "f32"), (jnp.bfloat16, "bf16")], ids=["float32", "bfloat16"])
def test_a_cache_in_int8_is_written_as_it_lies_and_cast_once_a_step(cfg, batch, dtype, name):
    """For the product with the queries, and with the probabilities; no scale is made as large as the values."""
    size = batch * cfg.num_kv_heads * CACHE_LENGTH * cfg.head_dim
    found = decode_program(cfg, params_of(cfg, dtype), batch, "int8")
    halves = 2 * cfg.num_layers
    assert len(touched(found, ("convert",), {size}, (name,))) == halves
    assert not touched(found, ("convert",), {size}, tuple({"f32", "bf16", "s8", "s32"} - {name}))
    assert len(touched(found, ("dynamic-update-slice",), {size}, ("s8",))) == halves
    others = ("copy", "transpose", "multiply", "broadcast", "select", "pad", "scatter", "concatenate")
    assert not touched(found, (*others, "dynamic-update-slice"), {size}, ("f32", "bf16"))
    assert not touched(found, others, {size}, ("s8",))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("cfg", [MHA, GQA], ids=["one key head per query head", "grouped"])
def test_a_cache_of_16_bits_is_written_as_it_lies(cfg, batch):
    """All layers' keys and values in one pass that keeps bits; XLA:CPU updates slices of bfloat16 in a float32 copy."""
    size = batch * cfg.num_kv_heads * CACHE_LENGTH * cfg.head_dim
    found = decode_program(cfg, params_of(cfg, jnp.bfloat16), batch)
    assert not touched(found, ("convert", "dynamic-update-slice", "copy", "scatter"), {size}, ("f32", "bf16", "u16"))
    assert len(touched(found, ("select",), {size}, ("u16",))) == 2 * cfg.num_layers
