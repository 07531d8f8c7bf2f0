from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bundled.make_data import records
from bundled.stories import ALL_NAMES
from bundled.tokenizer import LLAMA2, VOCAB_SIZE, train_tokenizer


def test_training_twice_gives_the_same_bytes(texts):
    some = texts[::20]
    assert train_tokenizer(some, 1024) == train_tokenizer(some, 1024)


def test_control_ids_and_bytes_are_where_llama_2_has_them(tokenizer):
    processor = tokenizer.processor
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert [processor.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert tokenizer.encode("\n")[-1] == 13
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_settings_are_in_the_file(tokenizer_file):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer_file)
    assert model.normalizer_spec.name == "identity" and model.normalizer_spec.precompiled_charsmap == b""
    assert model.normalizer_spec.add_dummy_prefix and not model.normalizer_spec.remove_extra_whitespaces
    for name in ("byte_fallback", "split_digits", "allow_whitespace_only_pieces"):
        assert getattr(model.trainer_spec, name) is LLAMA2[name] is True


def test_everything_generated_survives_the_round_trip(tokenizer, texts):
    texts = [*texts, *(record["text"] for record in records("held_out", "story", range(300)))]
    texts += [m["content"] for record in records("held_out", "dialogue", range(300)) for m in record["messages"]]
    rows = tokenizer.processor.encode(texts)
    assert tokenizer.processor.decode(rows) == texts
    assert not any(tokenizer.processor.unk_id() in row for row in rows)


def test_a_story_has_almost_four_characters_a_token(tokenizer):
    texts = [record["text"] for record in records("held_out", "story", range(300))]
    assert sum(map(len, texts)) / sum(map(len, tokenizer.processor.encode(texts))) > 3.8


def test_every_name_is_one_token_and_every_digit_too(tokenizer):
    assert all(len(tokenizer.processor.encode(name)) == 1 for name in ALL_NAMES)
    assert tokenizer.processor.encode("47 + 15", out_type=str) == ["▁", "4", "7", "▁+", "▁", "1", "5"]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\u2581")))
@settings(max_examples=100)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.processor.decode(tokenizer.processor.encode(text)) == text
