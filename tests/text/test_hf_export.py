"""The exported tokenizer.json gives our ids, through the tokenizers library and through transformers."""

import json
import random

import pytest
import tokenizers as library

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.chat import CHAT_TEMPLATES, encode_chat
from llama_jax.text.hf_export import merges_of, write_tokenizer
from llama_jax.text.spm import SentencePieceTokenizer
from llama_jax.text.tokenizer import load_tokenizer
from tests.text import make
from tests.text.strategies import SNIPPETS
from tests.text.test_chat import CHATS


def corpus(size: int = 400) -> list[str]:
    """Prose, code, runs of spaces and of single characters, all planes of Unicode; the same every time."""
    rng = random.Random(0)
    planes = [
        (0x20, 0x250),
        (0x250, 0x2000),
        (0x2000, 0x3100),
        (0x4E00, 0x9000),
        (0xAC00, 0xD7A0),
        (0x1F300, 0x1FA00),
        (0xE000, 0x110000),
    ]
    pieces = [
        *SNIPPETS,
        "'s",
        "'LL",
        "'ſ",
        "\r\n",
        "\t",
        " " * 19,
        "1234567",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\x85",
        "e\u0301",
        "ß",
        "İ",
    ]

    def piece() -> str:
        return rng.choice(
            [rng.choice(pieces), " ", chr(rng.randrange(*rng.choice(planes))), rng.choice(("the", "house", "x1"))]
        )

    texts = ["".join(piece() for _ in range(rng.randrange(1, 14))) for _ in range(size)]
    runs = [pattern.replace("*", c * n) for c in " \na=\t▁" for n in range(1, 40, 3) for pattern in ("*", "*x", "x*", "a*b")]
    return [*texts, *runs, *make.TRAINING_TEXT, make.__doc__ + "\n".join(make.TRAINING_TEXT)]


def assert_same_ids(tokenizer, folder, size):
    theirs = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in corpus(size):
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.encode(text).ids == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == tokenizer.decode(ids), text
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    for i in tokenizer.special_ids:
        assert theirs.get_added_tokens_decoder()[i].special


@pytest.mark.parametrize("kind", ["sentencepiece", "codellama", "ranks"])
def test_exported_small_tokenizers_give_the_same_ids(all_tokenizers, tmp_path, kind):
    written = write_tokenizer(all_tokenizers[kind], tmp_path, max_length=128)
    assert all(path.exists() for path in written)
    assert_same_ids(all_tokenizers[kind], tmp_path, 400)


def test_exported_llama2_gives_the_same_ids(llama2, tmp_path):
    write_tokenizer(llama2, tmp_path, chat_format="llama2", max_length=4096)
    assert_same_ids(llama2, tmp_path, 3000)


def test_exported_llama3_gives_the_same_ids(llama3, tmp_path):
    write_tokenizer(llama3, tmp_path, chat_format="llama3", max_length=8192)
    assert_same_ids(llama3, tmp_path, 3000)


KINDS = [("sentencepiece", "llama2"), ("codellama", "codellama"), ("ranks", "llama3")]


@pytest.mark.parametrize(("kind", "chat_format"), KINDS)
def test_an_exported_tokenizer_loads_as_an_equal_one(all_tokenizers, tmp_path, kind, chat_format):
    tokenizer = all_tokenizers[kind]
    write_tokenizer(tokenizer, tmp_path, chat_format=chat_format, max_length=128)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == CHAT_TEMPLATES[chat_format]
    assert (again.vocab_size, again.bos_id, again.special_ids) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.special_ids,
    )
    for chat in CHATS:
        assert encode_chat(again, chat, "template") == encode_chat(tokenizer, chat, chat_format)


def test_configuration(all_tokenizers, tmp_path):
    write_tokenizer(all_tokenizers["ranks"], tmp_path, chat_format="llama3", max_length=8192)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    expected = {"model_max_length": 8192, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert config.items() >= expected.items()
    assert len(config["added_tokens_decoder"]) == 256
    write_tokenizer(all_tokenizers["ranks"], tmp_path, template="{{ bos_token }}", max_length=8192)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["chat_template"]) == ("<|end_of_text|>", "{{ bos_token }}")


def test_tokenizer_model_goes_out_as_it_came(folder, all_tokenizers, tmp_path):
    for kind in ("sentencepiece", "codellama"):
        write_tokenizer(all_tokenizers[kind], tmp_path, max_length=128)
        assert (tmp_path / "tokenizer.model").read_bytes() == (folder / kind / "tokenizer.model").read_bytes()


def test_a_tokenizer_json_goes_out_as_it_came(folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((folder / "json_prepend" / "tokenizer.json").read_bytes())
    make.write_json(source / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": "{{ messages }}"})
    written = write_tokenizer(load_tokenizer(source), tmp_path / "output", chat_format="llama2", max_length=4)
    assert {p.name: p.read_bytes() for p in written} == {p.name: p.read_bytes() for p in source.iterdir()}


def test_models_that_are_not_llama_s_are_refused(folder, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    for change, what in (
        ("remove_extra_whitespaces", "drops repeated spaces"),
        ("model_type", "not BPE without normalisation"),
    ):
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString((folder / "sentencepiece" / "tokenizer.model").read_bytes())
        if change == "model_type":
            model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
        else:
            model.normalizer_spec.remove_extra_whitespaces = True
        with pytest.raises(LlamaError, match=what) as e:
            write_tokenizer(SentencePieceTokenizer(model.SerializeToString()), tmp_path, max_length=4)
        assert e.value.code == ExitCode.BAD_TOKENIZER


def test_merges_hold_every_pair_that_makes_a_piece():
    ids = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4, "abx": 5}
    assert merges_of(["ab", "ba", "aba", "abx"], ids) == [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]


@pytest.mark.parametrize(("name", "chat_format"), [*KINDS, ("with_step", "codellama_70b")])
def test_transformers_gives_the_same_ids(all_tokenizers, folder, tmp_path, name, chat_format):
    transformers = pytest.importorskip("transformers", reason="transformers is not a dependency; `pip install transformers`")
    if name == "with_step":
        proto = (folder / "sentencepiece" / "tokenizer.model").read_bytes()
        tokenizer = SentencePieceTokenizer(make.with_pieces(proto, ["<step>"]))
    else:
        tokenizer = all_tokenizers[name]
    write_tokenizer(tokenizer, tmp_path, chat_format=chat_format, max_length=100_000)
    make.write_json(tmp_path / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in corpus():
        if not any(special in text for special in (*tokenizer.special_tokens, "<unk>")):  # there they are parsed
            ids = tokenizer.encode(text, bos=True)
            assert theirs.encode(text) == ids
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    for chat in CHATS[:4]:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == encode_chat(tokenizer, chat, chat_format)
