"""The decode program: in place, and nothing that grows with the cache beside it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generation import programs
from llama_jax.generation.engine import Engine
from llama_jax.generation.request import Row, Settings, to_controls
from llama_jax.model import param_shapes
from tests.generation.make import CFG, ids, to_shapes

LONG = 65_536
WIDE = dataclasses.replace(CFG, head_dim=64)  # keys far larger than the float32 scores of one query


def state_shapes(rows: int, dtype: jnp.dtype, cache_dtype: str = "auto") -> tuple:
    """Shapes of parameters and of a state with a long cache; allocates nothing."""
    params = param_shapes(WIDE, dtype)
    controls = to_shapes(to_controls([Row([5], Settings(max_new_tokens=LONG - 1), ())] * rows, rows, WIDE.vocab_size))
    tokens, lengths = jax.ShapeDtypeStruct((rows, 16), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    state, _ = jax.eval_shape(
        lambda *arrays: programs.prefill(WIDE, *arrays, cache_length=LONG, num_top=0, cache_dtype=cache_dtype),
        *(params, tokens, lengths, controls),
    )
    return params, state


@pytest.mark.parametrize("dtype, cache_dtype", [(jnp.float32, "auto"), (jnp.bfloat16, "auto"), (jnp.bfloat16, "int8")])
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_updates_the_cache_in_place(rows, dtype, cache_dtype):
    params, state = state_shapes(rows, dtype, cache_dtype)
    halt, n = jax.ShapeDtypeStruct((rows,), bool), jax.ShapeDtypeStruct((), jnp.int32)
    memory = programs.decode.lower(WIDE, params, state, halt, n, num_top=0).compile().memory_analysis()
    layer = jax.tree.leaves(state.cache)[0]
    assert layer.shape == (rows, WIDE.num_kv_heads, LONG, WIDE.head_dim)
    assert layer.dtype == (jnp.int8 if cache_dtype == "int8" else dtype)
    cache = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache
    casts = 2 * layer.size * jnp.dtype(dtype).itemsize if cache_dtype == "int8" else 0  # a layer's keys and values
    assert memory.temp_size_in_bytes < casts + layer.size * layer.dtype.itemsize


def begin(llama, new: list[int], **settings) -> tuple:
    rows = [Row(ids(5, seed=i), Settings(max_new_tokens=n, temperature=0, **settings), ()) for i, n in enumerate(new)]
    return Engine(CFG, llama.params, CFG.max_length).prefill(rows, 4, 0)


def decode(llama, state, n: int, halt=(False,) * 4):
    return programs.decode(CFG, llama.params, state, np.array(halt), np.int32(n), num_top=0)


def test_a_donated_state_is_gone(llama):
    state, _ = begin(llama, [9])
    decode(llama, state, 1)
    assert state.cache[0].k.is_deleted() and state.lengths.is_deleted()


def test_chunks_of_any_size_give_the_same_tokens(llama):
    whole = np.asarray(decode(llama, begin(llama, [20, 20, 20, 20])[0], 12)[1].tokens)
    state, parts = begin(llama, [20, 20, 20, 20])[0], []
    for n in (1, 4, 0, 7):
        state, output = decode(llama, state, n)
        parts.append(np.asarray(output.tokens)[:, :n])
        assert np.all(np.asarray(output.tokens)[:, n:] == -1)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[:, :12])


def test_a_row_that_is_done_or_halted_makes_nothing_more(llama):
    state, _ = begin(llama, [3, 20, 20])
    state, output = decode(llama, state, 8, halt=(False, True, False, False))
    tokens = np.asarray(output.tokens)
    assert (tokens >= 0).sum(axis=1).tolist() == [2, 0, 8, 0]
    assert np.asarray(state.done).tolist() == [True, True, False, True]
    assert np.asarray(state.lengths).tolist() == [7, 5, 13, 1]


def test_rows_that_are_all_done_end_the_chunk(llama):
    state, _ = begin(llama, [2, 3])
    state, output = decode(llama, state, 32)
    assert np.asarray(state.lengths).tolist() == [6, 7, 1, 1]
    assert (np.asarray(output.tokens) >= 0).sum() == 3
