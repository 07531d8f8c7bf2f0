import re

import pytest

from bundled.choices import Choices, side
from bundled.dialogues import dialogue, exercise, question_messages, story_request
from bundled.questions import KINDS, question
from bundled.stories import story
from llama_jax.text.chat import encode_chat

CONTEXT = 512
COUNT = 500


@pytest.fixture(scope="module")
def dialogues() -> list[list[dict[str, str]]]:
    return [dialogue(Choices("test", number), "train") for number in range(COUNT)]


def test_user_and_model_take_turns_and_the_model_has_the_last_word(dialogues):
    for said in dialogues:
        roles = [message["role"] for message in said]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"] == message["content"].strip() != "" for message in said)


def test_there_are_all_sorts(dialogues):
    turns = [sum(message["role"] == "user" for message in said) for said in dialogues]
    assert {1, 2, 3, 4} <= set(turns)
    assert 0.1 < sum(said[0]["role"] == "system" for said in dialogues) / COUNT < 0.5
    assert 0.2 < sum(any("story" in message["content"] for message in said) for said in dialogues) / COUNT < 0.6


def test_dialogues_render_in_llama_2s_format_and_fit_the_context(dialogues, tokenizer):
    for said in dialogues:
        *before, answer = said
        ids = encode_chat(tokenizer, before, "llama2")
        text = tokenizer.decode([i for i in ids if i not in tokenizer.special_ids])
        assert ids.count(tokenizer.bos_id) == sum(message["role"] == "user" for message in said)
        assert ids.count(tokenizer.eos_id) == sum(message["role"] == "assistant" for message in before)
        assert text.endswith("[/INST]") and ("<<SYS>>" in text) == (said[0]["role"] == "system")
        assert all(message["content"] in text for message in before)
        assert len(ids) + len(tokenizer.encode(f"{answer['content']} ", eos=True)) <= CONTEXT


def test_a_requested_story_holds_what_was_asked_for():
    asked = 0
    for number in range(COUNT):
        told = story(Choices("test", number))
        text, words = story_request(Choices("request", number), told)
        assert all(re.search(rf"\b{word}\b", told.text) and word in text for word in words)
        asked += bool(words)
    assert asked > COUNT / 2


def test_no_held_out_sum_is_in_training(dialogues):
    texts = [message["content"] for said in dialogues for message in said]
    texts += [exercise(Choices("test", number), "train") for number in range(COUNT)]
    sums = [(int(a), int(b)) for text in texts for a, b in re.findall(r"(\d+) \+ (\d+) = \d", text)]
    differences = [(int(a), int(b)) for text in texts for a, b in re.findall(r"(\d+) - (\d+) = \d", text)]
    assert len(sums) > 200 and all(side(f"sum: {min(pair)} + {max(pair)}") == "train" for pair in sums)
    assert len(differences) > 200 and all(side(f"difference: {a} - {b}") == "train" for a, b in differences)


def test_a_question_is_asked_up_to_where_its_answer_begins():
    asked = question(Choices(0), "own name", "held_out")
    assert question_messages(asked) == [
        {"role": "system", "content": asked.system},
        {"role": "user", "content": asked.text},
    ]
    assert all(question_messages(question(Choices(0), kind, "train"))[-1]["role"] == "user" for kind in KINDS)
