"""inspect prints what a checkpoint is, and refuses what is none."""

import hashlib
import sys

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from llama_jax import inspect as command
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.commands.convert import convert
from llama_jax.commands.inspect import describe
from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, run_command
from llama_jax.text.tokenizer import load_tokenizer
from tests.checkpoint.make import meta_tiny, random_params, write_meta
from tests.text.make import small_sentencepiece


def run(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    return stopped.value.code


def test_it_lists_parameters_dtype_source_and_hashes(tmp_path, monkeypatch, capsys):
    tokens = load_tokenizer(small_sentencepiece(tmp_path / "tokenizer.model")).vocab_size
    cfg = meta_tiny(num_layers=1, vocab_size=tokens)
    folder = tmp_path / "llama-2-7b-chat"
    write_meta(folder, cfg, random_params(cfg, 0, ml_dtypes.bfloat16), 2)
    convert(folder, tmp_path / "c", max_length=64, command="python -m llama_jax.convert --source ...")
    capsys.readouterr()
    assert run(monkeypatch, "--checkpoint", tmp_path / "c") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == f"checkpoint   {tmp_path / 'c'}"
    assert lines[1] == f"parameters   {cfg.num_params:,} in bfloat16, 0.00 GB"
    assert lines[2:5] == ["published as -", "chat format  llama2", "tokenizer    tokenizer.model"]
    assert lines[5] == f"source       Meta {folder}"
    for line, name in zip(lines[6:9], ("consolidated.00.pth", "consolidated.01.pth", "params.json"), strict=True):
        data = (folder / name).read_bytes()
        assert line == f"  {name}  {len(data):,} bytes  sha256 {hashlib.sha256(data).hexdigest()}"
    assert lines[9] == "made by      python -m llama_jax.convert --source ..."
    assert {"  vocab_size              " + str(tokens), "  num_kv_heads            2"} <= set(lines)


@pytest.mark.parametrize("preset", ["llama2_7b", "llama3_2_1b"])
def test_it_names_the_published_model_and_does_without_source_and_tokenizer(preset):
    checkpoint = Checkpoint(epath.Path("x"), PRESETS[preset], np.dtype(ml_dtypes.bfloat16), "", (), {}, "save")
    lines = describe(checkpoint).splitlines()
    size = {"llama2_7b": "6,738,415,616 in bfloat16, 13.48 GB", "llama3_2_1b": "1,235,814,400 in bfloat16, 2.47 GB"}[preset]
    assert lines[1:4] == [f"parameters   {size}", f"published as {preset}", "chat format  - (a base model)"]
    assert lines[4:7] == ["tokenizer    -", "source       -", "made by      save"]


def test_what_is_no_checkpoint_is_refused_on_one_line(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--checkpoint", tmp_path) == ExitCode.NOT_A_CHECKPOINT
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "holds no complete llama_jax checkpoint" in err
