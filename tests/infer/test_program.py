"""What all programs do with their command line. Each run is a process of its own; none of these gets as far as JAX."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import chat, sample, score
from infer import program
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.request import Settings
from llama_jax.mesh import MeshShape

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str, config: bool = True) -> subprocess.CompletedProcess:
    flags = [f"--config=configs/{name}.py"] if config else []
    command = [sys.executable, "-m", f"infer.{name}", *flags, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def assert_one_line_on_stderr(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("name", ["sample", "chat", "score"])
def test_an_unknown_key_names_the_nearest_known_one(name):
    done = run(name, "--config.max_lenght=10")
    assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "max_lenght", "max_length")


def test_an_unknown_key_that_is_near_no_other_is_one():
    assert_one_line_on_stderr(run("sample", "--config.sampling.zzz=1"), ExitCode.BAD_REQUEST, "error: unknown key zzz (")


@pytest.mark.parametrize("name", ["sample", "chat", "score"])
def test_a_checkpoint_that_is_not_there_is_named(name, tmp_path):
    more = ["--tokens=x.npy"] if name == "score" else []
    if more:
        import numpy as np

        np.save(tmp_path / "x.npy", np.ones((1, 4), np.int32))
        more = [f"--tokens={tmp_path / 'x.npy'}"]
    done = run(name, f"--config.checkpoint={tmp_path / 'nowhere'}", *more)
    assert_one_line_on_stderr(done, ExitCode.NOT_A_CHECKPOINT, str(tmp_path / "nowhere"))


def test_words_without_a_flag_are_refused():
    assert_one_line_on_stderr(run("sample", "Once upon a time"), ExitCode.BAD_REQUEST, "Once upon a time", "--prompt")


def test_an_unknown_flag_is_refused():
    assert_one_line_on_stderr(run("sample", "--promt=x"), ExitCode.BAD_REQUEST, "promt")


def test_a_value_of_the_wrong_kind_is_refused():
    done = run("sample", "--config.sampling.top_k=many")
    assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "many")


def test_a_setting_out_of_range_is_refused_before_the_model_is_read():
    done = run("sample", "--config.sampling.temperature=-1", "--config.checkpoint=/nowhere")
    assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "temperature is -1")


def test_a_program_without_a_config_says_what_it_needs():
    done = run("sample", config=False)
    assert done.returncode == ExitCode.BAD_REQUEST and "--config" in done.stderr and "Traceback" not in done.stderr


def test_a_config_file_that_is_not_there_is_named():
    done = run("sample", "--config=configs/nowhere.py", config=False)
    assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "configs/nowhere.py")


@pytest.mark.parametrize(("preset", "near"), [("tinylama_1b", "did you mean tinyllama_1b? "), ("zzz", "")])
def test_an_unknown_preset_is_one_line_with_the_nearest_and_all_others(preset, near):
    done = run("bench", f"--config=configs/bench.py:{preset}", config=False)
    said = f"no preset '{preset}': {near}--config=FILE.py:PRESET takes one of llama1_7b, "
    assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, said)
    assert "Traceback" not in done.stderr


def test_a_preset_of_a_file_without_presets_is_one_line():
    done = run("sample", "--config=configs/sample.py:foo", config=False)
    assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "--config=configs/sample.py:foo: this file has no presets")
    assert "Traceback" not in done.stderr


def test_the_configs_hold_every_setting_and_its_default():
    known = {name for name in Settings.__dataclass_fields__ if name != "max_new_tokens"}
    assert set(sample.get_config().sampling) == known
    assert program.settings(sample.get_config()) == Settings(echo=True)
    assert set(chat.get_config().sampling) == known - {"n", "echo"}
    assert program.settings(chat.get_config()) == Settings(max_new_tokens=512)
    weights = {"checkpoint", "adapter", "tokenizer", "dtype", "quantize", "cache_dtype", "mesh"}
    assert set(score.get_config()) == weights | {"max_length", "window", "stride"}
    for module in (sample, chat, score):
        config = module.get_config()
        assert MeshShape(**config.mesh) == MeshShape(tensor=-1) and (config.quantize, config.cache_dtype) == ("", "auto")


@pytest.mark.parametrize(("text", "bias"), [("", {}), ("5:1.5", {5: 1.5}), ("5:-100, 7:2,", {5: -100.0, 7: 2.0})])
def test_a_bias_is_written_as_pairs(text, bias):
    config = sample.get_config()
    config.sampling.logit_bias = text
    assert program.settings(config).logit_bias == bias


@pytest.mark.parametrize("text", ["5", "a:1", "5:b", "5:1:2"])
def test_a_bias_that_is_no_pairs_is_refused(text):
    config = sample.get_config()
    config.sampling.logit_bias = text
    with pytest.raises(LlamaError, match="expected ID:BIAS,ID:BIAS"):
        program.settings(config)


def test_a_program_without_a_checkpoint_says_so():
    config = chat.get_config()
    config.checkpoint = ""
    with pytest.raises(LlamaError, match=r"no checkpoint: --config\.checkpoint=DIR"):
        program.load(config)
