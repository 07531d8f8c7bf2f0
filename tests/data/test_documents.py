"""Records as token documents: which ids, and which of them are learnt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.documents import to_document
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.chat import encode_answers

some_text = st.text(min_size=1, max_size=30).filter(str.strip)


def learnt_ids(document) -> list[int]:
    return [i for i, learnt in zip(document.ids, document.learnt, strict=True) if learnt]


@given(text=some_text)
def test_text_is_learnt_from_its_first_token_to_its_end(tokenizer, text):
    document = to_document(tokenizer, {"text": text}, "")
    assert document.ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert learnt_ids(document) == document.ids[1:]


@given(prompt=st.text(max_size=20), completion=some_text)
def test_of_prompt_and_completion_the_completion_is_learnt(ranks, tokenizer, prompt, completion):
    for t in (ranks, tokenizer):
        document = to_document(t, {"prompt": prompt, "completion": completion}, "")
        asked = t.encode(prompt, bos=True)
        assert document.ids[: len(asked)] == asked  # as it will be when the model is asked
        assert document.learnt == [False] * len(asked) + [True] * (len(document.ids) - len(asked))
        assert document.ids[-1] == t.eos_id
        answer = document.ids[len(asked) : -1]
        assert t.decode(answer, continued=bool(prompt)) == t.decode(t.encode(completion))


def test_conversations_are_learnt_as_the_chat_format_says(ranks, tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the house", "name": None},
    ]
    for t, chat_format in ((tokenizer, "llama2"), (ranks, "llama3")):
        document = to_document(t, {"messages": chat, "text": "is not read"}, chat_format)
        assert (document.ids, document.learnt) == encode_answers(t, chat, chat_format)
        assert document.kind == "messages" and 0 < sum(document.learnt) < len(document.ids) - 5


def test_a_tokenizer_without_bos_begins_with_the_text(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "adds_bos", False)
    document = to_document(tokenizer, {"text": "the house"}, "")
    assert document.ids == [*tokenizer.encode("the house"), tokenizer.eos_id]
    assert document.learnt == [False] + [True] * (len(document.ids) - 1)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({}, "has the keys none; expected text, or prompt and completion, or messages"),
        ({"content": "a", "label": 1}, "has the keys 'content', 'label'; expected text"),
        ({"text": ""}, "has an empty 'text'"),
        ({"text": " \n"}, "has an empty 'text'"),
        ({"text": ["a"]}, "has a 'text' of type list, expected a string"),
        ({"prompt": "a"}, "has no 'completion'"),
        ({"completion": "a"}, "has no 'prompt'"),
        ({"prompt": 1, "completion": "a"}, "has a 'prompt' of type int"),
        ({"prompt": "a", "completion": ""}, "has an empty 'completion'"),
        ({"messages": "hello"}, "has messages of type str"),
        ({"messages": []}, "a conversation needs at least one message"),
        ({"messages": ["a"]}, "message 0 needs a role and a content"),
        ({"messages": [USER]}, "the last message is from user, expected assistant: there is no answer to learn"),
        ({"messages": [ANSWER]}, "starting with 'system', then 'user'"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "content of message 1 must be a string, not int"),
        ({"messages": [{"role": "user", "content": "[INST]"}, ANSWER]}, "special tags are not allowed"),
    ],
)
def test_bad_records_say_what_is_wrong(tokenizer, record, what):
    with pytest.raises(LlamaError, match=what) as error:
        to_document(tokenizer, record, "llama2")
    assert error.value.code == ExitCode.BAD_RECORD


def test_a_missing_chat_format_is_no_fault_of_the_record(tokenizer):
    with pytest.raises(LlamaError, match=r"no chat format: set config\.data\.chat_format") as error:
        to_document(tokenizer, {"messages": [USER, ANSWER]}, "")
    assert error.value.code == ExitCode.BAD_CONFIG
    with pytest.raises(LlamaError, match="chat format llama3 needs") as error:
        to_document(tokenizer, {"messages": [USER, ANSWER]}, "llama3")
    assert error.value.code == ExitCode.BAD_TOKENIZER
