"""What of a conversation is learnt: the assistant's words and what ends them, in the ids that a prompt has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.chat import CHAT_TEMPLATES, encode_answers, encode_chat
from llama_jax.text.spm import SentencePieceTokenizer
from tests.text import make
from tests.text.strategies import texts

FORMATS = {
    "sentencepiece": "llama2",
    "json_prepend": "llama2",
    "codellama": "codellama",
    "step": "codellama_70b",
    "ranks": "llama3",
    "json_bytes": "llama3",
}
LAST = {"role": "user", "content": "x"}


@st.composite
def conversations(draw) -> list[dict[str, str]]:
    content = texts(4).filter(lambda text: not any(tag in text for tag in ("[INST]", "<step>")))
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(content)}, {"role": "assistant", "content": draw(content)}]
    return messages


@pytest.fixture(scope="module")
def tokenizers(all_tokenizers, folder):
    proto = (folder / "sentencepiece" / "tokenizer.model").read_bytes()
    return {**all_tokenizers, "step": SentencePieceTokenizer(make.with_pieces(proto, ["<step>"]))}


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25)
@given(chat=conversations())
def test_ids_are_those_a_prompt_begins_with(tokenizers, kind, chat):
    t, chat_format = tokenizers[kind], FORMATS[kind]
    ids, learnt = encode_answers(t, chat, chat_format)
    assert len(learnt) == len(ids)
    assert encode_chat(t, [*chat, LAST], chat_format)[: len(ids)] == ids
    if chat_format != "codellama_70b":  # its prompts name a destination, which the history leaves out
        assert encode_answers(t, chat, "template", CHAT_TEMPLATES[chat_format]) == (ids, learnt)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25)
@given(chat=conversations())
def test_answers_are_learnt_and_nothing_else(tokenizers, kind, chat):
    """Each run of learnt ids follows the prompt for it, decodes to the answer and ends with what stops a generation."""
    t, chat_format = tokenizers[kind], FORMATS[kind]
    ids, learnt = encode_answers(t, chat, chat_format)
    edges = [i for i in range(len(ids)) if learnt[i] != ([False, *learnt][i])] + [len(ids)]
    runs = list(zip(edges[0::2], edges[1::2], strict=True))
    answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    assert len(runs) == len(answers)
    for (start, end), i in zip(runs, answers, strict=True):
        if chat_format != "codellama_70b":
            prompt = encode_chat(t, chat[:i], chat_format)
            assert ids[:start] == prompt[:start] and len(prompt) - start <= 1  # one token may span both
        assert ids[end - 1] in t.special_ids and not t.special_ids & set(ids[start : end - 1])
        said = t.decode(ids[start : end - 1], continued=True).strip()
        assert said == t.decode(t.encode(chat[i]["content"].strip())).strip()


def test_llama2_and_llama3_ids(llama2, llama3):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    ids, learnt = encode_answers(llama2, chat, "llama2")
    assert [i for i, said in zip(ids, learnt, strict=True) if said] == [15043, 29991, 29871, 2]
    ids, learnt = encode_answers(llama3, chat, "llama3")
    assert [i for i, said in zip(ids, learnt, strict=True) if said] == [*llama3.encode("Hello!"), 128009]


def test_what_a_template_writes_after_an_answer_s_end_is_not_learnt(all_tokenizers):
    t = all_tokenizers["ranks"]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
    )
    ids, learnt = encode_answers(t, chat, "template", template)
    answer = [*t.encode("b"), t.token_id("<|eot_id|>")]
    assert [i for i, said in zip(ids, learnt, strict=True) if said] == answer * 2
    assert ids[-1] == t.encode("\n")[0] and not learnt[-1]


@pytest.mark.parametrize(
    ("chat", "chat_format", "what"),
    [
        ([], "llama3", "at least one message"),
        ([LAST], "llama3", "the last message is from user, expected assistant: there is no answer to learn"),
        ([{"role": "assistant", "content": "a"}], "llama2", "starting with 'system', then 'user'"),
        ([LAST, {"role": "assistant", "content": "[INST]"}], "llama2", "message 1 contains"),
        ([LAST, {"role": "assistant", "content": "a"}], "", "this is a base model"),
        ([LAST, {"role": "assistant", "content": "a"}], "chatml", "unknown chat format 'chatml'"),
        ([LAST, {"role": "assistant", "content": "a"}], "template", "no chat template"),
    ],
)
def test_conversations_that_cannot_be_learnt(all_tokenizers, chat, chat_format, what):
    with pytest.raises(LlamaError, match=what) as error:
        encode_answers(all_tokenizers["ranks"], chat, chat_format)
    assert error.value.code == ExitCode.BAD_REQUEST


def test_a_template_that_changes_its_mind_is_refused(all_tokenizers):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    with pytest.raises(LlamaError, match="renders what is before or in message 1 otherwise when more follows"):
        encode_answers(all_tokenizers["ranks"], [LAST, {"role": "assistant", "content": "a"}], "template", template)
