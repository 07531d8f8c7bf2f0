"""infer.bench with a draft: what guessing gains on plain and on repetitive text."""

import json

import pytest

import llama_jax
from configs.bench import get_config
from infer.guesses import measure_guesses
from llama_jax.errors import LlamaError


def config(**changes):
    c = get_config()
    c.update(draft="lookup", prompt_length=96, steps=33)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def llama():
    return llama_jax.load("bundled/checkpoint", dtype="float32", draft="lookup", draft_tokens=3)


def test_a_line_of_each_text_says_what_guesses_gain(llama):
    plain, repetitive = lines = list(measure_guesses(llama, config()))
    for line in lines:
        assert json.loads(json.dumps(line)) == line
        assert (line["prompt_length"], line["draft"], line["draft_tokens"]) == (96, "lookup", 3)
        assert 1 <= line["tokens_per_step"] <= 4
        assert line["speed_up"] == pytest.approx(line["tokens_per_second"] / line["plain_tokens_per_second"])
    assert (plain["text"], repetitive["text"]) == ("plain", "repetitive")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"repetition_penalty": 1.1}}, "with penalties nothing is guessed"),
        ({"prompt_length": 5000}, "5,?000"),
    ],
)
def test_what_cannot_be_measured_is_refused(llama, changes, words):
    with pytest.raises(LlamaError, match=words):
        next(measure_guesses(llama, config(**changes)))
