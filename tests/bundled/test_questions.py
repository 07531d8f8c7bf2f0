import datetime
import re

import pytest

from bundled.choices import Choices, side
from bundled.measure import held_out_questions
from bundled.questions import COLORS, DAYS, KINDS, MONTHS, PLACES, THINGS, Question, question
from bundled.stories import ALL_NAMES, HOMES
from tests.bundled.enumerate import every

COUNT = 60


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Question]]:
    return {kind: [question(Choices("test", kind, i), kind, "train") for i in range(COUNT)] for kind in KINDS}


def last_sentence(text: str) -> str:
    return re.split(r"[.\n] ?", text)[-1]


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def found(text: str, options: list[str]) -> list[str]:
    """The options that occur in the text, in the order of the text."""
    return re.findall(rf"\b({'|'.join(sorted(options, key=len, reverse=True))})\b", text)


def test_sums_and_differences_are_right(asked):
    for one in asked["sum"]:
        a, b = numbers(one.text)
        assert int(one.answer) == a + b and one.reply == f"{a} + {b} = {a + b}."
    for one in asked["difference"]:
        a, b = numbers(one.text)
        a, b = (b, a) if one.text.startswith("Take") else (a, b)
        assert int(one.answer) == a - b >= 0 and one.reply == f"{a} - {b} = {a - b}."


def test_comparisons_and_neighbours_of_numbers_are_right(asked):
    for one in asked["comparison"]:
        assert int(one.answer) == (min if "smaller" in one.text else max)(numbers(one.text))
    for one in asked["next number"]:
        (number,) = numbers(one.text)
        assert int(one.answer) == number + (1 if "after" in one.text else -1)


@pytest.mark.parametrize("kind", ["owner", "thing", "color"])
def test_belongings_are_looked_up_rightly(asked, kind):
    fact = re.compile(rf"({'|'.join(ALL_NAMES)}) has an? ({'|'.join(COLORS)}) ({'|'.join(THINGS)})\.")
    for one in asked[kind]:
        facts, words = fact.findall(one.text), re.findall(r"\w+", last_sentence(one.text))
        column = {"owner": 0, "thing": 2, "color": 1}[kind]
        right = [line[column] for line in facts if line[2 if kind != "thing" else 0] in words]
        assert right == [one.answer], one.text
        assert {line[column] for line in facts} == {one.answer, *one.others}


def test_places_are_looked_up_rightly(asked):
    for one in asked["place"]:
        facts = dict(re.findall(rf"The (\w+) is ({'|'.join(PLACES)})\.", one.text))
        (thing,) = found(last_sentence(one.text), THINGS)
        assert facts[thing] == one.answer and set(facts.values()) == {one.answer, *one.others}


def test_who_has_it_after_a_gift(asked):
    for one in asked["gift"]:
        owners = {thing: name for name, thing in re.findall(r"(\w+) has an? (\w+)\.", one.text)}
        ((giver, given, taker),) = re.findall(r"(\w+) gives the (\w+) to (\w+)\.", one.text)
        assert owners[given] == giver
        (thing,) = found(last_sentence(one.text), THINGS)
        assert (owners | {given: taker})[thing] == one.answer


def test_lists_are_counted_and_repeated_rightly(asked):
    for one in asked["count"]:
        assert int(one.answer) == len(found(one.text.split(":")[1], THINGS))
    for one in asked["position"]:
        listed = found(one.text.split(":")[1], THINGS)
        (word,) = re.findall("first|second|last", one.text)
        assert one.answer == listed[{"first": 0, "second": 1, "last": -1}[word]]
    for one in asked["repetition"]:
        assert one.reply == one.text.split(": ")[1] == f"{one.answer}."


def test_days_and_months_are_in_order(asked):
    for one in asked["calendar"]:
        names = DAYS if found(one.text, DAYS) else MONTHS
        (name,) = found(one.text, names)
        if names is MONTHS:
            assert [datetime.date(2000, m, 1).strftime("%B") for m in range(1, 13)] == MONTHS
        step = 1 if "after" in one.text else -1
        assert one.answer == names[(names.index(name) + step) % len(names)]


def test_a_name_given_by_the_system_prompt_is_the_answer(asked):
    for one in asked["own name"]:
        assert found(one.system, ALL_NAMES) == [one.answer]


def test_answers_about_stories_are_in_the_stories(asked):
    for one in asked["story"]:
        told, text = one.text.rsplit("\n", 1)
        people = list(dict.fromkeys(found(told, ALL_NAMES)))
        if "friend" in text:
            assert one.answer == people[1]
        elif "hero" in text or "about" in text:
            assert one.answer == people[0]
        elif "color" in text:
            assert f"{one.answer} {text.removesuffix('?').split()[-1]}" in told
        else:
            assert one.answer in HOMES and re.search(rf"\b{one.answer}\b", told)


def test_the_reply_to_learn_is_right_and_other_answers_are_not(asked):
    for one in (one for ones in asked.values() for one in ones):
        assert one.is_right(one.reply), one
        assert not one.is_right("I do not know.")
        for other in one.others[:2]:
            assert not one.is_right(f"It is {other}.") and not one.is_right(f"{one.answer} or {other}")
        if one.answer.isdigit():
            assert not one.is_right(f"{int(one.answer) + 1}") and one.is_right(f"12 and that makes {one.answer}.")


def test_no_held_out_question_is_on_the_training_side(asked):
    for kind, ones in asked.items():
        held_out = held_out_questions(kind, 30)
        assert len({one.key for one in held_out}) == len(held_out) >= 5
        assert all(side(one.key) == "held_out" for one in held_out) and all(side(one.key) == "train" for one in ones)
        assert not {(one.system, one.text) for one in held_out} & {(one.system, one.text) for one in ones}


def test_a_sum_is_held_out_in_every_wording_and_order():
    for one in held_out_questions("sum", 30):
        a, b = sorted(numbers(one.text))
        assert one.key == f"sum: {a} + {b}"


@pytest.mark.parametrize("kind", ["calendar", "opposite", "sound"])
def test_what_is_known_by_heart_is_in_training_in_other_words(kind):
    facts = {"train": set(), "held_out": set()}
    for one, _ in every(KINDS[kind]):
        facts[side(f"{kind}: {one.text}")].add(one.reply)
    assert facts["held_out"] and facts["held_out"] <= facts["train"]
