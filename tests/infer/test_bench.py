"""infer.bench: what it prints is what was timed, and its bytes and shares are counted right."""

import dataclasses
import importlib
import json
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags

from configs import sample
from configs.bench import get_config
from infer import bench_report, measure, program
from infer.floors import Floors, measure_floors
from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation import layout
from llama_jax.generation.request import Settings
from llama_jax.model import param_shapes
from llama_jax.model.fused import is_fused
from llama_jax.ops.qarray import QArray
from tests.infer import test_program

with (  # the flag `config` is that of other programs, too, which a process can define once
    mock.patch.object(program, "define_config"),
    mock.patch.object(flags, "DEFINE_string"),
):
    bench = importlib.import_module("infer.bench")

TINY = PRESETS["tiny"]
FLOORS = Floors(1e9, {"float32": 4e9, "int8": 8e9}, {"float32": 1e8, "int8": 2e8})


def config(**changes):
    c = get_config("tiny")
    c.update(dtype="float32", prompt_length=20, steps=8, batch_sizes=(1, 3))
    c.update(changes)
    return c.to_dict()


def subject_of(count: int = 1, **changes) -> measure.Subject:
    return measure.make_subject(config(**changes), jax.devices()[:count])


def test_weights_lie_as_a_loaded_model_s(monkeypatch):
    assert not is_fused(subject_of(dtype="bfloat16").params["layers"][0])
    monkeypatch.setattr(layout, "_platform", lambda params: "gpu")
    assert is_fused(subject_of(dtype="bfloat16").params["layers"][0])


@pytest.fixture
def floors_known(monkeypatch):
    monkeypatch.setattr(measure.floors, "measure_floors", lambda *_: FLOORS)


@pytest.fixture
def lines(floors_known):
    return list(measure.measure(subject_of(), (1, 3)))


def test_a_line_says_what_was_timed_in_numbers_that_agree(lines):
    for line, batch in zip(lines, (1, 3), strict=True):
        assert json.loads(json.dumps(line)) == line
        assert (line["batch"], line["prompt_length"], line["context"]) == (batch, 20, 64)
        assert line["step_seconds"] >= line["step_seconds_least"] > 0 and line["first_token_seconds"] > 0
        assert line["tokens_per_second"] == pytest.approx(batch / line["step_seconds"])
        assert line["prefill_tokens_per_second"] == pytest.approx(batch * 20 / line["first_token_seconds"])
        assert line["decode_share"] == pytest.approx(line["step_bytes"] / 1e8 / line["step_seconds_least"])
        assert line["prefill_share"] == pytest.approx(line["prefill_flops_per_second"] / 4e9)
        # 20 tokens of the prompt, one chosen from it, 16 before the clock starts, and half of 8.
        cache = 2 * TINY.num_layers * batch * TINY.num_kv_heads * TINY.head_dim * 41 * 4
        assert line["step_bytes"] == 4 * (TINY.num_params - TINY.vocab_size * TINY.embed_dim) + cache


def test_prefill_flops_are_those_of_the_products_and_of_half_the_attention(lines):
    products = sum(o * i for o, i in measure.matrices(TINY)) * TINY.num_layers
    attention = 2 * 20**2 * TINY.num_heads * TINY.head_dim * TINY.num_layers
    flops = 3 * (2 * 20 * products + attention + 2 * TINY.vocab_size * TINY.embed_dim)
    assert lines[1]["prefill_flops_per_second"] * lines[1]["first_token_seconds"] == pytest.approx(flops)


def test_int8_weights_are_counted_as_they_lie():
    subject = subject_of(quantize="int8")
    assert isinstance(subject.params["lm_head"], QArray)
    weights = sum(o * i + 4 * o for o, i in measure.matrices(TINY)) * TINY.num_layers
    head = (TINY.embed_dim + 4) * TINY.vocab_size
    norms = 4 * TINY.embed_dim * (2 * TINY.num_layers + 1)
    scales = 4 * (sum(o for o, _ in measure.matrices(TINY)) * TINY.num_layers + TINY.vocab_size)
    assert measure.step_bytes(subject, 1, 0) == {"float32": scales + norms, "int8": weights + head - scales}


def test_an_int8_cache_is_a_byte_a_value_and_a_scale_a_vector(floors_known):
    exact, rounded = subject_of(), subject_of(cache_dtype="int8")
    vectors = 2 * TINY.num_layers * 3 * TINY.num_kv_heads * 41
    without = measure.step_bytes(exact, 3, 0)["float32"]
    assert measure.step_bytes(exact, 3, 41) == {"float32": without + 4 * vectors * TINY.head_dim}
    assert measure.step_bytes(rounded, 3, 41) == {"float32": without + 4 * vectors, "int8": vectors * TINY.head_dim}
    (line,) = measure.measure(rounded, (3,))
    assert line["cache_dtype"] == "int8" and line["step_bytes"] == sum(measure.step_bytes(rounded, 3, 41).values())
    assert line["floor_seconds"] == pytest.approx((without + 4 * vectors) / 1e8 + vectors * TINY.head_dim / 2e8)


def test_weights_are_divided_over_the_mesh():
    model = dataclasses.asdict(dataclasses.replace(TINY, num_heads=8, num_kv_heads=8))
    whole = subject_of(8, model=model, batch_sizes=(8,), mesh=dict(data=8, fsdp=1, tensor=1, dcn_data=1))
    parts = subject_of(8, model=model, mesh=dict(data=1, fsdp=1, tensor=8, dcn_data=1))
    norms = 4 * TINY.embed_dim * (2 * TINY.num_layers + 1)
    (parts,), (whole,) = measure.step_bytes(parts, 8, 10).values(), measure.step_bytes(whole, 64, 10).values()
    assert parts - norms == pytest.approx((whole - norms) / 8)


def test_four_bits_are_half_a_byte():
    subject = subject_of(quantize="int4")
    values = sum(o * i for o, i in measure.matrices(TINY)) * TINY.num_layers + TINY.vocab_size * TINY.embed_dim
    assert measure.step_bytes(subject, 1, 0)["int8"] == values // 2


def test_random_weights_have_the_models_shapes_and_differ():
    params = subject_of().params
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, param_shapes(TINY))
    first, second = (np.asarray(layer["q_proj"]) for layer in params["layers"][:2])
    assert 0.015 < first.std() < 0.025 and not np.array_equal(first, second)
    assert np.all(np.asarray(params["final_norm"]) == 1)


def test_floors_are_rates_of_the_products_asked_for(monkeypatch):
    monkeypatch.setattr(measure.floors, "MOST_LAYERS", 2)
    found = measure_floors([(32, 16), (16, 48)], 64, ["float32", "int8"], jax.devices()[0])
    assert found.copy_bytes_per_second > 0
    assert found.matmul_flops_per_second.keys() == found.gemv_bytes_per_second.keys() == {"float32", "int8"}
    assert min(*found.matmul_flops_per_second.values(), *found.gemv_bytes_per_second.values()) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', expected bfloat16, float32 or float16"),
        ({"quantize": "int3"}, "quantize is 'int3', expected int8"),
        ({"cache_dtype": "int4"}, "cache_dtype is 'int4', expected auto .* or int8"),
        ({"batch_sizes": (1, 0)}, "from 1 up"),
        ({"context": 32}, "need 45: raise it"),
        ({"prompt_length": 250}, "the model's is 256: lower it"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(LlamaError, match=words) as refused:
        subject_of(**changes)
    assert refused.value.code == ExitCode.BAD_REQUEST


def test_sampling_settings_that_change_no_timing_are_not_there():
    unread = {"logit_bias", "stop", "stop_ids", "ignore_eos", "logprobs"}
    assert set(get_config().sampling) == set(sample.sampling()) - unread
    assert program.settings(get_config(), 8) == Settings(max_new_tokens=8, temperature=0)


@pytest.mark.parametrize(
    ("keys", "draft", "words"),
    [
        (["checkpoint", "steps", "max_length"], "", "nothing reads checkpoint, max_length without a draft: random weights"),
        (["adapter"], "", "nothing reads adapter without"),
        (["tokenizer"], "", "nothing reads tokenizer without"),
        (["draft_tokens"], "", "nothing reads draft_tokens without"),
        (["draft", "batch_sizes"], "lookup", "nothing reads batch_sizes with a draft: one sequence"),
        (["context"], "lookup", "nothing reads context with"),
        (["model.num_layers"], "lookup", "nothing reads model.num_layers with"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(keys, draft, words):
    with pytest.raises(LlamaError, match=words) as refused:
        bench.check_read(keys, draft)
    assert refused.value.code == ExitCode.BAD_REQUEST


@pytest.mark.parametrize("draft", ["", "lookup"])
def test_every_key_is_read_with_a_draft_or_without(draft):
    unread = (bench.OF_GUESSES, bench.OF_BATCHES)[bool(draft)]
    bench.check_read([key for key in get_config() if key not in unread], draft)
    assert set(unread) < set(get_config())


def test_keys_of_the_command_line_are_looked_at():
    done = test_program.run("bench", "--config.checkpoint=DIR", "--config.steps=8")
    test_program.assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "nothing reads checkpoint without a draft")


def test_rows_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(LlamaError, match="multiples of data"):
        subject_of(8, mesh=dict(data=8, fsdp=1, tensor=1, dcn_data=1))


def test_two_runs_are_compared_line_by_line(lines, tmp_path):
    file = tmp_path / "before.json"
    slower = dict(lines[0], tokens_per_second=lines[0]["tokens_per_second"] / 2)
    assert slower.pop("cache_dtype") == "auto"  # which older files do not say
    file.write_text(json.dumps(slower) + "\n")
    head, first, second = bench_report.compare(bench_report.read_lines(str(file)), lines).splitlines()
    assert "decode tok/s" in head and "(2.00x)" in first and "(1.00x)" in first
    assert second.split()[:3] == ["3", "not", "in"]


@pytest.mark.parametrize("text", ["nothing", '{"batch": 1}\n', "[1]\n"])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(LlamaError, match=r"other\.json"):
        bench_report.read_lines(str(file))
    with pytest.raises(LlamaError, match=r"absent\.json"):
        bench_report.read_lines(str(tmp_path / "absent.json"))


def test_the_roof_is_the_slower_of_bytes_and_products(lines):
    line = dict(lines[0], floor_seconds=0.01, model_parameters=1e6, batch=1)
    assert bench_report.roof(line) == pytest.approx(100)  # of 10 ms; products take 0.5 ms
    assert bench_report.roof(line | {"batch": 100}) == pytest.approx(2000)  # 2e8 FLOPs at 4e9 a second


def test_the_plot_is_a_picture(lines, tmp_path):
    file = tmp_path / "measure.png"
    bench_report.plot(lines, str(file))
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 5000
