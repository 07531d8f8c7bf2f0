"""Packing: every token has one place, no row overflows, and the same data gives the same rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.packing import PACKINGS, Index, load_index, pack, save_index

lengths_lists = st.lists(st.integers(0, 70), min_size=0, max_size=60)
settings = dict(lengths=lengths_lists, length=st.integers(1, 32), seed=st.integers(0, 9), window=st.integers(1, 80))


def row_sizes(index: Index) -> list[int]:
    sizes = index.pieces[:, 2] - index.pieces[:, 1]
    return [int(sizes[a:b].sum()) for a, b in zip(index.rows[:-1], index.rows[1:], strict=True)]


@pytest.mark.parametrize("packing", PACKINGS)
@given(**settings)
def test_every_token_is_in_one_row_and_no_row_overflows(packing, lengths, length, seed, window):
    index = pack(np.array(lengths, np.int64), length, seed=seed, packing=packing, window=window)
    found = sorted((d, t) for d, start, end in index.pieces.tolist() for t in range(start, end))
    assert found == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    sizes = row_sizes(index)
    assert all(0 < size <= length for size in sizes)
    assert index.padding_share(length) == pytest.approx(1 - sum(lengths) / (len(sizes) * length) if sizes else 0)


@given(**settings)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, length, seed, window):
    index = pack(np.array(lengths, np.int64), length, seed=seed, packing="best_fit", window=window)
    pieces = np.bincount(index.pieces[:, 0], minlength=len(lengths))
    assert pieces.tolist() == [-(-n // length) for n in lengths]


@given(**settings)
def test_concat_leaves_padding_in_the_last_row_only(lengths, length, seed, window):
    sizes = row_sizes(pack(np.array(lengths, np.int64), length, seed=seed, packing="concat", window=window))
    assert all(size == length for size in sizes[:-1])


@pytest.mark.parametrize("packing", PACKINGS)
@given(**settings)
def test_the_same_data_gives_the_same_rows(packing, lengths, length, seed, window):
    first, second = (pack(np.array(lengths, np.int64), length, seed=seed, packing=packing, window=window) for _ in range(2))
    np.testing.assert_array_equal(first.pieces, second.pieces)
    np.testing.assert_array_equal(first.rows, second.rows)


def reference_best_fit(sizes: list[int], length: int) -> int:
    """Rows that best-fit decreasing needs, by looking at all of them."""
    spaces: list[int] = []
    for n in sorted(sizes, reverse=True):
        fitting = [s for s in spaces if s >= n]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - n)
        else:
            spaces.append(length - n)
    return len(spaces)


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_best_fit_needs_as_many_rows_as_best_fit_decreasing(lengths):
    index = pack(np.array(lengths, np.int64), 32, seed=0, packing="best_fit", window=1000)
    assert len(index) == reference_best_fit(lengths, 32)


def test_rows_hold_documents_from_everywhere():
    index = pack(np.full(5000, 8, np.int64), 64, seed=0, packing="best_fit", window=100)
    spread = [np.ptp(index.pieces[a:b, 0]) for a, b in zip(index.rows[:-1], index.rows[1:], strict=True)]
    assert np.mean(spread) > 3000  # of eight random numbers below 5000: 3889


def test_padding_is_small_for_documents_of_all_lengths():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 2
    assert pack(lengths, 2048, seed=0, packing="best_fit", window=10_000).padding_share(2048) < 0.002
    assert pack(lengths, 2048, seed=0, packing="concat", window=0).padding_share(2048) < 0.001


def test_a_damaged_index_is_not_read(tmp_path):
    index = pack(np.arange(1, 40), 16, seed=0, packing="best_fit", window=10)
    folder = tmp_path / "index"
    assert load_index(folder) is None
    save_index(folder, index, {"tokens": 780})
    loaded, counts = load_index(folder)
    np.testing.assert_array_equal(loaded.pieces, index.pieces)
    np.testing.assert_array_equal(loaded.rows, index.rows)
    assert counts == {"tokens": 780}
    for name in ("pieces.bin", "rows.bin", "index.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert load_index(folder) is None
        save_index(folder, index, {"tokens": 780})
        assert load_index(folder) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
