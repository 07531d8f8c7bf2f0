"""The stream of batches: a function of seed and step, whoever asks for whatever part of it."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.dataset import MIXTURE_ROWS, mixture_schedule
from llama_jax.data.pipeline import batch_rows, eval_batches, train_batches
from tests.data.make import dataset_of, texts, write_jsonl


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("pipeline")
    write_jsonl(folder / "a.jsonl", texts(60))
    write_jsonl(folder / "b.jsonl", texts(25, seed=1))
    plain = dataset_of(folder / "*.jsonl", tokenizer, folder / "cache")
    mixed = dataset_of(f"{folder}/a.jsonl@3,{folder}/b.jsonl@1", tokenizer, folder / "cache")
    return {"plain": plain, "mixed": mixed}


def taken(batches, count: int) -> list:
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_equal(ours, wanted) -> None:
    for name, a, b in zip(wanted._fields, ours, wanted, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == np.ascontiguousarray(b).tobytes(), name


@pytest.mark.parametrize("name", ["plain", "mixed"])
@settings(max_examples=15)
@given(start=st.integers(0, 200), batch_size=st.integers(1, 9), prefetch=st.integers(0, 3), data=st.data())
def test_a_stream_resumes_anywhere_in_any_split(datasets, name, start, batch_size, prefetch, data):
    dataset = datasets[name]
    seed = data.draw(st.integers(0, 3))
    cut = data.draw(st.integers(0, batch_size))
    whole = taken(train_batches(dataset, batch_size=batch_size, seed=seed, start_step=start, prefetch=prefetch), 3)
    for part in (slice(0, cut), slice(cut, batch_size)):
        later = train_batches(dataset, batch_size=batch_size, seed=seed, start_step=start + 1, rows=part, prefetch=0)
        for ours, wanted in zip(taken(later, 2), whole[1:], strict=True):
            assert_equal(ours, type(wanted)(*(array[part] for array in wanted)))
    numbers = batch_rows(dataset, start, batch_size, seed)
    for b, number in enumerate(numbers.tolist()):
        assert_equal(dataset.row(number), type(whole[0])(*(array[b] for array in whole[0])))


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_has_every_row_once_and_the_next_another_order(datasets, seed):
    dataset = datasets["plain"]
    rows = [dataset.stream_rows(np.arange(len(dataset)) + e * len(dataset), seed).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(len(dataset))) for epoch in rows)
    assert rows[0] != rows[1] != rows[2] != list(range(len(dataset)))
    assert rows[0] != dataset.stream_rows(np.arange(len(dataset)), seed + 2).tolist()


def test_batches_are_consecutive_parts_of_the_stream(datasets):
    dataset = datasets["mixed"]
    stream = dataset.stream_rows(np.arange(60), 7)
    np.testing.assert_array_equal(np.concatenate([batch_rows(dataset, s, 6, 7) for s in range(10)]), stream)
    np.testing.assert_array_equal(np.concatenate([batch_rows(dataset, s, 4, 7) for s in range(15)]), stream)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6))
def test_sources_have_their_shares_at_any_time(weights):
    schedule = mixture_schedule(weights)
    shares = np.array(weights) / sum(weights)
    counts = np.bincount(schedule, minlength=len(weights))
    assert counts.sum() == MIXTURE_ROWS and counts.min() >= 1
    assert np.abs(counts / MIXTURE_ROWS - shares).max() <= len(weights) / MIXTURE_ROWS
    for source, count in enumerate(counts):
        so_far = np.cumsum(schedule == source)
        assert np.abs(so_far - np.arange(1, MIXTURE_ROWS + 1) * count / MIXTURE_ROWS).max() <= 1 + len(weights) / 2


def test_every_source_of_a_mixture_is_read_through_before_it_comes_again(datasets):
    dataset = datasets["mixed"]
    sizes = [source["rows"] for source in dataset.statistics.sources]
    rows = dataset.stream_rows(np.arange(4 * max(sizes)), 0)
    for first, size in zip((0, sizes[0]), sizes, strict=True):
        own = rows[(rows >= first) & (rows < first + size)] - first
        assert sorted(own[:size].tolist()) == list(range(size))
        assert sorted(own[size : 2 * size].tolist()) == list(range(size))
    assert [source["share"] for source in dataset.statistics.sources] == [0.75, 0.25]


def test_evaluation_has_every_row_once_and_fills_up_with_weight_0(datasets):
    dataset = datasets["plain"]
    assert len(dataset) % 4
    batches = list(eval_batches(dataset, 4))
    assert {batch.tokens.shape for batch in batches} == {(4, 32)}
    for i in range(len(dataset)):
        assert_equal(type(batches[0])(*(array[i % 4] for array in batches[i // 4])), dataset.row(i))
    rest = len(dataset) % 4
    assert not batches[-1].weights[rest:].any() and not batches[-1].segment_ids[rest:].any()
    assert sum(batch.weights.sum() for batch in batches) == dataset.statistics.learnt_tokens
    halves = [list(eval_batches(dataset, 4, part)) for part in (slice(0, 1), slice(1, 4))]
    for whole, *parts in zip(batches, *halves, strict=True):
        for array, *pieces in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), array)


def test_threads_end_with_the_iterator(datasets):
    before = set(threading.enumerate())
    batches = train_batches(datasets["plain"], batch_size=2, seed=0, prefetch=3)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(10)  # the batch that is being made is finished
        assert not thread.is_alive()
