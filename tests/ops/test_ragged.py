"""The TPU's kernel for single tokens, interpreted on the CPU, against attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ops.attention import attend
from llama_jax.ops.kernels import ragged
from llama_jax.ops.kernels.ragged import attend_ragged, block_slots, block_to_fetch, supports
from llama_jax.ops.qarray import quantize

HEAD_DIM = 128
ROWS, SLOTS = 3, 512
lengths_of_rows = st.lists(st.integers(1, SLOTS), min_size=ROWS, max_size=ROWS)
any_group = st.sampled_from([1, 4, 8])
kernel = jax.jit(functools.partial(attend_ragged, interpret=True))


def draw(seed: int, group: int, dtype=np.float32, K: int = 2) -> tuple[np.ndarray, ...]:
    """q [B, N, H], k and v [B, K, S, H], with scores of about 2."""
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, K * group, HEAD_DIM), *[(ROWS, K, SLOTS, HEAD_DIM)] * 2)
    return tuple((scale * rng.normal(size=shape)).astype(dtype) for scale, shape in zip((1.5, 1.5, 1.0), shapes, strict=True))


@jax.jit
def plain(q, k, v, lengths):
    return attend(q[:, None], k, v, jnp.arange(k.shape[2]) < lengths[:, None, None])[:, 0]


def check(q, k, v, lengths, *scales, atol: float) -> None:
    """Against attention in float32 to the same numbers; slots that are not filled hold another sequence's."""
    lengths = np.asarray(lengths, np.int32)
    free = np.arange(k.shape[2]) >= lengths[:, None]
    k, v = (np.where(free[:, None, :, None], np.asarray(x.max(), x.dtype), x) for x in (k, v))
    exact = [x.astype(np.float32) for x in (q, k, v)]
    exact[1:] = [x * scale[..., None] for x, scale in zip(exact[1:], scales or (np.ones(1),) * 2, strict=True)]
    out = kernel(q, k, v, lengths, *scales)
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out.astype(np.float32), plain(*exact, lengths), rtol=0, atol=atol)


@settings(max_examples=15)
@given(st.integers(0, 2**32), any_group, lengths_of_rows)
def test_a_row_attends_to_what_it_has_filled(seed, group, lengths):
    check(*draw(seed, group), lengths, atol=1e-5)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("lengths", [(1, SLOTS, 257), (128, 129, 1), (SLOTS, SLOTS, SLOTS), (256, 512, 384)])
def test_lengths_at_the_ends_of_blocks(group, lengths, monkeypatch):
    monkeypatch.setattr(ragged, "LARGEST_BLOCK", 128)
    check(*draw(1, group), lengths, atol=1e-5)


@settings(max_examples=10)
@given(st.integers(0, 2**32), any_group, lengths_of_rows)
def test_bfloat16_is_taken_and_given_back(seed, group, lengths):
    check(*draw(seed, group, ml_dtypes.bfloat16), lengths, atol=0.03)


@pytest.mark.parametrize("group, dtype, atol", [(1, np.float32, 1e-5), (8, np.float32, 1e-5), (4, ml_dtypes.bfloat16, 0.03)])
def test_int8_keys_and_values_are_multiplied_with_their_scales(group, dtype, atol):
    q, k, v = draw(2, group, np.float32)
    k, v = (quantize(jnp.asarray(x * size), 1) for x, size in ((k, 1.0), (v, np.linspace(0.1, 1, SLOTS)[:, None])))
    values, scales = ([np.asarray(x) for x in parts] for parts in ((k.value, v.value), (k.scale[..., 0], v.scale[..., 0])))
    check(q.astype(dtype), *values, (1, 200, SLOTS), *scales, atol=atol)


def fetches(lengths: list[int], size: int, count: int) -> list[tuple[int, int]]:
    """Rows and blocks that are read, in order: a step whose block is the one before reads nothing."""
    steps = [block_to_fetch(b, j, jnp.asarray(lengths), size=size) for b in range(len(lengths)) for j in range(count)]
    at = [(int(b), int(block)) for b, _, block, _ in steps]
    return [here for here, before in zip(at, [None, *at], strict=False) if here != before]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=4))
def test_filled_blocks_are_fetched_once_and_no_others(lengths):
    filled = [(b, block) for b, length in enumerate(lengths) for block in range(-(-length // 4))]
    most = max(block for _, block in filled) + 1
    assert fetches(lengths, 4, most) == filled
    assert fetches(lengths, 4, 4) == filled


def test_every_step_finds_its_own_block():
    lengths = jnp.asarray([5, 16, 1])
    for b, filled in enumerate([2, 4, 1]):
        for j in range(filled):
            assert tuple(int(x) for x in block_to_fetch(b, j, lengths, size=4)) == (b, 0, j, 0)


@pytest.mark.parametrize(
    "shape, itemsize, slots",
    [((1, 4, 2048, 128), 2, 512), ((1, 32, 2048, 128), 2, 128), ((1, 8, 2048, 128), 2, 512), ((1, 1, 384, 128), 2, 128)],
)
def test_a_block_divides_the_cache_and_fits_on_the_chip(shape, itemsize, slots):
    assert block_slots(shape, itemsize) == slots


@pytest.mark.parametrize("slots, head_dim, does", [(128, 128, True), (384, 256, True), (200, 128, False), (128, 64, False)])
def test_the_kernel_takes_whole_blocks_only(slots, head_dim, does):
    assert supports(slots, head_dim) == does


def test_the_kernel_multiplies_at_the_precision_that_tpus_have_whatever_the_user_set():
    q, k, v = draw(0, 4, ml_dtypes.bfloat16)
    with jax.default_matmul_precision("highest"):
        program = str(jax.make_jaxpr(functools.partial(attend_ragged, interpret=True))(q, k, v, jnp.ones(ROWS, jnp.int32)))
    assert program.count("dot_general[") == 2 and "HIGHEST" not in program
