"""The judge, judging models of whom it is known what they can do."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from bundled.choices import Choices
from bundled.judge import COMPLETED, CONVERSATIONS, judge, training
from bundled.measure import answers, consistency, held_out_questions, names_kept, perplexities, requests_met
from bundled.page import page
from bundled.questions import KINDS
from bundled.stories import story
from llama_jax.config import PRESETS

TOLD = 'Once upon a time there was a fox named Anna. Anna met Ben the dog. "Hello, Anna," said Ben. She laughed.'


class Sayer:
    """Stands for llama_jax.Llama; says what it is told to, and finds every token equally likely.

    Args:
        say: answer to the last user's words (of a conversation) or continuation (of a text).
    """

    config = dataclasses.replace(PRESETS["tiny"], vocab_size=2048, max_length=512)
    max_length = 512

    def __init__(self, tokenizer, say):
        self.tokenizer, self.say = tokenizer, say

    def encode_chat(self, messages):
        return messages

    def generate(self, prompts, n=1, echo=False, **settings):
        heard = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return [SimpleNamespace(text=self.say(words)) for words in heard for _ in range(n)]

    def chat(self, messages, **settings):
        return SimpleNamespace(text=" " + self.say(messages[-1]["content"]))

    def score(self, tokens):
        return SimpleNamespace(logprobs=np.full(len(tokens) - 1, -np.log(2048), np.float32))


@pytest.fixture
def oracle(tokenizer) -> Sayer:
    known = {one.text: one.reply for kind in KINDS for one in held_out_questions(kind, 6) if kind != "own name"}
    return Sayer(tokenizer, lambda words: known.get(words, "I do not know."))


def test_who_knows_all_answers_gets_them_right_and_who_knows_none_does_not(oracle, tokenizer):
    found = answers(oracle, 6)
    assert list(found) == list(KINDS)
    for kind, one in found.items():
        assert one["right"] == (0 if kind == "own name" else one["asked"]) and one["asked"] >= 5
        assert (one["a_wrong_one"] is None) == (kind != "own name")
    assert found["owner"]["by_guessing"] >= 1 / 4 and found["sum"]["by_guessing"] is None
    assert not any(one["right"] for one in answers(Sayer(tokenizer, lambda words: "Hm."), 6).values())


def test_perplexity_of_one_who_knows_nothing_is_the_size_of_the_vocabulary(oracle):
    found = perplexities(oracle, 20, 200)
    assert found["perplexity"]["model"] == pytest.approx(2048)
    assert found["perplexity"]["generator"] < found["perplexity"]["5-gram"] < found["perplexity"]["3-gram"] < 100
    assert found["nats_per_story"]["generator"] == pytest.approx(
        sum(story(Choices("held_out", "story", i)).nats for i in range(20)) / 20
    )


def test_faults_of_stories_are_found():
    assert not consistency(TOLD)
    assert consistency(TOLD + " Carl came.") == {"third name"}
    assert consistency(TOLD + " He laughed.") == {"wrong pronoun"}
    assert consistency(TOLD + " Ben the bear laughed.") == {"changed kind"}
    assert consistency("A fox named Anna met Ben.") == {"hero forgotten"} == consistency("Nobody was there.")


def test_sampled_stories_and_requests_are_counted(tokenizer):
    teller = Sayer(tokenizer, lambda words: TOLD)
    found = names_kept(teller, 3)
    assert (found["sampled"], found["consistent"], found["different_texts"], found["third name"]) == (12, 12, 1, 0)
    asked = requests_met(teller, 20)
    assert 0 <= asked["met"] == asked["met_and_consistent"] < asked["asked"] <= 20
    echo = requests_met(Sayer(tokenizer, lambda words: words), 20)
    assert echo["met"] == echo["asked"] > 10 and echo["met_and_consistent"] == 0


def test_the_page_holds_the_figures_and_ten_samples(tokenizer, tmp_path):
    lines = [dict(step=i, loss=2.0, step_seconds=30.0, tokens_per_second=1e5) for i in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    llama = Sayer(tokenizer, lambda words: f"{words} and so on.")
    figures = judge(llama, stories=5, ngram_stories=50, questions=2, sampled=1, requests=3)
    text = page(json.loads(json.dumps(figures | dict(training=training([tmp_path])))), "python -m bundled.judge")
    assert "| 4 | 12.0 M | 2.000 | 2.0 min |" in text and "| **this model** | **2048.000** |" in text
    assert text.count("`make sample PROMPT") + text.count("`make chat`") == len(COMPLETED) + len(CONVERSATIONS) == 10
    assert all(kind in text for kind in KINDS) and "> **Model:** Thank you! and so on." in text
    assert "{" not in text.replace("`make", "")
