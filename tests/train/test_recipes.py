"""Every config file of training: loaded, run for a few steps, and what a mistake in one is answered with."""

import json
import math
import subprocess

import numpy as np
import pytest

import llama_jax
from configs import bench, bundled, lora, pretrain, qlora, sft, train_bench
from llama_jax.checkpoint.adapter import stored_adapter
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.commands.quantize import quantize
from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model.lora import LoraConfig
from llama_jax.training.optimizer import OptimizerConfig
from tests.train.make import (
    MODEL,
    ROOT,
    command,
    config_of,
    environment,
    lines,
    numbers,
    run,
    write_chats,
    write_texts,
    write_tokenizer,
)
from train.recipe import read_recipe

SHORT = dict(train__steps=6, train__epochs=0.0, train__batch_size=2, train__length=64, save__every=3, eval__every=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_texts(folder / "texts.jsonl")
    write_texts(folder / "held_out.jsonl", 6, seed=1)
    write_chats(folder / "chats.jsonl")
    write_tokenizer(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def pretrained(files, tmp_path_factory):
    """The WORKDIR of a run of configs/pretrain.py."""
    workdir = tmp_path_factory.mktemp("pretrained")
    model = {f"model__{name}": value for name, value in MODEL.items()}
    config = config_of(
        pretrain, **SHORT, **model, tokenizer=str(files / "tokenizer.model"), data__train=str(files / "texts.jsonl"),
        data__eval=str(files / "held_out.jsonl"), data__workers=1, eval__prompts="Once upon", eval__max_new_tokens=4,
        profile="2-3",
    )  # fmt: skip
    run(config, workdir)
    return workdir


def test_a_run_from_nothing_leaves_what_the_readme_says(pretrained):
    assert [line["step"] for line in lines(pretrained)] == [1, 2, 3, 4, 5, 6]
    for line in lines(pretrained):
        assert line["loss"] == pytest.approx(math.log(MODEL["vocab_size"]), abs=1.5)
        assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0
    evals = lines(pretrained, "eval.jsonl")
    assert [line["step"] for line in evals] == [3, 6]
    for line in evals:
        assert line["held_out/perplexity"] == pytest.approx(math.exp(line["held_out/loss"]))
        assert line["samples"][0]["prompt"] == "Once upon"
    assert sorted(path.name for path in (pretrained / "checkpoints").iterdir()) == ["3", "6"]
    assert (pretrained / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((pretrained / "tensorboard").iterdir()) and list((pretrained / "profile").rglob("*.xplane.pb"))
    (start,) = json.loads((pretrained / "run.json").read_text())["starts"]
    assert start["config"]["train"]["batch_size"] == 2 and start["versions"]["jax"] and start["data"]["documents"] == 60


def test_what_a_run_leaves_generates_text_and_scores_as_its_evaluation_did(pretrained, files):
    llama = llama_jax.load(pretrained, dtype="float32")
    assert llama.generate(["Once upon"], max_new_tokens=4)[0].tokens
    total = count = 0.0
    for line in (files / "held_out.jsonl").read_text().splitlines():
        tokens = llama.tokenizer.encode(json.loads(line)["text"], bos=True, eos=True)
        found = llama.score(tokens).logprobs
        total, count = total - float(np.sum(found)), count + len(found)
    assert total / count == pytest.approx(lines(pretrained, "eval.jsonl")[-1]["held_out/loss"], rel=5e-3)  # bfloat16 there


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [sft, lora, qlora], ids=["sft", "lora", "qlora"])
def test_every_fine_tuning_recipe_runs_from_a_checkpoint(recipe, pretrained, files, tmp_path):
    config = config_of(
        recipe, **SHORT, init_from=str(pretrained), data__train=str(files / "chats.jsonl"), data__workers=1,
        data__chat_format="llama2", eval__prompts="Who is 3?", eval__max_new_tokens=4,
    )  # fmt: skip
    run(config, tmp_path)
    found = numbers(tmp_path)
    assert len(found) == 6 and found[-1]["loss"] < found[0]["loss"]
    assert lines(tmp_path, "eval.jsonl")[-1]["samples"][0]["prompt"] == "Who is 3?"
    learnt = sum(line["targets"] for line in found)
    assert 0 < learnt < 6 * 2 * 64 / 4  # the answers are short


@pytest.mark.slow
def test_qlora_over_stored_int8_weights_is_qlora_over_their_floats(pretrained, files, tmp_path):
    """The same losses, and the same adapter; and a run goes on over them."""
    quantize(pretrained, tmp_path / "int8", "int8", dtype="bfloat16")
    common = dict(data__train=str(files / "chats.jsonl"), data__workers=1, data__chat_format="llama2")
    for name, base in (("floats", pretrained), ("stored", tmp_path / "int8")):
        run(config_of(qlora, **SHORT, init_from=str(base), **common), tmp_path / name)
    assert [line["loss"] for line in numbers(tmp_path / "stored")] == [line["loss"] for line in numbers(tmp_path / "floats")]
    found, wanted = (stored_adapter(Checkpoint.open(tmp_path / name)).arrays for name in ("stored", "floats"))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    (tmp_path / "stored/checkpoints/6").rename(tmp_path / "last")
    run(config_of(qlora, **SHORT, init_from=str(tmp_path / "int8"), **common), tmp_path / "stored")
    for name, array in stored_adapter(Checkpoint.open(tmp_path / "stored/checkpoints/6")).arrays.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    llama = llama_jax.load(tmp_path / "stored", dtype="float32")
    assert llama.generate(["Who is 3?"], max_new_tokens=4)[0].tokens


@pytest.mark.parametrize("preset", PRESETS)
def test_the_published_batches_are_of_four_million_tokens(preset):
    config = pretrain.get_config(preset)
    recipe_model, train = PRESETS[preset], config.train
    if preset != "tiny":
        assert dict(config.model) == {**vars(recipe_model)}
        assert train.batch_size * train.length == 4 * 2**20
        assert train.length <= recipe_model.max_length
        assert train.steps > 0
    assert OptimizerConfig(**config.optimizer).b2 == 0.95


def test_llama_2_s_numbers_are_the_paper_s():
    """arXiv:2307.09288, section 2.2 and 3.1."""
    config = pretrain.get_config("llama2_70b")
    assert (config.optimizer.peak_lr, config.train.steps, config.train.length) == (1.5e-4, 476837, 4096)
    assert OptimizerConfig(**config.optimizer) == OptimizerConfig(peak_lr=1.5e-4)
    tuned = sft.get_config()
    assert (tuned.optimizer.peak_lr, tuned.train.epochs, tuned.train.batch_size, tuned.optimizer.schedule) == (
        2e-5, 2.0, 64, "cosine",
    )  # fmt: skip


@pytest.mark.parametrize("module", [pretrain, sft, lora, qlora, train_bench, bench, bundled])
def test_an_unknown_preset_names_the_known_ones(module):
    with pytest.raises(LlamaError, match=r"no preset 'zzz': --config=FILE\.py:PRESET takes one of .*(tiny|sft)") as refused:
        module.get_config("zzz")
    assert refused.value.code == ExitCode.BAD_REQUEST


def test_a_model_s_preset_where_the_model_is_given_is_told_so():
    with pytest.raises(LlamaError, match=r"no preset 'llama2_7b': .* full, tiny; the model is that of init_from"):
        sft.get_config("llama2_7b")


def test_the_lora_group_has_every_field_of_an_adapter():
    assert set(lora.lora()) == {*LoraConfig.__dataclass_fields__, "base_dtype", "quantize"}


def refused(words: str, **settings):
    config = config_of(pretrain, **(dict(data__train="x.jsonl") | settings))
    with pytest.raises(LlamaError, match=words) as caught:
        read_recipe(config)
    assert caught.value.code == ExitCode.BAD_CONFIG


def test_settings_out_of_range_are_refused_by_name():
    refused("there is no data: --config.data.train=FILE", data__train="")
    refused("train.batch_size is 0, expected 1 or more", train__batch_size=0)
    refused("train.steps is 200 and train.epochs is 1.0: one of them", train__epochs=1.0)
    refused("train.scan_layers is 'maybe', expected one of auto, true, false", train__scan_layers="maybe")
    refused("save.keep is 0, expected 1 or more", save__keep=0)
    refused("eval.max_new_tokens is 0", eval__max_new_tokens=0)
    refused("profile is '9-3', expected a step or FIRST-LAST", profile="9-3")
    refused("optimizer 'adam' is unknown", optimizer__name="adam")


def test_a_key_that_nothing_reads_is_refused_with_the_nearest_one():
    config = config_of(pretrain, data__train="x.jsonl")
    with config.unlocked():
        config.optimizer.peak_rate = 1.0
    with pytest.raises(LlamaError, match="peak_rate is a key that nothing reads; the nearest one is optimizer"):
        read_recipe(config)


def test_an_adapter_needs_a_model():
    config = config_of(lora, data__train="x.jsonl", init_from="")
    with pytest.raises(LlamaError, match="there is nothing to start from"):
        read_recipe(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(train__lenght=3), ["lenght", "length"]),
        (dict(data__train="nowhere.jsonl", tokenizer="bundled/checkpoint"), ["nowhere.jsonl"]),
        (dict(data__train="README.md", tokenizer="nowhere"), ["no tokenizer at nowhere"]),
        (
            dict(data__train="README.md", model__vocab_size=320),
            ["2,048 tokens", "--config.model.vocab_size=2048"],
        ),
        (dict(data__train="README.md", tokenizer="bundled/checkpoint", train__length=512), ["512", "context"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(settings, words, tmp_path):
    done = subprocess.run(
        command(tmp_path / "run", **settings), cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode >= 3 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in done.stderr.splitlines()[-1]
