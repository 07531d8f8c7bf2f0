"""SentencePiece: Llama 2's and Code Llama's ids, the library's decoding, added tokens, llama2.c's file."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.text.spm import SentencePieceTokenizer
from llama_jax.text.tokenizer import load_tokenizer
from tests.text import make
from tests.text.conftest import shared
from tests.text.strategies import id_lists, texts

GOLDEN = {  # llama-facts 4.1, ids of Meta's tokenizer.model
    "": [],
    "Hello": [15043],
    " Hello": [29871, 15043],
    "  Hello": [259, 15043],
    "\n": [29871, 13],
    " ": [259],
    "  ": [1678],
    "Hello world!\n": [15043, 3186, 29991, 13],
    "12345": [29871, 29896, 29906, 29941, 29946, 29945],
    "😀": [29871, 243, 162, 155, 131],
    "日本語": [29871, 30325, 30346, 30968],
    "I believe the meaning of life is": [306, 4658, 278, 6593, 310, 2834, 338],
    "def f(x):\n    return x\n": [822, 285, 29898, 29916, 1125, 13, 1678, 736, 921, 13],
    "<s>": [529, 29879, 29958],
    "x = 1": [921, 353, 29871, 29896],
    "☺": [29871, 31171],
}


def test_llama2_ids(llama2):
    assert {text: llama2.encode(text) for text in GOLDEN} == GOLDEN
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id, llama2.stop_ids) == (32000, 1, 2, (2,))
    assert llama2.special_tokens == {"<s>": 1, "</s>": 2}


def test_llama2_runs_of_spaces(llama2):
    runs = {1: 29871, 2: 259, 3: 1678, 7: 4706, 14: 1669, 15: 18884, 16: 462}
    for spaces, i in runs.items():
        assert llama2.encode_continued(" " * spaces) == [i]
    assert llama2.encode_continued(" " * 17) == [462, 29871]


def test_llama2_text_of_ids(llama2):
    golden = {(29871,): "", (259,): " ", (29871, 15043): " Hello", (3186,): "world", (1, 3186): "world", (0,): " ⁇ "}
    golden |= {
        (15043, 1, 3186): "Hello world",
        (0, 3186): " ⁇  world",
        (35, 15043): "  Hello",
        (243, 162, 1, 155, 131): "\ufffd" * 4,
    }
    assert {ids: llama2.decode(ids) for ids in golden} == golden


def test_text_that_goes_on_has_no_space_of_its_own(llama2):
    assert llama2.encode_continued("x = 1") == [29916, 353, 29871, 29896]
    assert llama2.decode([29916, 353, 29871, 29896], continued=True) == "x = 1"
    assert llama2.decode([3186], continued=True) == " world"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decoding_is_the_library_s(all_tokenizers, data):
    tokenizer = all_tokenizers["sentencepiece"]
    ids = data.draw(id_lists(tokenizer))
    assert tokenizer.decode(ids) == tokenizer.processor.decode(ids)


@settings(max_examples=60, deadline=None)
@given(text=texts())
def test_infilling_pieces_do_not_change_what_text_encodes_to(all_tokenizers, text):
    assert all_tokenizers["codellama"].encode(text) == all_tokenizers["sentencepiece"].encode(text)


def test_unprotected_infilling_pieces_would_be_reachable_from_text(folder, all_tokenizers):
    proto = make.with_pieces((folder / "sentencepiece" / "tokenizer.model").read_bytes(), ["▁<", "P", "▁<P", "RE"])
    proto = make.with_pieces(proto, make.INFILL_PIECES)
    library = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pre = library.piece_to_id("▁<PRE>")
    assert pre in library.encode("x <PRE> y") or pre in library.encode("<PRE>")
    ours = SentencePieceTokenizer(proto)
    assert ours.token_id("▁<PRE>") == ours.token_id("<PRE>") == pre
    assert ours.special_ids.isdisjoint(ours.encode("x <PRE> y <PRE>"))


def test_step_is_a_control_token_whatever_its_type(folder):
    proto = (folder / "sentencepiece" / "tokenizer.model").read_bytes()
    for piece_type in (1, 3, 4):
        tokenizer = SentencePieceTokenizer(make.with_pieces(proto, ["<step>"], piece_type))
        assert tokenizer.token_id("<step>") == tokenizer.vocab_size - 1
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode("a<step>b"))


def test_tokens_added_beside_the_model_are_control_tokens(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    make.write_json(tmp_path / "added_tokens.json", {"<|im_start|>": 422, "<|im_end|>": 420})
    make.write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "add_bos_token": False})
    make.write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 420]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 423
    assert tokenizer.token_id("<|im_start|>") == 422
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.adds_bos) == (420, (420, 2), False)
    assert tokenizer.special_ids == {1, 2, 420, 421, 422}
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<|im_start|>"))
    assert len(tokenizer.files()) == 4


def test_llama2c_file_encodes_and_decodes_like_its_model(folder, tmp_path):
    model = folder / "sentencepiece" / "tokenizer.model"
    assert_same_tokenizer(load_tokenizer(model), load_tokenizer(make.small_llama2c(tmp_path / "tokenizer.bin", model)))


def test_stories260k_llama2c_file_encodes_and_decodes_like_its_model():
    stories = shared("checkpoints/stories260K")
    assert_same_tokenizer(load_tokenizer(stories / "meta"), load_tokenizer(stories / "llama2c" / "tokenizer.bin"))


def test_llama2c_conversion_writes_a_model_that_loads(folder, tmp_path):
    source = make.small_llama2c(tmp_path / "tokenizer.bin", folder / "sentencepiece" / "tokenizer.model")
    source = source.rename(tmp_path / "source.bin")
    (tmp_path / "tokenizer.model").write_bytes(load_tokenizer(source).source_proto)
    assert load_tokenizer(tmp_path).files() == (tmp_path / "tokenizer.model",)
    assert_same_tokenizer(load_tokenizer(tmp_path), load_tokenizer(source))


def assert_same_tokenizer(a: SentencePieceTokenizer, b: SentencePieceTokenizer):
    assert (a.vocab_size, a.special_tokens, a.stop_ids) == (b.vocab_size, b.special_tokens, b.stop_ids)
    words = [*make.TRAINING_TEXT, "", " ", "   x", 'Lily\'s mom said, "no".\n', "😀日本語\x00", "<s> </s> <0x0A>", "12345"]
    for text in words:
        assert a.encode(text) == b.encode(text)
        assert a.encode_continued(text) == b.encode_continued(text)
    for i in range(a.vocab_size):
        assert a.decode([5, i, 40, i], skip_special=False) == b.decode([5, i, 40, i], skip_special=False)


@pytest.mark.parametrize(("legacy", "prefixed"), [(True, True), (None, True), (False, False)])
def test_leading_space_after_control_tokens_follows_legacy(folder, tmp_path, legacy, prefixed):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece" / "tokenizer.model").read_bytes())
    make.write_json(tmp_path / "tokenizer_config.json", {} if legacy is None else {"legacy": legacy})
    tokenizer = load_tokenizer(tmp_path)
    inner = tokenizer.encode("the") if prefixed else tokenizer.encode_continued("the")
    assert tokenizer.encode_template("the</s>the") == [*tokenizer.encode("the"), 2, *inner]
