"""Answers of generate_until: stop strings, sampling, room, and that sharing and batching change nothing."""

import pytest

from llama_jax.errors import LlamaError
from llama_jax.evaluation.answering import SHARED, answers, settings_of
from tests.generation.make import ONE_LAYER, full_logits, ids, llama_of, tokenizer_of

GREEDY = {"until": [], "max_gen_toks": 6}


def greedy(prompt: list[int], steps: int = 6) -> str:
    """The likeliest tokens as text, by one forward pass over everything for each."""
    tokens = list(prompt)
    for _ in range(steps):
        token = int(full_logits(tokens, ONE_LAYER)[-1].argmax())
        if token == tokenizer_of().eos_id:
            break
        tokens.append(token)
    return tokenizer_of().decode(tokens[len(prompt) :], continued=True)


def test_answers_are_those_of_each_prompt_alone_whatever_is_shared():
    llama = llama_of(ONE_LAYER)
    shots = ids(SHARED + 6, 1)
    prompts = [[*shots, *ids(3, 2)], ids(9, 3), [*shots, *ids(8, 4)], ids(12, 5)]
    expected = [greedy(prompt) for prompt in prompts]
    assert len(set(expected)) > 1
    assert answers(llama, [(prompt, GREEDY) for prompt in prompts], 2) == expected


def test_an_answer_ends_before_its_first_stop_string():
    llama = llama_of(ONE_LAYER)
    whole = greedy(ids(9, 3))
    stop = whole[len(whole) // 2 :][:2]
    found = answers(llama, [(ids(9, 3), {**GREEDY, "until": ["never", stop]}), (ids(9, 3), {**GREEDY, "until": stop})], 2)
    assert stop in whole and found == [whole[: whole.index(stop)]] * 2


def test_the_text_of_a_control_token_stops_by_its_id():
    settings = settings_of(llama_of(ONE_LAYER), {"until": ["</s>", "Q:"]}, 10)
    assert settings.stop == ("Q:",) and settings.stop_ids == [2] and settings.max_new_tokens == 10


@pytest.mark.parametrize(
    ("arguments", "temperature", "top_p"),
    [
        ({}, 0, 0.9),
        ({"temperature": 0.0, "do_sample": False}, 0, 0.9),
        ({"temperature": 0.7, "do_sample": False}, 0, 0.9),  # the harness's rule
        ({"temperature": 0.7}, 0.7, 1.0),
        ({"do_sample": True, "top_p": 0.5}, 1.0, 0.5),
    ],
)
def test_decoding_is_greedy_unless_sampling_is_asked_for(arguments, temperature, top_p):
    settings = settings_of(llama_of(ONE_LAYER), arguments, 10)
    assert (settings.temperature, settings.top_p) == (temperature, top_p)


def test_a_repeated_prompt_gets_samples_of_its_own_that_the_next_run_gets_again():
    llama = llama_of(ONE_LAYER)
    requests = [(ids(9, 3), {"temperature": 1.0, "max_gen_toks": 6})] * 4
    first = answers(llama, requests, 2)
    assert len(set(first)) > 1
    assert answers(llama, requests, 2) == first


def test_a_prompt_that_leaves_no_room_loses_its_beginning():
    llama = llama_of(ONE_LAYER, max_length=16)
    prompt = ids(60, 7)
    assert answers(llama, [(prompt, GREEDY)], 1) == [greedy(prompt[-10:])]


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(LlamaError, match="num_beams are not known; known: until"):
        answers(llama_of(ONE_LAYER), [(ids(5), {"num_beams": 4})], 4)
    with pytest.raises(LlamaError, match="no room is left for a prompt"):
        answers(llama_of(ONE_LAYER), [(ids(5), {"max_gen_toks": 128})], 4)
