"""Texts as ids by the harness's rules, and conversations as texts."""

import datetime

import pytest

from llama_jax.errors import LlamaError
from llama_jax.evaluation.encoding import encode, render_chat
from tests.generation.make import ONE_LAYER, llama_of, tokenizer_of

NOW = datetime.datetime(2025, 1, 1)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
]


def test_bos_goes_before_a_text_once():
    tokenizer = tokenizer_of()
    plain = tokenizer.encode("one two")
    assert encode(tokenizer, "one two") == [1, *plain]
    assert encode(tokenizer, "<s>one two")[:2] != [1, 1] and encode(tokenizer, "<s>one two")[0] == 1
    assert encode(tokenizer, "one two", False) == plain
    assert encode(tokenizer, "<s>", True, repeat_bos=True) == [1, 1]


def test_a_rendered_conversation_has_the_ids_of_a_chat():
    llama = llama_of(ONE_LAYER)
    assert encode(llama.tokenizer, render_chat(llama, MESSAGES, opened=True, now=NOW)) == llama.encode_chat(MESSAGES)


def test_a_begun_answer_goes_on_where_it_ends():
    begun = [*MESSAGES, {"role": "assistant", "content": "The answer is "}]
    assert render_chat(llama_of(ONE_LAYER), begun, opened=False, now=NOW).endswith("[/INST] The answer is")


def test_a_base_model_has_no_chat():
    with pytest.raises(LlamaError, match="base model, it knows no conversations: leave out --apply_chat_template"):
        render_chat(llama_of(ONE_LAYER, chat_format=""), MESSAGES, opened=True, now=NOW)
