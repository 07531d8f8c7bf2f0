"""What export writes is what Hugging Face reads: the same bytes, an equal config, the tokenizer; or nothing at all."""

import dataclasses
import itertools
import json
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llama_jax import export as command
from llama_jax.checkpoint.huggingface_writer import write_safetensors
from llama_jax.checkpoint.layout import HUGGING_FACE
from llama_jax.checkpoint.source import open_source
from llama_jax.checkpoint.store import Checkpoint, to_tree
from llama_jax.commands.convert import convert
from llama_jax.commands.export import export
from llama_jax.config import PRESETS
from llama_jax.config_files import from_huggingface, to_huggingface
from llama_jax.errors import ExitCode, LlamaError, run_command
from llama_jax.model import forward
from llama_jax.text.tokenizer import load_tokenizer
from tests.checkpoint.make import meta_tiny, random_params, to_flat, write_meta
from tests.checkpoint.test_save import assert_stored, save, snapshot
from tests.text import make as text

CFG = meta_tiny(num_layers=2)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def header(path) -> dict:
    """The header of a safetensors file; it ends at a multiple of 64 bytes, so that tensors are aligned."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert (8 + length) % 64 == 0
    parsed = json.loads(data[8 : 8 + length])
    ends = [entry["data_offsets"] for name, entry in parsed.items() if name != "__metadata__"]
    assert sorted(ends)[0][0] == 0 and sorted(ends)[-1][1] == len(data) - 8 - length
    return parsed


def load(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the safetensors package."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = safetensors.numpy.load_file(file)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


# --- weights


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000, 1])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_meta_to_ours_to_hugging_face_to_ours_is_the_same_bytes(tmp_path, shard_bytes, dtype):
    params = random_params(CFG, 1, dtype)
    write_meta(tmp_path / "meta", CFG, params, 2)
    first = convert(tmp_path / "meta", tmp_path / "a", max_length=64)
    export(first, tmp_path / "hf", shard_bytes)
    second = convert(tmp_path / "hf", tmp_path / "b")
    assert (second.config, second.dtype) == (first.config, first.dtype)
    assert_stored(tmp_path / "a", params)
    assert_stored(tmp_path / "b", params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_safetensors_package_reads_it(tmp_path, dtype, tied):
    cfg = dataclasses.replace(CFG, tied_head=tied)
    params = random_params(cfg, 2, dtype)
    export(save(tmp_path / "c", cfg, params), tmp_path / "hf")
    expected = to_flat(cfg, params, HUGGING_FACE, interleave=False)
    found = load(tmp_path / "hf")
    assert found.keys() == expected.keys() and ("lm_head.weight" in found) != tied
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        assert found[name].tobytes() == value.tobytes(), name
    assert header(tmp_path / "hf/model.safetensors")["__metadata__"] == {"format": "pt"}


def test_files_are_no_larger_than_asked_and_the_index_names_them_all(tmp_path):
    params = random_params(CFG)
    export(save(tmp_path / "c", CFG, params), tmp_path / "hf", 30_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in header(file) if name != "__metadata__"}
    assert index["weight_map"] == held and held.keys() == to_flat(CFG, params, HUGGING_FACE, interleave=False).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in params.values())
    sizes = [sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in list(header(f).values())[1:]) for f in files]
    assert max(sizes) <= 30_000 and len(files) > 4
    assert min(a + b for a, b in itertools.pairwise(sizes)) > 15_000  # no file is nearly empty


def test_a_tensor_larger_than_a_file_may_be_has_its_own(tmp_path):
    export(save(tmp_path / "c", CFG, random_params(CFG)), tmp_path / "hf", 1)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 2 * 9 + 3


def test_one_file_has_no_index(tmp_path):
    export(save(tmp_path / "c", CFG, random_params(CFG)), tmp_path / "hf")
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_headers_of_every_length_are_padded(tmp_path):
    for n in range(1, 10):
        write_safetensors(tmp_path / "f", np.dtype(np.float16), {"x" * n: (3,)}, lambda name: np.arange(3, dtype=np.float16))
        header(tmp_path / "f")
        assert safetensors.numpy.load_file(tmp_path / "f")["x" * n].tolist() == [0, 1, 2]


# --- config


ROPES = {
    "linear": dict(rope_type="linear", rope_factor=2.5),
    "dynamic": dict(rope_type="dynamic", rope_factor=4.0, rope_original_length=16),
    "yarn": dict(rope_type="yarn", rope_factor=4.0, rope_original_length=16, rope_attention_factor=1.5, rope_truncate=False),
    "llama3": dict(rope_type="llama3", rope_factor=8.0, rope_original_length=8192, rope_high_freq_factor=5.0),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reads_its_exported_config_back(preset):
    assert from_huggingface(json.loads(json.dumps(to_huggingface(PRESETS[preset])))) == (PRESETS[preset], [])


@pytest.mark.parametrize("rope", ["default", *ROPES])
@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_folder_opens_as_an_equal_model(tmp_path, rope, tied):
    cfg = meta_tiny(num_layers=1, head_dim=10, norm_eps=3e-6, rope_theta=5e5, tied_head=tied, **ROPES.get(rope, {}))
    export(save(tmp_path / "c", cfg, random_params(cfg, 0, ml_dtypes.bfloat16)), tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    assert (source.config, source.notes) == (cfg, ())
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]


# --- tokenizer and generation


def with_tokenizer(tmp_path, kind: str, chat_format: str = "", beside: dict | None = None) -> Checkpoint:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if kind == "ranks":
        file = text.small_ranks(folder / "tokenizer.model")
    elif kind == "tokenizer.json":
        file = text.small_tokenizer_json(folder / kind)
    else:
        file = text.small_sentencepiece(folder / "tokenizer.model")
    files = [file, *(text.write_json(folder / name, value) for name, value in (beside or {}).items())]
    cfg = meta_tiny(num_layers=1, vocab_size=load_tokenizer(file).vocab_size)
    return save(tmp_path / "c", cfg, random_params(cfg), tokenizer_files=files, chat_format=chat_format)


@pytest.mark.parametrize("kind", ["sentencepiece", "ranks", "tokenizer.json"])
def test_the_tokenizer_goes_out_and_comes_back(tmp_path, kind):
    checkpoint = with_tokenizer(tmp_path, kind)
    export(checkpoint, tmp_path / "hf")
    before, after = load_tokenizer(tmp_path / "c"), load_tokenizer(tmp_path / "hf")
    sentence = "The child said hello to  the café.\n\n1234"
    assert after.encode(sentence, bos=True) == before.encode(sentence, bos=True)
    assert (after.vocab_size, after.bos_id, after.eos_id) == (before.vocab_size, before.bos_id, before.eos_id)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (before.bos_id, before.eos_id)
    assert (tmp_path / "hf/tokenizer.json").exists()
    again = convert(tmp_path / "hf", tmp_path / "again")
    assert again.config == checkpoint.config and load_tokenizer(tmp_path / "again").encode(sentence) == before.encode(sentence)


def generation(tmp_path) -> dict:
    return json.loads((tmp_path / "hf/generation_config.json").read_text())


def test_a_chat_model_exports_its_stops_and_metas_sampling(tmp_path):
    checkpoint = with_tokenizer(tmp_path, "ranks", "llama3")
    export(checkpoint, tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "c")
    stops = [tokenizer.token_id(name) for name in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")]
    found = generation(tmp_path)
    assert None not in stops and set(stops) <= set(found["eos_token_id"]) and found["eos_token_id"][0] == stops[0]
    assert found["bos_token_id"] == tokenizer.bos_id
    assert (found["do_sample"], found["temperature"], found["top_p"]) == (True, 0.6, 0.9)
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|eot_id|>" and "<|start_header_id|>" in settings["chat_template"]


def test_a_base_model_exports_one_stop_and_no_sampling(tmp_path):
    export(with_tokenizer(tmp_path, "sentencepiece"), tmp_path / "hf")
    assert generation(tmp_path) == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}


def test_the_sources_own_generation_config_is_kept(tmp_path):
    own = {"eos_token_id": [2, 7], "temperature": 0.3, "do_sample": True}
    export(with_tokenizer(tmp_path, "sentencepiece", "llama2", {"generation_config.json": own}), tmp_path / "hf")
    assert generation(tmp_path) == own


def test_without_a_tokenizer_weights_and_config_go_out(tmp_path):
    export(save(tmp_path / "c", CFG, random_params(CFG)), tmp_path / "hf")
    assert generation(tmp_path) == {"_from_model_config": True}
    assert "bos_token_id" not in json.loads((tmp_path / "hf/config.json").read_text())
    assert_stored(convert(tmp_path / "hf", tmp_path / "again").path, random_params(CFG))


# --- the output


def run(monkeypatch, capsys, *argv) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    out, err = capsys.readouterr()
    assert out == ""
    return stopped.value.code, err


def test_the_command_writes_and_says_where(tmp_path, monkeypatch, capsys):
    save(tmp_path / "c", CFG, random_params(CFG))
    code, err = run(monkeypatch, capsys, "--checkpoint", tmp_path / "c", "--output", tmp_path / "a/b/hf")
    assert code == 0 and err.splitlines()[-1] == f"wrote {tmp_path / 'a/b/hf'}"
    assert load(tmp_path / "a/b/hf")


def test_relative_paths_and_an_empty_directory_work(tmp_path, monkeypatch):
    save(tmp_path / "c", CFG, random_params(CFG))
    (tmp_path / "hf").mkdir()
    monkeypatch.chdir(tmp_path)
    export(Checkpoint.open("c"), "hf")
    assert load(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_left_alone(tmp_path, monkeypatch, capsys, kind):
    save(tmp_path / "c", CFG, random_params(CFG))
    if kind == "folder":
        (tmp_path / "hf").mkdir()
    (tmp_path / "hf/model.safetensors" if kind == "folder" else tmp_path / "hf").write_bytes(b"precious")
    before = snapshot(tmp_path)
    code, err = run(monkeypatch, capsys, "--checkpoint", tmp_path / "c", "--output", tmp_path / "hf")
    assert code == ExitCode.OUTPUT_EXISTS and err.count("\n") == 1
    assert err.startswith(f"error: {tmp_path / 'hf'} exists and is not empty: give the name of a new or empty directory")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, error):
    checkpoint = save(tmp_path / "c", CFG, random_params(CFG))

    def fail(*_):
        raise error

    monkeypatch.setattr("llama_jax.commands.export._write_generation_config", fail)
    with pytest.raises(type(error)):
        export(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_leaves_nothing(tmp_path):
    checkpoint = save(tmp_path / "c", CFG, random_params(CFG))
    wrong = dataclasses.replace(checkpoint, config=dataclasses.replace(CFG, num_layers=3))
    with pytest.raises(LlamaError, match=r"no readable array 'layers.2"):
        export(wrong, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    code, err = run(monkeypatch, capsys, "--checkpoint", tmp_path, "--output", tmp_path / "hf")
    assert code == ExitCode.NOT_A_CHECKPOINT and err.count("\n") == 1


# --- transformers itself


@pytest.mark.parametrize("rope", ["default", *ROPES])
def test_transformers_computes_the_same_logits(tmp_path, rope):
    torch = pytest.importorskip("torch", reason="torch is not installed; done by hand with transformers 5.23, torch 2.13")
    transformers = pytest.importorskip("transformers")
    cfg = meta_tiny(tied_head=rope == "linear", **ROPES.get(rope, {}))
    params = random_params(cfg, 5)
    export(save(tmp_path / "c", cfg, params), tmp_path / "hf", 30_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours = forward(cfg, to_tree(params), tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
