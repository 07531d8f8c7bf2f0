import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bundled.stories import stories
from bundled.tokenizer import LLAMA2, VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, vocab_size=VOCAB_SIZE, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def test_training_twice_gives_the_same_bytes(model_file, tmp_path):
    train_tokenizer(tmp_path / "again.model", vocab_size=VOCAB_SIZE, seed=0)
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()


def test_control_ids_and_bytes_are_where_llama_2_has_them(tokenizer):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert tokenizer.encode("\n")[-1] == 13
    assert tokenizer.vocab_size() == VOCAB_SIZE


def test_settings_are_in_the_file(model_file):
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    assert model.normalizer_spec.name == "identity" and model.normalizer_spec.precompiled_charsmap == b""
    assert model.normalizer_spec.add_dummy_prefix and not model.normalizer_spec.remove_extra_whitespaces
    for name in ("byte_fallback", "split_digits", "allow_whitespace_only_pieces"):
        assert getattr(model.trainer_spec, name) is LLAMA2[name] is True


def test_new_stories_survive_the_round_trip_and_compress(tokenizer):
    texts = list(stories(500, seed=99))
    ids = tokenizer.encode(texts)
    assert tokenizer.decode(ids) == texts
    assert sum(map(len, texts)) / sum(map(len, ids)) > 3.0
    assert not any(0 in row for row in ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\u2581")))
@settings(max_examples=100, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
