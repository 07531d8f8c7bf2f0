"""Stop strings and the record of an answer: host code, no model."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from llama_jax.generation.answer import Answer, StopStrings
from llama_jax.generation.request import Row, Settings
from llama_jax.generation.state import Output
from tests.generation.make import tokenizer_of

TEXTS = st.text("ab\né", max_size=20)
STOPS = st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3)


def cut(text: str, points: list[int]) -> list[str]:
    borders = [0, *sorted(min(point, len(text)) for point in points), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def pushed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    strings = StopStrings(stops)
    out = [strings.push(piece) for piece in pieces]
    return [*out, strings.finish()], strings.stopped


def before_first(text: str, stops: list[str]) -> str:
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


@given(TEXTS, st.text("ab\né", min_size=1, max_size=4), st.lists(st.integers(0, 20), max_size=8))
def test_one_stop_string_cuts_the_text_before_it_wherever_pieces_end(text, stop, points):
    pieces, stopped = pushed([stop], cut(text, points))
    assert "".join(pieces) == before_first(text, [stop])
    assert stopped == (stop in text)


@given(TEXTS, STOPS, st.lists(st.integers(0, 20), max_size=8))
@example("abc", ["abc", "b"], [2])
def test_where_pieces_end_changes_nothing(text, stops, points):
    pieces, stopped = pushed(stops, cut(text, points))
    whole, whole_stopped = pushed(stops, [text])
    assert ("".join(pieces), stopped) == ("".join(whole), whole_stopped)


@given(TEXTS, STOPS, st.lists(st.integers(0, 20), max_size=8))
def test_no_stop_string_is_ever_shown(text, stops, points):
    pieces, stopped = pushed(stops, cut(text, points))
    shown = "".join(pieces)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or shown == text


@given(TEXTS, STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    strings = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += strings.push(character)
        if strings.stopped:
            return
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_follows_a_stop():
    strings = StopStrings(["."])
    assert strings.push("one. two") == "one"
    assert strings.stopped
    assert strings.push(" three") == strings.finish() == ""


def answer_of(settings: Settings, stop_ids: tuple[int, ...] = ()) -> Answer:
    return Answer(Row([5, 6], settings, stop_ids), tokenizer_of(), continued=True)


def output_of(tokens: list[int], top: int = 0) -> Output:
    n = len(tokens)
    ids = np.arange(n * top, dtype=np.int32).reshape(1, n, top)
    return Output(np.array([tokens], np.int32), -np.arange(n, dtype=np.float32)[None], ids, -ids.astype(np.float32))


def test_a_character_of_several_tokens_appears_when_it_is_whole():
    tokens = [3 + byte for byte in "日x".encode()]
    answer = answer_of(Settings(max_new_tokens=4))
    assert [answer.push(output_of([token]), 0) for token in tokens] == ["", "", "日", "x"]
    assert answer.completion().text == "日x"
    assert answer.finish_reason == "length"


def test_half_a_character_at_the_end_becomes_a_replacement_character():
    answer = answer_of(Settings(max_new_tokens=2))
    assert answer.push(output_of([3 + byte for byte in "日".encode()[:2]]), 0) == answer.completion().text
    assert set(answer.completion().text) == {"�"}


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it():
    answer = answer_of(Settings(max_new_tokens=10), stop_ids=(2,))
    answer.push(output_of([3 + ord("a"), 2, 3 + ord("b")]), 0)
    assert answer.completion().tokens == [3 + ord("a")]
    assert (answer.completion().text, answer.finish_reason) == ("a", "stop")


def test_the_start_of_a_stop_string_that_never_came_is_text():
    answer = answer_of(Settings(max_new_tokens=3, stop=["abc"]))
    assert answer.push(output_of([3 + ord(c) for c in "xa"]), 0) == "x"
    assert answer.push(output_of([3 + ord("b")]), 0) == "ab"
    assert (answer.completion().text, answer.finish_reason) == ("xab", "length")


def test_a_stop_string_completed_by_the_last_token_is_a_stop():
    answer = answer_of(Settings(max_new_tokens=2, stop=["ab"]))
    answer.push(output_of([3 + ord(c) for c in "ab"]), 0)
    assert (answer.completion().text, answer.finish_reason) == ("", "stop")


@pytest.mark.parametrize("logprobs", [-1, 0, 2])
def test_alternatives_are_as_many_as_were_asked_for(logprobs):
    answer = answer_of(Settings(max_new_tokens=3, logprobs=logprobs))
    answer.push(output_of([40, 41, 42], top=20), 0)
    completion = answer.completion()
    if logprobs < 0:
        assert completion.logprobs is None and completion.top_logprobs is None
    else:
        assert completion.logprobs == [0.0, -1.0, -2.0]
        assert [len(top) for top in completion.top_logprobs] == [logprobs] * 3


def test_without_a_tokenizer_there_are_tokens_only():
    answer = Answer(Row([5], Settings(max_new_tokens=2), ()), None, continued=False)
    assert answer.push(output_of([7, 8]), 0) == ""
    assert (answer.completion().text, answer.completion().tokens) == ("", [7, 8])
