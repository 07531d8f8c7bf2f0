"""Which file of a folder is the tokenizer, what it is by its content, and what is said about one that cannot be used."""

import json
import pickle

import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text import tokenizer as tokenizer_module
from llama_jax.text.hf import HuggingFaceTokenizer
from llama_jax.text.hf_export import write_tokenizer
from llama_jax.text.ranks import RankTokenizer
from llama_jax.text.spm import SentencePieceTokenizer
from llama_jax.text.tokenizer import load_tokenizer
from tests.text import make

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n"


def test_kinds_are_told_by_content_not_by_name(folder, tmp_path):
    model = folder / "sentencepiece" / "tokenizer.model"
    sources = {
        model: SentencePieceTokenizer,
        make.small_llama2c(tmp_path / "tok512.bin", model): SentencePieceTokenizer,
        folder / "ranks" / "tokenizer.model": RankTokenizer,
        folder / "json_bytes" / "tokenizer.json": HuggingFaceTokenizer,
    }
    for i, (source, kind) in enumerate(sources.items()):
        copy = tmp_path / f"anything-{i}"
        copy.write_bytes(source.read_bytes())
        assert type(load_tokenizer(copy)) is kind
        assert type(load_tokenizer(str(source))) is kind


def test_files_make_an_equal_tokenizer(tokenizer, tmp_path):
    for path in tokenizer.files():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = load_tokenizer(tmp_path)
    text = "the house </s> <|eot_id|> 😀"
    assert copy.encode(text, bos=True, eos=True) == tokenizer.encode(text, bos=True, eos=True)
    assert (copy.stop_ids, copy.special_tokens) == (tokenizer.stop_ids, tokenizer.special_tokens)


@pytest.mark.parametrize(("adds", "kind"), [(False, SentencePieceTokenizer), (True, HuggingFaceTokenizer)])
def test_tokenizer_model_wins_unless_the_json_adds_tokens(folder, tmp_path, adds, kind):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    spec = json.loads((folder / "json_prepend" / "tokenizer.json").read_text())
    if adds:
        first = 1 + max(token["id"] for token in spec["added_tokens"])
        spec["added_tokens"] += [spec["added_tokens"][0] | {"id": i, "content": f"<|{i}|>"} for i in range(first, 430)]
    make.write_json(tmp_path / "tokenizer.json", spec)
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is kind
    assert {path.name for path in tokenizer.files()} >= {"tokenizer.json"}


@pytest.mark.parametrize(
    "spec", [{}, {"model": 3, "added_tokens": 4}, {"model": {"vocab": 1}, "added_tokens": [{"id": "x"}, 1]}]
)
def test_a_broken_tokenizer_json_beside_tokenizer_model_does_not_matter(folder, tmp_path, spec):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    make.write_json(tmp_path / "tokenizer.json", spec)
    assert type(load_tokenizer(tmp_path)) is SentencePieceTokenizer


def test_meta_keeps_the_tokenizer_one_folder_up(folder, tmp_path):
    (tmp_path / "llama-2-7b").mkdir()
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    with pytest.raises(LlamaError, match=r"no tokenizer in .*llama-2-7b: expected one of tokenizer.model, tokenizer.json"):
        load_tokenizer(tmp_path / "llama-2-7b")
    make.write_json(tmp_path / "llama-2-7b" / "params.json", {})
    assert load_tokenizer(tmp_path / "llama-2-7b").files() == (tmp_path / "tokenizer.model",)


@pytest.mark.parametrize(
    ("data", "code", "what"),
    [
        (LFS, ExitCode.LFS_POINTER, "git-lfs pointer.*run `git lfs pull`"),
        (b"", ExitCode.BAD_TOKENIZER, "is empty: download it again"),
        (b"<!DOCTYPE html><html>", ExitCode.BAD_TOKENIZER, "a web page"),
        (b"\x80\x02garbage", ExitCode.BAD_TOKENIZER, "not a tokenizer we know"),
        (b"Once upon a time", ExitCode.BAD_TOKENIZER, "not a tokenizer we know"),
        (b"\n\xff\xff\xff\xff", ExitCode.BAD_TOKENIZER, "not a complete SentencePiece model"),
        (b"\n\n\n\n x", ExitCode.BAD_TOKENIZER, "SentencePiece model"),
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", ExitCode.BAD_TOKENIZER, "SentencePiece"),
        (b'{"model": ', ExitCode.BAD_TOKENIZER, "is not JSON"),
        (b'{"bos_token": "<s>"}', ExitCode.BAD_TOKENIZER, "has no model in it: give the file named tokenizer.json"),
        (b'{"model": {"type": "BPE"}, "decoder": {"type": "WordPiece"}}', ExitCode.BAD_TOKENIZER, "decoder.*WordPiece"),
        (b'{"model": {}, "decoder": {"type": "Sequence", "decoders": 3}}', ExitCode.BAD_TOKENIZER, "refused by the"),
        (b'{"model": {"type": "BPE"}}', ExitCode.BAD_TOKENIZER, "decoder None"),
        (b'{"model": {"type": "?"}, "decoder": {"type": "Fuse"}}', ExitCode.BAD_TOKENIZER, "refused by the tokenizers library"),
        (b'{"model": {}, "decoder": {"type": "Fuse"}, "added_tokens": [1]}', ExitCode.BAD_TOKENIZER, "added token without"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, data, code, what):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(LlamaError, match=what) as e:
        load_tokenizer(path)
    assert e.value.code == code
    assert str(path) in str(e.value)


def test_cut_files_are_refused(folder, tmp_path):
    model = folder / "sentencepiece" / "tokenizer.model"
    llama2c = make.small_llama2c(tmp_path / "whole.bin", model)
    for source in (model, llama2c, folder / "json_bytes" / "tokenizer.json", folder / "ranks" / "tokenizer.model"):
        data = source.read_bytes()
        for size in (len(data) // 2 + 1, len(data) * 9 // 10 + 1, 40):
            (tmp_path / "cut").write_bytes(data[:size])
            try:
                tokenizer = load_tokenizer(tmp_path / "cut")
            except LlamaError as e:
                assert e.code == ExitCode.BAD_TOKENIZER
            else:  # whole lines of ranks, whole tokens: nothing says that more should follow
                assert tokenizer.vocab_size < load_tokenizer(source).vocab_size


def test_paths_may_be_etils_paths(folder, tmp_path):
    from etils import epath

    tokenizer = load_tokenizer(epath.Path(folder / "sentencepiece"))
    write_tokenizer(tokenizer, epath.Path(tmp_path), max_length=4)
    assert load_tokenizer(epath.Path(tmp_path)).encode("the house") == tokenizer.encode("the house")


def test_a_file_too_large_is_not_read(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer_module, "MAX_BYTES", 10)
    (tmp_path / "tokenizer.model").write_bytes(b"\n" * 11)
    with pytest.raises(LlamaError, match=r"larger than any tokenizer .* are these weights\?"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LlamaError, match="there is no such file or folder") as e:
        load_tokenizer(tmp_path / "nowhere")
    assert e.value.code == ExitCode.BAD_TOKENIZER


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[1]", "does not hold a JSON object"),
        ("tokenizer_config.json", LFS, "not JSON"),
        ("generation_config.json", b'{"eos_token_id": "two"}', "eos_token_id 'two', expected a token id"),
        ("generation_config.json", b'{"eos_token_id": [[1]]}', "expected a token id"),
        ("added_tokens.json", b'{"<a>": 420, "<b>": 420}', "two added tokens one id"),
        ("added_tokens.json", b'{"<a>": null}', "gives an added token no id"),
        ("added_tokens.json", b'{"<a>": 900000000}', "an added token has id 900000000"),
    ],
)
def test_broken_side_files_are_named(folder, tmp_path, name, value, what):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    (tmp_path / name).write_bytes(value)
    with pytest.raises(LlamaError, match=what) as e:
        load_tokenizer(tmp_path)
    assert e.value.code == ExitCode.BAD_TOKENIZER


def test_chat_template_comes_from_the_jinja_file_or_the_configuration(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages }}"}]
    make.write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert load_tokenizer(tmp_path).chat_template == "{{ bos_token }}"


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "the red house <|eot_id|> é"
    assert copy.encode(text, bos=True, eos=True) == tokenizer.encode(text, bos=True, eos=True)
    assert copy.decode(copy.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert copy.special_tokens == tokenizer.special_tokens and copy.fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_tokenizers_apart(all_tokenizers, folder):
    assert len({t.fingerprint for t in all_tokenizers.values()}) == len(all_tokenizers)
    assert all(load_tokenizer(folder / kind).fingerprint == t.fingerprint for kind, t in all_tokenizers.items())
