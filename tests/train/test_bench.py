"""What train.bench measures, and the data that it measures with."""

import json

import numpy as np
import pytest

from configs import train_bench
from llama_jax.errors import ExitCode, LlamaError
from train.measure import measure
from train.random_data import random_dataset


@pytest.mark.parametrize(("length", "documents"), [(32, 4), (33, 4), (16, 1)])
def test_every_row_of_the_random_data_holds_as_many_documents(tmp_path, length, documents):
    dataset = random_dataset(tmp_path, vocab_size=70, length=length, rows=6, documents=documents)
    each = length // documents
    assert len(dataset) == 6
    for i in range(6):
        row = dataset.row(i)
        np.testing.assert_array_equal(row.segment_ids[: each * documents], np.repeat(np.arange(documents) + 1, each))
        assert not row.segment_ids[each * documents :].any()
        assert row.weights.sum() == documents * (each - 1)
        assert row.tokens.max() < 70


def config():
    found = train_bench.get_config("tiny")
    found.train.update(batch_size=8, length=32, dtype="float32")
    found.steps = 2
    return found.to_dict()


def test_a_step_is_split_into_input_gradient_and_optimizer():
    found = measure(config())
    assert json.loads(json.dumps(found)).keys() == found.keys()
    parts = [found[name] for name in ("input_seconds", "input_work_seconds", "forward_backward_seconds", "optimizer_seconds")]
    assert min(parts) > 0
    assert found["tokens_per_second"] == pytest.approx(256 / found["step_seconds"])


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("documents", 0, "1 to 16"),
        ("documents", 17, "1 to 16"),
        ("steps", 0, "1 or more"),
        ("train.batch_size", 0, "1 or more"),
        ("train.length", 1, "2 to 256"),
        ("train.length", 257, "2 to 256"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name, value, wanted):
    found = config()
    group = found["train"] if name.startswith("train.") else found
    group[name.removeprefix("train.")] = value
    with pytest.raises(LlamaError, match=f"{name} is {value}, expected {wanted}") as refused:
        measure(found)
    assert refused.value.code == ExitCode.BAD_CONFIG
