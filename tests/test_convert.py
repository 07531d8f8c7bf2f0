"""The conversion command: the same stored bytes from every format, and nothing half-done whatever goes wrong."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import llama_jax
from llama_jax import convert as command
from llama_jax.checkpoint.huggingface_writer import write_huggingface as write_shards
from llama_jax.checkpoint.layout import META, flat_shape, leaf_of, names, shapes
from llama_jax.checkpoint.save import ARRAY_BYTES, REPLACED, ROOM_BYTES, UNFINISHED
from llama_jax.checkpoint.store import MANIFEST, Checkpoint, to_tree
from llama_jax.commands.convert import convert
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError, run_command
from llama_jax.text.tokenizer import load_tokenizer
from tests.checkpoint.make import (
    CUT,
    LFS_POINTER,
    View,
    as_view,
    huggingface_config,
    meta_config,
    meta_tiny,
    random_params,
    state_dict_pickle,
    write_huggingface,
    write_llama2c,
    write_meta,
)
from tests.checkpoint.test_save import assert_stored, snapshot
from tests.text import make as text

CFG = meta_tiny(num_layers=1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def source(tmp_path) -> Path:
    """A small Hugging Face folder without a tokenizer."""
    write_huggingface(tmp_path / "source", CFG, random_params(CFG))
    return tmp_path / "source"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and the lines of stderr, the progress bar's left out."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*argv) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            run_command(command.main)
        out, err = capsys.readouterr()
        assert out == ""  # stdout is for text
        return stopped.value.code, [line for line in err.splitlines() if line and not line.startswith("\rconverting")]

    yield run
    signal.signal(signal.SIGTERM, handler)


def refused(run, code: ExitCode, match: str, *argv) -> None:
    """The command fails with this code, and one line that says why."""
    with_code, lines = run(*argv)
    errors = [line for line in lines if "error: " in line]
    assert with_code == code and len(errors) == 1 and match in errors[0], lines
    assert lines[-1] == errors[0] and "Traceback" not in "".join(lines)


# --- one checkpoint from every format


def write_source(kind: str, folder: Path, cfg: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """A source of this kind, such as "meta-4-0" (files, axis of the embedding); returns what it holds."""
    params = random_params(cfg, 7, dtype)
    name, *numbers = kind.split("-")
    if name == "meta":
        write_meta(folder, cfg, params, *map(int, numbers))
    elif name == "llama2c":
        return write_llama2c(folder / "model.bin", cfg, params, int(numbers[0]))
    else:
        write_huggingface(folder, cfg, params, int(numbers[0]), suffix=f".{name}")
    return params


META_KINDS = ["meta-1-1", "meta-2-0", "meta-2-1", "meta-4-0", "meta-4-1"]
HF_KINDS = ["safetensors-1", "safetensors-3", "bin-1", "bin-3"]


@pytest.mark.parametrize("kind", [*META_KINDS, *HF_KINDS, "llama2c-0", "llama2c-1", "llama2c-2"])
def test_every_format_gives_the_same_bytes(tmp_path, kind):
    params = write_source(kind, tmp_path / "source", CFG)
    checkpoint = convert(tmp_path / "source", tmp_path / "c", max_length=64)
    assert checkpoint == Checkpoint.open(tmp_path / "c") and checkpoint.config == CFG
    assert_stored(tmp_path / "c", params)


@pytest.mark.parametrize("kind", ["meta-2-1", "safetensors-3", "bin-1", "llama2c-0"])
def test_a_head_equal_to_the_embedding_is_stored_once(tmp_path, kind):
    cfg = meta_tiny(num_layers=1, tied_head=True)
    params = write_source(kind, tmp_path / "source", cfg)
    assert convert(tmp_path / "source", tmp_path / "c", max_length=64).config == cfg
    assert "lm_head" not in params
    assert_stored(tmp_path / "c", params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("kind", ["meta-2-1", "safetensors-1"])
def test_the_dtype_is_kept(tmp_path, kind, dtype):
    params = write_source(kind, tmp_path / "source", CFG, dtype)
    assert convert(tmp_path / "source", tmp_path / "c", max_length=64).dtype == np.dtype(dtype)
    assert_stored(tmp_path / "c", params)


def test_mixed_dtypes_are_widened_and_nothing_is_lost(tmp_path):
    params = random_params(CFG, 0, ml_dtypes.bfloat16)
    params["final_norm"] = (params["final_norm"].astype(np.float32) * 1.001).astype(np.float32)
    write_huggingface(tmp_path / "source", CFG, params)
    convert(tmp_path / "source", tmp_path / "c")
    assert_stored(tmp_path / "c", {name: value.astype(np.float32) for name, value in params.items()})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtype_casts_as_numpy_does(tmp_path, source, run, dtype):
    assert run("--source", source, "--output", tmp_path / "c", "--dtype", dtype)[0] == 0
    assert_stored(tmp_path / "c", {name: value.astype(dtype) for name, value in random_params(CFG).items()})


def test_values_too_large_for_the_dtype_are_refused(tmp_path, run):
    params = random_params(CFG)
    params["layers.0.down_proj"][3, 4] = 1e5
    write_huggingface(tmp_path / "source", CFG, params)
    match = "layers.0.down_proj has values that float16 cannot hold: choose another --dtype"
    refused(run, ExitCode.NOT_FINITE, match, "--source", tmp_path / "source", "--output", tmp_path / "c", "--dtype", "float16")
    assert not (tmp_path / "c").exists()
    assert run("--source", tmp_path / "source", "--output", tmp_path / "c", "--dtype", "bfloat16")[0] == 0


def test_llama_jax_and_stock_orbax_load_it(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.generation.load.keep_compiled_programs", lambda: None)  # no writing to the user's cache
    params = write_source("meta-2-1", tmp_path / "source", CFG, ml_dtypes.bfloat16)
    convert(tmp_path / "source", tmp_path / "c", max_length=64)
    expected = to_tree(params)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "c/params", targets)
    for tree in (restored, llama_jax.load(tmp_path / "c").params):
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(tree), strict=True):
            assert theirs.dtype == ours.dtype and np.asarray(theirs).tobytes() == ours.tobytes()


# --- what checkpoint.json says


def test_the_manifest_says_what_was_converted_and_how(tmp_path, run):
    folder = tmp_path / "llama-2-7b-chat"
    tokenizer = text.small_sentencepiece(tmp_path / "tokenizer.model")
    cfg = meta_tiny(num_layers=1, vocab_size=load_tokenizer(tokenizer).vocab_size)
    write_meta(folder, cfg, random_params(cfg, 0, ml_dtypes.bfloat16), 2)
    argv = ["--source", str(folder), "--output", str(tmp_path / "a b"), "--max-length", "64"]
    assert run(*argv)[0] == 0
    manifest = json.loads((tmp_path / "a b" / MANIFEST).read_text())
    files = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    assert manifest == {
        "format": "llama_jax checkpoint",
        "version": 1,
        "config": {
            "vocab_size": cfg.vocab_size, "embed_dim": 48, "num_layers": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8,
            "mlp_dim": 80, "max_length": 64, "norm_eps": 1e-5, "rope_theta": 1e4, "rope_type": "default", "rope_factor": 1.0,
            "rope_original_length": 0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_beta_fast": 32.0,
            "rope_beta_slow": 1.0, "rope_truncate": True, "rope_attention_factor": 1.0, "tied_head": False,
        },
        "dtype": "bfloat16",
        "chat_format": "llama2",
        "tokenizer": ["tokenizer.model"],
        "source": {
            "kind": "Meta",
            "path": str(folder),
            "files": [
                {
                    "name": name,
                    "bytes": (folder / name).stat().st_size,
                    "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
                }
                for name in files
            ],
        },
        "command": f"python -m llama_jax.convert --source {folder} --output '{tmp_path / 'a b'}' --max-length 64",
    }  # fmt: skip


def test_stderr_says_what_was_found_and_assumed(tmp_path, run):
    write_meta(tmp_path / "source", CFG, random_params(CFG), 2)
    code, lines = run("--source", tmp_path / "source", "--output", tmp_path / "c")
    said = "\n".join(lines)
    assert code == 0
    assert f"Meta weights in {tmp_path / 'source'}: {CFG.num_params:,} parameters" in said
    assert "6 heads (2 key/value), theta 10000, epsilon 1e-05, context 2048" in said
    assert "warning: no published model has this shape" in said and "--max-length N changes it" in said
    assert f"wrote {tmp_path / 'c'}: {CFG.num_params:,} parameters, float32" in said


def test_max_length_overrides_the_source(tmp_path, source, run):
    assert run("--source", source, "--output", tmp_path / "c", "--max-length", 7)[0] == 0
    assert Checkpoint.open(tmp_path / "c").config.max_length == 7
    with pytest.raises(SystemExit) as stopped:
        sys.argv = ["convert", "--source", str(source), "--output", str(tmp_path / "d"), "--max-length", "0"]
        command.main()
    assert stopped.value.code == 2


def test_llama2_with_epsilon_1e_6_is_pointed_out(tmp_path, capsys):
    cfg = meta_tiny(num_layers=1, norm_eps=1e-6)
    write_huggingface(tmp_path / "Llama-2-7b-hf", cfg, random_params(cfg))
    write_huggingface(tmp_path / "other", cfg, random_params(cfg))
    convert(tmp_path / "other", tmp_path / "a")
    assert "1e-6; Llama 2 has 1e-5" not in capsys.readouterr().err
    convert(tmp_path / "Llama-2-7b-hf", tmp_path / "b")
    assert "warning: the source says epsilon 1e-6; Llama 2 has 1e-5" in capsys.readouterr().err


# --- tokenizers


def with_tokenizer(tmp_path: Path, kind: str, rows: int = 0) -> tuple[Path, Path, int]:
    """A source folder with a tokenizer beside the weights; `rows` more in the embedding. Returns it, the file and the size."""
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "tokenizer.bin":
        file = text.small_llama2c(folder / kind, text.small_sentencepiece(tmp_path / "made.model"))
    elif kind == "ranks":
        file = text.small_ranks(folder / "tokenizer.model")
    elif kind == "tokenizer.json":
        file = text.small_tokenizer_json(folder / kind)
    else:
        file = text.small_sentencepiece(folder / "tokenizer.model")
    tokens = load_tokenizer(file).vocab_size
    cfg = meta_tiny(num_layers=1, vocab_size=tokens + rows)
    params = random_params(cfg)
    if kind == "tokenizer.bin":
        write_llama2c(folder / "model.bin", cfg, params)
    elif kind == "tokenizer.json":
        write_huggingface(folder, cfg, params)
    else:
        write_meta(folder, cfg, params)
    return folder, file, tokens


SENTENCE = "The child found the café.\n1234 日"


@pytest.mark.parametrize("kind", ["sentencepiece", "ranks", "tokenizer.json", "tokenizer.bin"])
def test_the_tokenizer_beside_the_weights_comes_along(tmp_path, kind):
    folder, file, _ = with_tokenizer(tmp_path, kind)
    checkpoint = convert(folder, tmp_path / "c", max_length=64)
    copied = load_tokenizer(tmp_path / "c")
    if kind == "tokenizer.bin":  # every program of ours reads the model it was made from
        assert checkpoint.tokenizer == ("tokenizer.model",) and not (tmp_path / "c/tokenizer.bin").exists()
    else:
        assert checkpoint.tokenizer == (file.name,)
        assert (tmp_path / "c" / file.name).read_bytes() == file.read_bytes()
    assert copied.encode(SENTENCE) == load_tokenizer(file).encode(SENTENCE)


def test_the_files_beside_a_tokenizer_come_along(tmp_path):
    folder, _, tokens = with_tokenizer(tmp_path, "tokenizer.json")
    text.write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"})
    text.write_json(folder / "generation_config.json", {"eos_token_id": [tokens - 1]})
    text.write_json(folder / "special_tokens_map.json", {})
    checkpoint = convert(folder, tmp_path / "c")
    wanted = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"}
    assert set(checkpoint.tokenizer) == wanted
    assert all((tmp_path / "c" / name).read_bytes() == (folder / name).read_bytes() for name in wanted)
    assert checkpoint.chat_format == "template" and tokens - 1 in load_tokenizer(tmp_path / "c").stop_ids


def test_tokenizer_named_on_the_command_line_wins(tmp_path, run):
    folder, file, tokens = with_tokenizer(tmp_path, "sentencepiece")
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere/tokenizer.model")
    (folder / "tokenizer.model").write_text("damaged")
    for name, given in (("a", tmp_path / "elsewhere"), ("b", tmp_path / "elsewhere/tokenizer.model")):
        assert run("--source", folder, "--output", tmp_path / name, "--tokenizer", given, "--max-length", 64)[0] == 0
        assert load_tokenizer(tmp_path / name).vocab_size == tokens


@pytest.mark.parametrize("kind", ["sentencepiece", "ranks", "tokenizer.json", "tokenizer.bin"])
def test_a_tokenizer_under_another_name_is_found_again(tmp_path, kind):
    """llama2.c's are tok512.bin, others tok4096.model: the checkpoint must load with what was given."""
    folder, file, tokens = with_tokenizer(tmp_path, kind)
    given = file.rename(tmp_path / f"tok512{file.suffix}")
    convert(folder, tmp_path / "c", max_length=64, tokenizer=given)
    assert load_tokenizer(tmp_path / "c").vocab_size == tokens


def test_without_a_tokenizer_a_warning_is_given(tmp_path, source, run):
    code, lines = run("--source", source, "--output", tmp_path / "c")
    assert code == 0
    assert [line for line in lines if "no tokenizer" in line] == [
        "warning: no tokenizer beside the weights: the checkpoint will have none, and programs will need one "
        "(--tokenizer FILE here, or --config.tokenizer=FILE there)"
    ]
    assert Checkpoint.open(tmp_path / "c").tokenizer == ()
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [MANIFEST, "params"]


def test_a_generation_config_alone_is_no_tokenizer(tmp_path, source, run):
    """transformers' save_pretrained of a model writes generation_config.json and no tokenizer."""
    text.write_json(source / "generation_config.json", {"eos_token_id": 2})
    code, lines = run("--source", source, "--output", tmp_path / "c")
    assert code == 0, lines
    assert any("warning: no tokenizer beside the weights" in line for line in lines)


def test_a_missing_tokenizer_file_is_refused(tmp_path, source, run):
    argv = ["--source", source, "--output", tmp_path / "c", "--tokenizer", tmp_path / "tok.model"]
    refused(run, ExitCode.BAD_TOKENIZER, f"no tokenizer at {tmp_path / 'tok.model'}", *argv)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("kind", "rows"), [("sentencepiece", 1), ("sentencepiece", -1), ("tokenizer.json", -1), ("tokenizer.json", 1024)]
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, run, kind, rows):
    folder, _, tokens = with_tokenizer(tmp_path, kind, rows)
    match = f"has {tokens:,} tokens, the embedding {tokens + rows:,} rows: they belong to different models; --tokenizer FILE"
    refused(run, ExitCode.VOCAB_MISMATCH, match, "--source", folder, "--output", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("rows", [1, 64, 1023])
def test_padding_of_a_hugging_face_embedding_is_accepted_and_said(tmp_path, run, rows):
    folder, _, tokens = with_tokenizer(tmp_path, "tokenizer.json", rows)
    code, lines = run("--source", folder, "--output", tmp_path / "c")
    assert code == 0
    assert f"the embedding has {rows} rows more than the tokenizer has tokens (padding)" in lines
    assert Checkpoint.open(tmp_path / "c").config.vocab_size == tokens + rows


# --- chat formats


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("llama-2-7b-chat", "sentencepiece", "llama2"),
        ("Llama-2-7b-chat-hf", "sentencepiece", "llama2"),
        ("llama-2-7b", "sentencepiece", ""),
        ("CodeLlama-7b-Instruct", "sentencepiece", "codellama"),
        ("CodeLlama-7b", "sentencepiece", ""),
        ("Meta-Llama-3-8B-Instruct", "ranks", "llama3"),
        ("Meta-Llama-3-8B-Instruct/original", "ranks", "llama3"),
        ("Meta-Llama-3-8B", "ranks", ""),
        ("Llama3-imitated-Instruct", "sentencepiece", ""),  # its tokenizer has no <|start_header_id|>
    ],
)
def test_the_folder_name_says_the_chat_format(tmp_path, name, kind, expected):
    folder, _, _ = with_tokenizer(tmp_path, kind)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    folder.rename(tmp_path / name)
    assert convert(tmp_path / name, tmp_path / "c", max_length=64).chat_format == expected


def test_a_relative_path_has_a_name_too(tmp_path, monkeypatch):
    folder, _, _ = with_tokenizer(tmp_path, "sentencepiece")
    monkeypatch.chdir(folder.rename(tmp_path / "llama-2-7b-chat"))
    assert convert(".", "../c", max_length=64).chat_format == "llama2"
    assert Checkpoint.open("../c").source["path"] == str(tmp_path / "llama-2-7b-chat")


@pytest.mark.parametrize(("given", "expected"), [("codellama", "codellama"), ("", "")])
def test_chat_format_on_the_command_line_wins(tmp_path, run, given, expected):
    write_huggingface(tmp_path / "llama-2-7b-chat", CFG, random_params(CFG))
    argv = ["--source", tmp_path / "llama-2-7b-chat", "--output", tmp_path / "c", "--chat-format", given]
    assert run(*argv)[0] == 0
    assert Checkpoint.open(tmp_path / "c").chat_format == expected


def test_an_unknown_chat_format_is_a_wrong_command_line(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", "--source", "x", "--output", "y", "--chat-format", "alpaca"])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    assert stopped.value.code == 2 and "invalid choice: 'alpaca'" in capsys.readouterr().err


# --- weights that are no numbers


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["meta", "huggingface"])
@pytest.mark.parametrize("name", ["embedding", "layers.0.k_proj", "lm_head"])
def test_weights_that_are_not_finite_are_refused(tmp_path, run, value, kind, name):
    params = random_params(CFG, 0, ml_dtypes.bfloat16)
    params[name][(-1,) * params[name].ndim] = value
    (write_meta if kind == "meta" else write_huggingface)(tmp_path / "source", CFG, params)
    argv = ["--source", tmp_path / "source", "--output", tmp_path / "c", "--max-length", 64]
    refused(run, ExitCode.NOT_FINITE, f"{name} has NaN or infinite values: the source is damaged", *argv)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_a_refusal_is_one_line_even_when_found_while_writing(tmp_path):
    """In a process of its own: what Orbax's threads, asyncio and the interpreter's end print is part of what a user sees."""
    params = random_params(CFG)
    params["layers.0.k_proj"][0, 0, 0] = np.nan
    write_huggingface(tmp_path / "source", CFG, params)
    argv = [sys.executable, "-m", "llama_jax.convert", "--source", tmp_path / "source", "--output", tmp_path / "c"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == ExitCode.NOT_FINITE
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("converting")]
    assert len(lines) == 3 and lines[2].startswith("error: layers.0.k_proj has NaN"), done.stderr
    assert not (tmp_path / "c").exists()


# --- an output that exists


def test_an_existing_checkpoint_is_left_alone(tmp_path, source, run):
    convert(source, tmp_path / "c")
    before = snapshot(tmp_path)
    refused(run, ExitCode.OUTPUT_EXISTS, "c holds a checkpoint already", "--source", source, "--output", tmp_path / "c")
    assert snapshot(tmp_path) == before


def test_overwrite_replaces(tmp_path, source, run):
    convert(source, tmp_path / "c")
    write_huggingface(tmp_path / "new", CFG, random_params(CFG, 1))
    assert run("--source", tmp_path / "new", "--output", tmp_path / "c", "--overwrite")[0] == 0
    assert_stored(tmp_path / "c", random_params(CFG, 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "new", "source"]


def test_a_failing_overwrite_leaves_the_old_checkpoint(tmp_path, source, run):
    convert(source, tmp_path / "c")
    before = snapshot(tmp_path / "c")
    params = random_params(CFG, 1)
    params["layers.0.mlp_norm"][0] = np.nan
    write_huggingface(tmp_path / "new", CFG, params)
    argv = ["--source", tmp_path / "new", "--output", tmp_path / "c", "--overwrite"]
    refused(run, ExitCode.NOT_FINITE, "layers.0.mlp_norm has NaN", *argv)
    assert snapshot(tmp_path / "c") == before
    assert_stored(tmp_path / "c", random_params(CFG))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "new", "source"]


def test_a_killed_overwrite_is_taken_up_by_the_next_run(tmp_path, source):
    convert(source, tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / f"c{REPLACED}")
    (tmp_path / "c/params").mkdir(parents=True)
    (tmp_path / "c" / UNFINISHED).write_text("")
    write_huggingface(tmp_path / "new", CFG, random_params(CFG, 1))
    convert(tmp_path / "new", tmp_path / "c", overwrite=True)
    assert_stored(tmp_path / "c", random_params(CFG, 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "new", "source"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_folder_of_the_users_is_left_alone(tmp_path, source, run, options):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("precious")
    argv = ["--source", source, "--output", tmp_path / "thesis", *options]
    refused(run, ExitCode.OUTPUT_EXISTS, "thesis exists and is no checkpoint of ours: give the name of a new", *argv)
    assert snapshot(tmp_path / "thesis") == {"chapter1.tex": b"precious"}


def test_the_source_itself_is_never_the_output(tmp_path, source, run):
    before = snapshot(source)
    refused(run, ExitCode.OUTPUT_EXISTS, "source exists", "--source", source, "--output", source, "--overwrite")
    assert snapshot(source) == before


# --- sources that cannot be used, through the command


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "nothing": (ExitCode.NO_WEIGHTS, lambda folder: shutil.rmtree(folder)),
    "empty": (ExitCode.NO_WEIGHTS, lambda folder: [file.unlink() for file in folder.iterdir()]),
    "truncated": (ExitCode.TRUNCATED, lambda folder: truncate(folder / "model-00002-of-00002.safetensors")),
    "missing shard": (ExitCode.MISSING_SHARD, lambda folder: (folder / "model-00002-of-00002.safetensors").unlink()),
    "pointer": (
        ExitCode.LFS_POINTER,
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(LFS_POINTER),
    ),
    "no config": (ExitCode.BAD_CONFIG, lambda folder: (folder / "config.json").unlink()),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sources_have_their_exit_codes(tmp_path, run, kind):
    write_huggingface(tmp_path / "source", CFG, random_params(CFG), 2)
    code, damage = BROKEN[kind]
    damage(tmp_path / "source")
    exit_code, lines = run("--source", tmp_path / "source", "--output", tmp_path / "c")
    assert exit_code == code and len(lines) == 1 and lines[0].startswith("error: ") and str(tmp_path / "source") in lines[0]
    assert not (tmp_path / "c").exists()


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, source, run, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    argv = ["--source", source, "--output", tmp_path / "c"]
    nbytes = CFG.num_params * 4 + (9 * CFG.num_layers + 3) * ARRAY_BYTES + ROOM_BYTES
    refused(run, ExitCode.DISK_FULL, f"c needs {nbytes:,} bytes and its disk has 1,000 free", *argv)
    assert not (tmp_path / "c").exists()


# --- runs that are stopped

BLOCK_BYTES = 2**24


def write_blocks(file, nbytes: int, block: bytes, offset: int) -> None:
    """Random bytes from one block, begun at another place for each array."""
    block = block[offset % BLOCK_BYTES :] + block[: offset % BLOCK_BYTES]
    for at in range(0, nbytes, BLOCK_BYTES):
        file.write(block[: min(BLOCK_BYTES, nbytes - at)])


def write_large_huggingface(folder: Path, cfg: ModelConfig, files: int) -> None:
    """bfloat16 shards of random finite values, one tensor in memory at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface_config(cfg)))
    block = np.frombuffer(random_block(), ml_dtypes.bfloat16)

    def read(name: str) -> np.ndarray:
        return np.resize(np.roll(block, zlib.crc32(name.encode())), shapes(cfg)[leaf_of(name)])

    write_shards(folder, cfg, block.dtype, read, cfg.num_params * 2 // files)


def write_large_meta(folder: Path, cfg: ModelConfig, shards: int) -> None:
    """The same as torch files of a Llama 3, cut for `shards` ranks."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(meta_config(cfg)))
    cuts = CUT | {"embedding": 0}
    ours = {theirs: leaf_of(name) for name, theirs in names(cfg, META)}
    tensors = {theirs: flat_shape(cfg, leaf) for theirs, leaf in ours.items()}
    block = random_block()
    for rank in range(shards):
        views = {}
        for i, (name, shape) in enumerate(tensors.items()):
            axis = cuts.get(ours[name])
            shape = [n // shards if j == axis else n for j, n in enumerate(shape)]
            storage = np.broadcast_to(np.zeros((), ml_dtypes.bfloat16), int(np.prod(shape)))  # one number in memory
            strides = [int(np.prod(shape[j + 1 :])) for j in range(len(shape))]
            views[name] = (str(i), as_view(View(storage, 0, tuple(shape), tuple(strides))))
        with zipfile.ZipFile(folder / f"consolidated.{rank:02}.pth", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo("consolidated/data.pkl"), state_dict_pickle(views))
            for name, (key, view) in views.items():
                offset = 4096 * (int(key) + (0 if cuts.get(ours[name]) is None else 100 * rank))  # norms are equal
                with archive.open(zipfile.ZipInfo(f"consolidated/data/{key}"), "w", force_zip64=True) as file:
                    write_blocks(file, 2 * view.storage.size, block, offset)


def random_block() -> bytes:
    values = np.random.default_rng(0).normal(0, 0.02, BLOCK_BYTES // 2)
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """250 MB: a second or more to convert."""
    cfg = meta_tiny(vocab_size=32000, embed_dim=1024, num_layers=5, num_heads=8, num_kv_heads=8, head_dim=128, mlp_dim=2816)
    folder = tmp_path_factory.mktemp("large") / "source"
    write_large_huggingface(folder, cfg, 2)
    yield folder
    shutil.rmtree(folder)


def begun(source: Path, output: Path, bytes_written: int, *options: str) -> subprocess.Popen:
    """A conversion in a process of its own that has written this much."""
    argv = [sys.executable, "-m", "llama_jax.convert", "--source", str(source), "--output", str(output), *options]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):  # a file that was renamed while we looked
            if sum(file.stat().st_size for file in output.glob("params*/**/*") if file.is_file()) >= bytes_written:
                return process
        time.sleep(0.005)
    raise AssertionError(f"the conversion was over before it could be stopped: {process.communicate()[1]}")


def test_a_killed_conversion_leaves_no_checkpoint_and_the_next_run_succeeds(tmp_path, large, run):
    process = begun(large, tmp_path / "c", 40_000_000)
    process.kill()
    process.communicate()
    assert not (tmp_path / "c" / MANIFEST).exists() and (tmp_path / "c" / UNFINISHED).exists()
    with pytest.raises(LlamaError, match=r"no complete llama_jax checkpoint .*a conversion that was stopped") as caught:
        llama_jax.load(tmp_path / "c")
    assert caught.value.code == ExitCode.NOT_A_CHECKPOINT
    write_huggingface(tmp_path / "source", CFG, random_params(CFG))
    assert run("--source", tmp_path / "source", "--output", tmp_path / "c")[0] == 0
    assert_stored(tmp_path / "c", random_params(CFG))
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [MANIFEST, "params"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_conversion_asked_to_stop_stops_at_once_and_leaves_what_was_there(tmp_path, large, source, number):
    convert(source, tmp_path / "c")
    before = snapshot(tmp_path / "c")
    process = begun(large, tmp_path / "c", 40_000_000, "--overwrite")
    start = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    seconds = time.monotonic() - start
    assert process.returncode == ExitCode.INTERRUPTED
    assert snapshot(tmp_path / "c") == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "source"]
    assert said.rstrip().endswith("interrupted") and "Traceback" not in said
    assert "wrote" not in said and seconds < 10


# --- memory

LARGE = ModelConfig(
    vocab_size=128256, embed_dim=2048, num_layers=20, num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192,
    max_length=8192, norm_eps=1e-5, rope_theta=5e5,
)  # fmt: skip
MEASURED = """
import sys
import llama_jax.checkpoint.save
from llama_jax.commands.convert import convert

print(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1], flush=True)
convert(sys.argv[1], sys.argv[2], max_length=8192)
"""


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["meta", "huggingface"])
def test_memory_is_two_tensors_and_a_gib_at_most(tmp_path, kind):
    """3.5 GB in several files; what is counted is what cannot be dropped, over what the imports take."""
    nbytes, largest = LARGE.num_params * 2, LARGE.vocab_size * LARGE.embed_dim * 2
    if shutil.disk_usage(tmp_path).free < 2.5 * nbytes:
        pytest.skip(f"needs {2.5 * nbytes / 1e9:.0f} GB of disk at {tmp_path}")
    assert nbytes > 3 * 2**30
    try:
        if kind == "meta":
            write_large_meta(tmp_path / "source", LARGE, 2)
        else:
            write_large_huggingface(tmp_path / "source", LARGE, 3)
        argv = [sys.executable, "-c", MEASURED, str(tmp_path / "source"), str(tmp_path / "c")]
        start = time.monotonic()
        with open(tmp_path / "stderr", "w") as err:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, text=True)
        baseline = int(process.stdout.readline()) * 1024
        peak = baseline
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
        process.stdout.close()
        seconds = time.monotonic() - start
        assert process.returncode == 0, (tmp_path / "stderr").read_text()
        bound = 2 * largest + 2**30
        print(
            f"\n{kind}: {nbytes / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, {seconds:.0f} s with imports; "
            f"baseline {baseline / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, "
            f"difference {(peak - baseline) / 1e6:.0f} MB of {bound / 1e6:.0f} MB allowed"
        )
        assert peak - baseline <= bound
        stored = Checkpoint.open(tmp_path / "c")
        assert stored.config == LARGE and np.isfinite(stored.arrays().read("layers.19.down_proj").astype(np.float32)).all()
    finally:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
