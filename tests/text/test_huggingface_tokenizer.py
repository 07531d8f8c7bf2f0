"""tokenizer.json: decoding as the library does it, which added tokens are control tokens, what the files beside it say."""

import json

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.tokenizer import load_tokenizer
from tests.text import make
from tests.text.strategies import id_lists

KINDS = ("json_bytes", "json_prepend", "json_metaspace")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_decoding_is_the_library_s(all_tokenizers, folder, kind, data):
    tokenizer = all_tokenizers[kind]
    ids = data.draw(id_lists(tokenizer))
    unskipped = [i for i in ids if i not in tokenizer.special_ids]
    theirs = library.Tokenizer.from_file(str(folder / kind / "tokenizer.json"))
    assert tokenizer.decode(ids) == theirs.decode(unskipped, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_trusted_text_is_parsed_as_the_library_does(all_tokenizers, folder, kind):
    tokenizer = all_tokenizers[kind]
    theirs = library.Tokenizer.from_file(str(folder / kind / "tokenizer.json"))
    eos = next(name for name, i in tokenizer.special_tokens.items() if i == tokenizer.eos_id)
    for text in (f"{eos}the {eos} the", "the <|tool|>the", f"the{eos}{eos} "):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_template(text) == expected
        escaped = tokenizer.encode_template(f"{text}\ue000<|tool|>", escape="\ue000")  # takes the other way
        assert escaped[: len(expected)] == expected
        assert len(escaped) > len(expected) + 1


def test_added_tokens_that_look_like_control_tokens_are(all_tokenizers):
    for kind in KINDS:
        assert all_tokenizers[kind].token_id("<|tool|>") in all_tokenizers[kind].special_ids


def test_unknown_is_not_a_control_token_but_cannot_be_written(all_tokenizers):
    tokenizer = all_tokenizers["json_prepend"]
    assert 0 not in tokenizer.special_ids
    assert 0 not in tokenizer.encode("<unk>")


def test_merges_that_lead_to_a_control_token_are_caught(folder, tmp_path):
    spec = json.loads((folder / "json_prepend" / "tokenizer.json").read_text())
    spec["model"]["merges"].append(["<", "s>"])
    make.write_json(tmp_path / "tokenizer.json", spec)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(LlamaError, match="the text spells the control token '<s>'") as e:
        tokenizer.encode("a<s>")
    assert e.value.code == ExitCode.BAD_REQUEST


def test_truncation_and_padding_of_the_file_are_not_applied(folder, tmp_path, all_tokenizers):
    theirs = library.Tokenizer.from_file(str(folder / "json_bytes" / "tokenizer.json"))
    theirs.enable_truncation(max_length=2)
    theirs.enable_padding(length=9)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("the house") == all_tokenizers["json_bytes"].encode("the house")


def test_settings_beside_the_file(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "json_bytes" / "tokenizer.json").read_bytes())
    plain = load_tokenizer(tmp_path)
    names = ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>")
    end, turn, start = (plain.token_id(name) for name in names)
    assert (plain.eos_id, plain.stop_ids, plain.adds_bos) == (end, (end, turn), True)
    make.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|eot_id|>", "add_bos_token": False})
    make.write_json(tmp_path / "generation_config.json", {"eos_token_id": [end, start, 99999]})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.adds_bos) == (turn, (turn, end, start), False)
    assert [path.name for path in tokenizer.files()] == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def test_a_tokenizer_without_bos_says_so(folder, tmp_path):
    spec = json.loads((folder / "json_bytes" / "tokenizer.json").read_text())
    spec["post_processor"] = None
    for token in spec["added_tokens"]:
        token["content"] = token["content"].replace("begin_of_text", "nothing")
    make.write_json(tmp_path / "tokenizer.json", spec)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)
    with pytest.raises(LlamaError, match="no beginning-of-sequence token"):
        tokenizer.encode("x", bos=True)
