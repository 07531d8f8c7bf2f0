import math
from collections import Counter

import pytest

from bundled import questions, stories
from bundled.choices import HELD_OUT_ONE_IN, Choices, side
from bundled.plot import Plot
from tests.bundled.enumerate import every

MINI = Plot(
    "a test",
    {"thing1 thing2": "ball, kite", "sound/food": "Peep/seeds, Meow/milk"},
    """
{name} had [a|the] {color} {thing1}.

> "{sound}!" {Sub} had {food}.
> {Friend_full} had a {thing2}. {Day} {name} ate {food}.
""",
)


@pytest.fixture
def small_world(monkeypatch):
    """Few enough names, kinds and sentences to tell every story there is."""
    monkeypatch.setattr(stories, "PLOTS", (MINI,))
    monkeypatch.setattr(stories, "NAMES", {"she": ["Anna"], "he": ["Ben"]})
    monkeypatch.setattr(stories, "ALL_NAMES", ["Anna", "Ben"])
    monkeypatch.setattr(stories, "HOMES", {kind: stories.HOMES[kind] for kind in ("girl", "boy", "fox")})
    monkeypatch.setattr(stories, "COLORS", ["red", "blue"])
    monkeypatch.setattr(stories, "OPENINGS", (("[Once|Long ago] there was a {kind} named {name}.", ("Soon,",)),))
    monkeypatch.setattr(stories, "SCENES", ("", "{Pos} friend was {friend}."))
    monkeypatch.setattr(stories, "ENDINGS", ("", "{name} slept."))


def test_all_stories_of_a_small_world(small_world):
    """Their probabilities sum to one, none is told twice, and so the mean nats are the entropy."""
    told = list(every(stories.story))
    assert sum(probability for _, probability in told) == pytest.approx(1.0)
    assert all(math.exp(-story.nats) == pytest.approx(probability) for story, probability in told)
    assert len({story.text for story, _ in told}) == len(told) > 200
    entropy = -sum(probability * math.log(probability) for _, probability in told)
    drawn = [stories.story(Choices(number)) for number in range(1000)]
    assert sum(story.nats for story in drawn) / len(drawn) == pytest.approx(entropy, rel=0.02)
    assert {story.text for story in drawn} <= {story.text for story, _ in told}


@pytest.mark.parametrize("kind", ["calendar", "opposite", "sound", "own name"])
def test_probabilities_of_all_questions_sum_to_one(kind):
    assert sum(probability for _, probability in every(questions.KINDS[kind])) == pytest.approx(1.0)


def test_weights_are_frequencies_and_are_accounted_for():
    drawn, nats = Counter(), 0.0
    choices = Choices("weights")
    for _ in range(10_000):
        drawn[choices.weighted({"a": 1, "b": 3})] += 1
    nats = choices.nats / 10_000
    assert drawn["b"] / 10_000 == pytest.approx(3 / 4, abs=0.02)
    assert nats == pytest.approx(-math.log(1 / 4) / 4 - 3 * math.log(3 / 4) / 4, rel=0.03)


def test_several_are_different_and_cost_as_much_as_drawing_without_putting_back():
    choices = Choices(0)
    assert sorted(choices.several("abc", 3)) == ["a", "b", "c"]
    assert choices.nats == pytest.approx(math.log(3 * 2 * 1))


def test_same_seed_same_choices_whatever_the_interpreter():
    assert "".join(Choices("train", "story", 7).pick("abcdefgh") for _ in range(1)) == Choices("train/story/7").pick("abcdefgh")
    choices = Choices("fixed")
    assert [choices.pick(range(1000)) for _ in range(5)] == FIXED


def test_one_in_ten_is_held_out():
    held_out = sum(side(f"key {i}") == "held_out" for i in range(10_000))
    assert held_out / 10_000 == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.01)


FIXED = [936, 107, 538, 182, 991]
