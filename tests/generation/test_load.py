"""From a directory to a model: dtypes, contexts, tokenizers, the newest step of a training run."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

import llama_jax
from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.save import Leaf, save_checkpoint
from llama_jax.checkpoint.store import DTYPES, Checkpoint, to_tree
from llama_jax.commands.export import export
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.load import CACHE_DIR
from llama_jax.ops.qarray import METHODS
from tests.checkpoint.make import meta_tiny, random_params, write_huggingface, write_meta
from tests.generation.make import CFG, tokenizer_of
from tests.text.make import small_sentencepiece

CONFIG = meta_tiny(vocab_size=CFG.vocab_size)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", CFG.vocab_size)


def save(path, dtype="float32", config=CONFIG, seed=0, **options) -> dict[str, np.ndarray]:
    """Writes a checkpoint of random weights, which are returned."""
    params = random_params(config, seed, DTYPES[dtype])
    files = options.pop("tokenizer_files", ())
    checkpoint = Checkpoint(
        path=epath.Path(path), config=config, dtype=DTYPES[dtype], tokenizer=tuple(file.name for file in files),
        **dict(chat_format="", source={"kind": "test"}, command="pytest") | options,
    )  # fmt: skip
    leaves = {name: Leaf(value.shape, value.dtype, lambda value=value: value) for name, value in params.items()}
    save_checkpoint(checkpoint, leaves, tokenizer_files=files)
    return params


def assert_same_bytes(tree, params: dict[str, np.ndarray]) -> None:
    expected = to_tree(params)
    assert jax.tree.structure(jax.tree.map(np.asarray, tree)) == jax.tree.structure(expected)
    for found, value in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert found.dtype == value.dtype
        assert np.asarray(found).tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_saved_is_loaded_byte_for_byte(tmp_path, dtype):
    params = save(tmp_path / "model", dtype)
    opened = Checkpoint.open(tmp_path / "model")
    assert (opened.config, opened.dtype.name) == (CONFIG, dtype)
    assert_same_bytes(load_params(opened, DTYPES[dtype]), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_orbax_itself_restores_what_is_saved(tmp_path, dtype):
    params = save(tmp_path / "model", dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_bytes(checkpointer.restore((tmp_path / "model" / "params").absolute()), params)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read from Linux's /proc")
def test_weights_of_an_export_stay_in_its_file(tmp_path):
    """On a CPU: they are not copied."""
    params = save(tmp_path / "model")
    export(Checkpoint.open(tmp_path / "model"), tmp_path / "out")
    llama = llama_jax.load(tmp_path / "out")
    assert_same_bytes(llama.params, params)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith("out/model.safetensors")]
    for leaf in jax.tree.leaves(llama.params):
        assert any(int(first, 16) <= leaf.unsafe_buffer_pointer() < int(last, 16) for first, last in ranges)


def test_a_tied_head_stays_tied(tmp_path):
    config = dataclasses.replace(CONFIG, tied_head=True)
    params = save(tmp_path / "model", config=config)
    assert "lm_head" not in params and "lm_head" not in llama_jax.load(tmp_path / "model").params


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        ("float16", "auto", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float32"),
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_weights_have_the_dtype_asked_for(tmp_path, stored, asked, loaded):
    params = save(tmp_path / "model", stored)
    llama = llama_jax.load(tmp_path / "model", dtype=asked)
    assert_same_bytes(llama.params, {name: value.astype(DTYPES[loaded]) for name, value in params.items()})
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(llama.params))


def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, tokenizer_file, capsys):
    save(tmp_path / "model", chat_format="llama2", tokenizer_files=[tokenizer_file])
    llama = llama_jax.load(str(tmp_path / "model"), batch_size=3)
    assert (llama.config, llama.chat_format, llama.max_length, llama.batch_size) == (CONFIG, "llama2", CONFIG.max_length, 3)
    assert llama.tokenizer.encode("The child") == tokenizer_of().encode("The child")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("write", [write_meta, write_huggingface])
@pytest.mark.parametrize("mesh", [None, {"tensor": 2, "fsdp": 2, "data": 2}], ids=["one device", "2x2x2"])
def test_weights_that_were_not_converted_are_loaded_as_they_are(tmp_path, tokenizer_file, write, mesh):
    params, folder = random_params(CONFIG), tmp_path / "llama-2-7b-chat"
    folder.mkdir()
    write(folder, CONFIG, params)
    shutil.copy(tokenizer_file, folder)
    llama = llama_jax.load(folder, mesh=mesh)
    assert_same_bytes(llama.params, params)
    assert dataclasses.replace(llama.config, max_length=CONFIG.max_length) == CONFIG  # Meta's files do not say it
    assert llama.chat_format == "llama2"
    assert llama.generate(["The child"], max_new_tokens=3)[0].tokens


def test_a_folder_that_holds_neither_is_told_what_to_do(tmp_path):
    with pytest.raises(LlamaError, match=r"holds no complete llama_jax checkpoint.*run python -m llama_jax.convert") as error:
        llama_jax.load(tmp_path)
    assert error.value.code == ExitCode.NOT_A_CHECKPOINT


def test_a_checkpoint_without_a_tokenizer_takes_one(tmp_path, tokenizer_file):
    save(tmp_path / "model")
    assert llama_jax.load(tmp_path / "model").tokenizer is None
    for given in (tokenizer_file, str(tokenizer_file.parent)):
        assert llama_jax.load(tmp_path / "model", tokenizer=given).tokenizer.vocab_size == CFG.vocab_size


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, tokenizer_file):
    save(tmp_path / "model", config=meta_tiny())
    with pytest.raises(LlamaError, match="the tokenizer has 420 tokens, the model 40") as error:
        llama_jax.load(tmp_path / "model", tokenizer=tokenizer_file)
    assert error.value.code == ExitCode.VOCAB_MISMATCH


def test_max_length_is_the_context_of_generation(tmp_path, capsys):
    save(tmp_path / "model")
    llama = llama_jax.load(tmp_path / "model", max_length=20)
    assert llama.max_length == llama.engine.max_length == 20
    assert capsys.readouterr().err == ""
    with pytest.raises(LlamaError, match="max_length is 20"):
        llama.generate([[5]], max_new_tokens=20)


def test_a_max_length_beyond_the_models_warns_with_both_numbers(tmp_path, capsys):
    save(tmp_path / "model")
    assert llama_jax.load(tmp_path / "model", max_length=1000).max_length == 1000
    assert "warning: max_length 1,000 is beyond the 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("dtype", ""), ("max_length", -1), ("max_length", 2**20 + 1)])
def test_options_out_of_range_are_refused(tmp_path, option, value):
    save(tmp_path / "model")
    with pytest.raises(LlamaError, match=f"{option} is {value!r}, expected") as error:
        llama_jax.load(tmp_path / "model", **{option: value})
    assert error.value.code == ExitCode.BAD_REQUEST


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_at_least_one_row(tmp_path, batch_size):
    save(tmp_path / "model")
    with pytest.raises(LlamaError, match=f"batch_size is {batch_size}") as error:
        llama_jax.load(tmp_path / "model", batch_size=batch_size)
    assert error.value.code == ExitCode.BAD_REQUEST


def test_nothing_there_is_said_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints" / "100" / "params").mkdir(parents=True)
    for path, said in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no complete"),
        (tmp_path / "run", "no complete"),
    ):
        with pytest.raises(LlamaError, match=said) as error:
            llama_jax.load(path)
        assert error.value.code == ExitCode.NOT_A_CHECKPOINT
        assert str(path) in str(error.value)


def test_of_a_training_run_the_newest_complete_step_is_taken(tmp_path):
    saved = {step: save(tmp_path / "checkpoints" / str(step), seed=step) for step in (9, 100)}
    shutil.copytree(tmp_path / "checkpoints" / "9", tmp_path / "checkpoints" / "200")
    (tmp_path / "checkpoints" / "200" / "checkpoint.json").unlink()  # begun, not finished
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert_same_bytes(llama_jax.load(tmp_path).params, saved[100])
    assert_same_bytes(llama_jax.load(tmp_path / "checkpoints" / "9").params, saved[9])


def test_a_damaged_array_is_named(tmp_path):
    save(tmp_path / "model")
    for file in (tmp_path / "model" / "params").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(LlamaError, match="convert the source again") as error:
        llama_jax.load(tmp_path / "model")
    assert error.value.code == ExitCode.TRUNCATED


def test_compiled_programs_are_kept_unless_the_user_decided(tmp_path, monkeypatch):
    save(tmp_path / "model")
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        llama_jax.load(tmp_path / "model")
        assert jax.config.jax_compilation_cache_dir is None  # turned off in conftest.py
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        llama_jax.load(tmp_path / "model")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        jax.config.update("jax_compilation_cache_dir", None)
        llama_jax.load(tmp_path / "model")
        assert jax.config.jax_compilation_cache_dir == CACHE_DIR.replace("~", str(tmp_path / "home"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_rounded_by_every_method_wherever_they_lie(method, tmp_path, capsys):
    save(tmp_path / "model")
    alone = llama_jax.load(tmp_path / "model", quantize=method)
    spread = llama_jax.load(tmp_path / "model", quantize=method, mesh={"data": 8})
    assert type(alone.params["layers"][0]["q_proj"]) is type(spread.params["layers"][0]["q_proj"])
    assert alone.params["layers"][0]["q_proj"].value.dtype == METHODS[method][0]
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
    np.testing.assert_allclose(alone.logits([[1, 2, 3]]), spread.logits([[1, 2, 3]]), rtol=0, atol=1e-4)
    assert ("w8a8 is what it multiplies fast" in capsys.readouterr().err) == (method != "w8a8")


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path):
    save(tmp_path / "model")
    with pytest.raises(LlamaError, match="quantize is 'int3', expected int8, w8a8, int4, fp8, or None") as error:
        llama_jax.load(tmp_path / "model", quantize="int3")
    assert error.value.code == ExitCode.BAD_REQUEST


def test_keys_and_values_are_rounded_where_that_is_asked_for(tmp_path):
    save(tmp_path / "model")
    rounded, exact = llama_jax.load(tmp_path / "model", cache_dtype="int8"), llama_jax.load(tmp_path / "model")
    assert (rounded.engine.cache_dtype, exact.engine.cache_dtype) == ("int8", "auto")
    jax.tree.map(np.testing.assert_array_equal, rounded.params, exact.params)
    answers = [llama.generate([[5, 6, 7]], max_new_tokens=9, temperature=0, logprobs=0)[0] for llama in (rounded, exact)]
    assert answers[0].logprobs[0] == answers[1].logprobs[0]  # the prompt is read before it is rounded
    assert answers[0].logprobs[1:] != answers[1].logprobs[1:]


@pytest.mark.parametrize("cache_dtype", ["int4", "", "bfloat16", None])
def test_an_unknown_cache_is_refused_with_the_known_ones(tmp_path, cache_dtype):
    save(tmp_path / "model")
    with pytest.raises(LlamaError, match=f"cache_dtype is {cache_dtype!r}, expected auto .* or int8") as error:
        llama_jax.load(tmp_path / "model", cache_dtype=cache_dtype)
    assert error.value.code == ExitCode.BAD_REQUEST


def test_layers_are_rounded_by_one_program_per_weight(tmp_path, caplog):
    save(tmp_path / "model")
    jax.clear_caches()  # a test before this one may have compiled them
    with jax.log_compiles():
        llama_jax.load(tmp_path / "model", quantize="fp8")
    compiled = [line for line in caplog.messages if "quantize_leaf" in line and line.startswith("Compiling")]
    assert 0 < len(compiled) <= 8  # q, k, v, o, gate, up, down, head; there are three layers


@pytest.mark.parametrize("mesh", [None, {"tensor": 2, "data": 4}])
@pytest.mark.parametrize("draft", ["lookup", "small"])
def test_a_draft_changes_no_token(tmp_path, tokenizer_file, draft, mesh):
    save(tmp_path / "model", tokenizer_files=[tokenizer_file])
    save(tmp_path / "small", config=dataclasses.replace(CONFIG, num_layers=1), seed=1)
    asked = dict(temperature=0.7, max_new_tokens=20, seed=4, ignore_eos=True)
    expected = llama_jax.load(tmp_path / "model").generate(["The child", "She"], **asked)
    named = draft if draft == "lookup" else str(tmp_path / draft)
    llama = llama_jax.load(tmp_path / "model", draft=named, draft_tokens=3, mesh=mesh)
    assert llama.generate(["The child", "She"], **asked) == expected


@pytest.mark.parametrize(
    ("draft", "tokens", "message"),
    [
        ("lookup", 16, "draft_tokens is 16, expected 1 to 15"),
        ("", 4, "nothing guesses them: name a draft"),
        ("nowhere", 0, "nowhere"),
        ("wide", 0, "a vocabulary of 430 tokens, the model"),
        ("other", 0, "the draft's tokenizer is another one than the model's: it has"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(tmp_path, tokenizer_file, draft, tokens, message):
    save(tmp_path / "model", tokenizer_files=[tokenizer_file])
    save(tmp_path / "wide", config=dataclasses.replace(CONFIG, vocab_size=430))
    other = small_sentencepiece(tmp_path / "tokenizer.model", CONFIG.vocab_size - 20)
    save(tmp_path / "other", tokenizer_files=[other])
    named = draft if draft in ("", "lookup") else str(tmp_path / draft)
    with pytest.raises(LlamaError, match=message):
        llama_jax.load(tmp_path / "model", draft=named, draft_tokens=tokens)
