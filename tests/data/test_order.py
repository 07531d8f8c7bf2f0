"""Shuffled orders: permutations, each its own, that any place can be asked of."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.order import shuffled


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64))
def test_everything_stands_somewhere_once(size, seed):
    order = shuffled(np.arange(size), size, seed, "rows")
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(1, 10**9), seed=st.integers(0, 100), data=st.data())
def test_a_place_is_the_same_asked_alone(size, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = shuffled(places, size, seed)
    assert [int(shuffled(np.array([place]), size, seed)[0]) for place in places] == together.tolist()
    assert together.min() >= 0 and together.max() < size


def test_seeds_and_epochs_give_unrelated_orders():
    size = 4000
    keys = [(seed, "rows", 0, epoch) for seed in range(4) for epoch in range(4)] + [(0, "documents")]
    orders = np.stack([shuffled(np.arange(size), size, *key) for key in keys])
    correlation = np.corrcoef(np.vstack([orders, np.arange(size)])) - np.eye(len(keys) + 1)
    assert np.abs(correlation).max() < 0.08  # five standard deviations of 1 / sqrt(4000)


def test_neighbours_are_spread_evenly():
    size = 1000
    at_first = np.array([shuffled(np.arange(3), size, seed)[0] for seed in range(500)])
    assert abs(at_first.mean() / size - 0.5) < 0.06 and abs(at_first.std() / size - 12**-0.5) < 0.03
    steps = np.diff(shuffled(np.arange(size), size, 0)) % size
    assert len(np.unique(steps)) > 0.55 * size  # random steps: 1 - 1/e of all


def test_an_order_never_changes():
    """A run that is resumed with a newer version reads on in the same order."""
    assert shuffled(np.arange(10), 10, 0, "rows", 0, 0).tolist() == RECORDED


RECORDED = [9, 5, 1, 4, 7, 2, 8, 6, 0, 3]
