"""quantize stores what load rounds, from whatever load takes; and what it stores is known for what it is by every command."""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import llama_jax
from llama_jax import quantize as command
from llama_jax import verify as verify_command
from llama_jax.checkpoint.adapter import reader
from llama_jax.checkpoint.source import open_source
from llama_jax.checkpoint.store import MANIFEST, Checkpoint
from llama_jax.commands.convert import convert
from llama_jax.commands.export import export
from llama_jax.commands.inspect import describe
from llama_jax.commands.quantize import quantize
from llama_jax.errors import ExitCode, LlamaError, run_command
from llama_jax.generation.load import open_weights
from llama_jax.ops.qarray import METHODS
from tests.checkpoint.make import meta_tiny, random_params, write_huggingface, write_meta
from tests.checkpoint.test_adapter import CFG as ADAPTED
from tests.checkpoint.test_adapter import DORA, LORA, save_lora
from tests.checkpoint.test_quantized import assert_same
from tests.checkpoint.test_save import save, snapshot
from tests.generation.make import CFG as TOKENS
from tests.text.make import small_sentencepiece

CFG = meta_tiny(vocab_size=TOKENS.vocab_size)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", CFG.vocab_size)


@pytest.fixture(scope="module")
def floats(tmp_path_factory, tokenizer_file) -> Path:
    """A chat model that was converted."""
    folder = tmp_path_factory.mktemp("floats")
    write_meta(folder / "llama-2-7b-chat", CFG, random_params(CFG, 0, ml_dtypes.bfloat16), 2)
    shutil.copy(tokenizer_file, folder / "llama-2-7b-chat")
    convert(folder / "llama-2-7b-chat", folder / "c", max_length=64, command="convert")
    return folder / "c"


@pytest.fixture(scope="module")
def int8(floats) -> Path:
    quantize(floats, floats.parent / "int8", "int8", command="quantize --checkpoint c")
    return floats.parent / "int8"


def run(monkeypatch, module, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        run_command(module.main)
    return stopped.value.code


# --- from whatever load takes


@pytest.mark.parametrize("method", METHODS)
def test_the_command_stores_what_load_rounds_with_all_that_belongs_to_it(floats, tmp_path, monkeypatch, capsys, method):
    capsys.readouterr()
    argv = ["--checkpoint", floats, "--output", tmp_path / "q", "--method", method]
    assert run(monkeypatch, command, *argv) == 0
    out, err = capsys.readouterr()
    assert (
        out == "" and "quantising: 100%" in err and f"wrote {tmp_path / 'q'}: {CFG.num_params:,} parameters, {method}, " in err
    )
    source, made = Checkpoint.open(floats), Checkpoint.open(tmp_path / "q")
    assert made.command == f"python -m llama_jax.quantize --checkpoint {floats} --output {tmp_path / 'q'} --method {method}"
    assert made == dataclasses.replace(source, path=made.path, quantize=method, command=made.command)
    assert made.chat_format == "llama2" and len(made.source["files"]) == 3
    assert (tmp_path / "q/tokenizer.model").read_bytes() == (floats / "tokenizer.model").read_bytes()
    stored, rounded = llama_jax.load(tmp_path / "q"), llama_jax.load(floats, quantize=method)
    assert_same(stored.params, rounded.params)
    wanted = rounded.generate(["The child"], max_new_tokens=8, temperature=0)[0]
    assert stored.generate(["The child"], max_new_tokens=8, temperature=0)[0].tokens == wanted.tokens


@pytest.mark.parametrize("write", [write_meta, write_huggingface])
def test_weights_that_were_not_converted_are_stored_with_their_hashes(tmp_path, tokenizer_file, write):
    folder = tmp_path / "llama-2-7b-chat"
    write(folder, CFG, random_params(CFG, 0, np.float16))
    shutil.copy(tokenizer_file, folder)
    made = quantize(folder, tmp_path / "q", "int4")
    assert (made.dtype, made.chat_format, made.tokenizer) == (np.dtype(ml_dtypes.bfloat16), "llama2", ("tokenizer.model",))
    assert made == Checkpoint.open(tmp_path / "q") and made.source["path"] == str(folder)
    for file in made.source["files"]:
        assert file["sha256"] == hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    assert {file["name"] for file in made.source["files"]} == {file.name for file in open_source(folder).files}
    assert_same(llama_jax.load(tmp_path / "q").params, llama_jax.load(folder, quantize="int4").params)


def test_without_a_tokenizer_there_is_a_warning(tmp_path, capsys):
    write_meta(tmp_path / "s", CFG, random_params(CFG))
    assert quantize(tmp_path / "s", tmp_path / "q", "fp8").tokenizer == ()
    assert "warning: no tokenizer beside the weights" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_weights_are_rounded_from_the_dtype_they_are_loaded_in(tmp_path, dtype):
    save(tmp_path / "c", CFG, random_params(CFG, 0, np.float64))
    made = quantize(tmp_path / "c", tmp_path / "q", "int8", dtype=dtype)
    assert made.dtype.name == {"auto": "float32"}.get(dtype, dtype)
    assert_same(llama_jax.load(tmp_path / "q").params, llama_jax.load(tmp_path / "c", dtype=dtype, quantize="int8").params)


@pytest.mark.parametrize(("lora", "how"), [(LORA, "workdir"), (DORA, "step"), (LORA, "adapter"), (DORA, "adapter")])
def test_an_adapter_and_its_base_are_rounded_together(tmp_path, lora, how):
    base = save(tmp_path / "base", ADAPTED, random_params(ADAPTED))
    save_lora(tmp_path / "run/checkpoints/10", base, lora)
    path = {"workdir": tmp_path / "run", "step": tmp_path / "run/checkpoints/10", "adapter": tmp_path / "base"}[how]
    adapter = tmp_path / "run" if how == "adapter" else ""
    made = quantize(path, tmp_path / "q", "int4", adapter=adapter)
    assert made.adapter is None and made.chat_format == "llama2"
    assert_same(llama_jax.load(tmp_path / "q").params, llama_jax.load(path, adapter=adapter, quantize="int4").params)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_text_to_calibrate_with_makes_other_weights_of_the_same_form(floats, tmp_path, monkeypatch, capsys, method):
    (tmp_path / "text").write_text("The child saw a cat. The cat saw the child. " * 20)
    argv = ["--checkpoint", floats, "--output", tmp_path / "q", "--method", method, "--calibrate", tmp_path / "text"]
    assert run(monkeypatch, command, *argv) == 0
    assert f"tokens of {tmp_path / 'text'}, in rows of 64" in capsys.readouterr().err
    found, nearest = (llama_jax.load(path, quantize=method).params for path in (tmp_path / "q", floats))
    assert jax.tree.structure(found) == jax.tree.structure(nearest)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(nearest), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    changed = np.mean(np.asarray(found["lm_head"].value) != np.asarray(nearest["lm_head"].value))
    assert 0.01 < changed < 0.9
    assert f"--calibrate {tmp_path / 'text'}" in Checkpoint.open(tmp_path / "q").command


@pytest.mark.parametrize(
    ("method", "text", "code", "words"),
    [
        ("fp8", b"The child", ExitCode.BAD_REQUEST, "--calibrate is for int8 and int4, and the method is fp8"),
        ("int8", None, ExitCode.NO_DATA, "text cannot be read as text .*No such file"),
        ("int8", b"\xff\xfe", ExitCode.NO_DATA, "text cannot be read as text .*utf-8"),
        ("int8", b"The child", ExitCode.NO_DATA, "text has [0-9]+ tokens, expected at least 32"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(floats, tmp_path, method, text, code, words):
    if text is not None:
        (tmp_path / "text").write_bytes(text)
    with pytest.raises(LlamaError, match=words) as caught:
        quantize(floats, tmp_path / "q", method, calibrate=tmp_path / "text")
    assert caught.value.code == code and not (tmp_path / "q").exists()


def test_a_text_needs_a_tokenizer(tmp_path):
    save(tmp_path / "c", CFG, random_params(CFG))
    (tmp_path / "text").write_text("The child " * 40)
    with pytest.raises(LlamaError, match="c has no tokenizer, and --calibrate needs one") as caught:
        quantize(tmp_path / "c", tmp_path / "q", "int8", calibrate=tmp_path / "text")
    assert caught.value.code == ExitCode.BAD_TOKENIZER


# --- what is loaded, and what of it


@pytest.mark.parametrize("mesh", [{"tensor": 2, "fsdp": 2, "data": 2}, {"tensor": -1}])
def test_it_is_loaded_onto_meshes(floats, int8, mesh):
    assert_same(llama_jax.load(int8, mesh=mesh).params, llama_jax.load(floats, mesh=mesh, quantize="int8").params)


def test_only_its_own_method_or_none_is_taken(int8):
    assert_same(llama_jax.load(int8, quantize="int8").params, llama_jax.load(int8, quantize="").params)
    with pytest.raises(LlamaError, match=r"int8 holds int8 weights, and quantize is 'int4': .*\(quantize --checkpoint c\)"):
        llama_jax.load(int8, quantize="int4")


def test_inspect_says_the_method_and_the_bytes(floats, int8):
    lines = describe(Checkpoint.open(int8)).splitlines()
    weights, channels = 2 * (2 * 48 * 48 + 2 * 16 * 48 + 3 * 80 * 48), 2 * (48 + 16 + 16 + 48 + 80 + 80 + 48)
    size = weights + CFG.vocab_size * 48 + 4 * (channels + CFG.vocab_size) + 2 * (CFG.vocab_size * 48 + 5 * 48)
    assert lines[1] == f"parameters   {CFG.num_params:,}, 0.00 GB ({size:,} bytes)"
    assert lines[2] == "quantised    int8: projections and head; the rest bfloat16"
    assert {"made by      quantize --checkpoint c", "chat format  llama2"} <= set(lines)
    assert describe(Checkpoint.open(floats)).splitlines()[1].endswith(" in bfloat16, 0.00 GB")


def test_export_writes_what_the_weights_stand_for_and_says_so(int8, tmp_path, capsys):
    checkpoint = Checkpoint.open(int8)
    export(checkpoint, tmp_path / "hf")
    assert "note: the int8 weights are written as the floats that they stand for, in bfloat16" in capsys.readouterr().err
    source = open_source(tmp_path / "hf")
    assert source.dtype == np.dtype(ml_dtypes.bfloat16)
    for name, array in source.params.items():
        np.testing.assert_array_equal(array.read(), reader(checkpoint)(name).read().astype(ml_dtypes.bfloat16), err_msg=name)


def test_verify_refuses_it_and_says_what_to_verify(int8, monkeypatch, capsys):
    argv = ["--checkpoint", int8, "--source", int8.parent / "llama-2-7b-chat"]
    assert run(monkeypatch, verify_command, *argv) == ExitCode.BAD_REQUEST
    assert "holds int8 weights, and this needs floats: give the checkpoint that it was made from (quantize" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_over_it_makes_floats_of_both(tmp_path, capsys, scan):
    """As training on it computed: the rounded weights and the adapter; rounding the sum must be asked for."""
    save(tmp_path / "base", ADAPTED, random_params(ADAPTED))
    base = quantize(tmp_path / "base", tmp_path / "int8", "int8")
    save_lora(tmp_path / "lora", base, LORA, scan=scan)
    capsys.readouterr()
    found = llama_jax.load(tmp_path / "lora").params
    assert "note: int8 weights and an adapter become floats together; quantize rounds their sum" in capsys.readouterr().err
    export(base, tmp_path / "rounded")
    wanted = llama_jax.load(tmp_path / "rounded", adapter=tmp_path / "lora").params
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    made = quantize(tmp_path / "lora", tmp_path / "again", "int8")
    assert_same(llama_jax.load(made.path).params, llama_jax.load(tmp_path / "lora", quantize="int8").params)
    for more in ("", tmp_path / "lora"):  # and with another adapter on top
        with pytest.raises(LlamaError, match=r"int8 holds int8 weights, and quantize is 'int4'"):
            llama_jax.load(tmp_path / "lora", adapter=more, quantize="int4")


# --- refused


def test_an_output_that_exists_stays(floats, int8, tmp_path, monkeypatch, capsys):
    quantize(floats, tmp_path / "q", "int8")
    before = snapshot(tmp_path / "q")
    argv = ["--checkpoint", floats, "--output", tmp_path / "q", "--method", "int4"]
    assert run(monkeypatch, command, *argv) == ExitCode.OUTPUT_EXISTS
    assert "holds a checkpoint already: give another --output, or --overwrite" in capsys.readouterr().err
    assert snapshot(tmp_path / "q") == before
    assert run(monkeypatch, command, *argv, "--overwrite") == 0
    assert json.loads((tmp_path / "q" / MANIFEST).read_text())["quantize"] == "int4"
    assert [file.name for file in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("of", ["model", "base"])
def test_what_is_read_is_not_written_over(tmp_path, of):
    base = save(tmp_path / "base", ADAPTED, random_params(ADAPTED))
    save_lora(tmp_path / "lora", base, LORA)
    before = snapshot(tmp_path)
    with pytest.raises(LlamaError, match="base is what would be read: give another --output") as caught:
        quantize(tmp_path / ("base" if of == "model" else "lora"), tmp_path / "lora/../base", "int8", overwrite=True)
    assert caught.value.code == ExitCode.OUTPUT_EXISTS and snapshot(tmp_path) == before


@pytest.mark.parametrize(("method", "words"), [("int8", "holds int8 weights already"), ("int4", "rounding twice loses more")])
def test_what_is_rounded_is_not_rounded_again(int8, tmp_path, method, words):
    with pytest.raises(LlamaError, match=words) as caught:
        quantize(int8, tmp_path / "q", method)
    assert caught.value.code == ExitCode.BAD_REQUEST and not (tmp_path / "q").exists()


def test_a_run_that_fails_leaves_nothing(tmp_path):
    params = random_params(CFG)
    params["lm_head"][0, 0] = np.nan
    save(tmp_path / "c", CFG, params)
    with pytest.raises(LlamaError, match="lm_head has NaN or infinite values in float32") as caught:
        quantize(tmp_path / "c", tmp_path / "q", "int8")
    assert caught.value.code == ExitCode.NOT_FINITE
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_an_unknown_method_is_refused_by_name(floats, tmp_path):
    with pytest.raises(LlamaError, match="method is 'int3', expected one of int8, w8a8, int4, fp8"):
        quantize(floats, tmp_path / "q", "int3")
    with pytest.raises(LlamaError, match="dtype is 'int8', expected auto or one of bfloat16, float16, float32"):
        quantize(floats, tmp_path / "q", "int8", dtype="int8")
    assert not (tmp_path / "q").exists() and open_weights(floats).quantize == ""
