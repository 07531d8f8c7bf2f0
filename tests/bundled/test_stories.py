import hashlib
import random
import re

import pytest

from bundled.stories import HOMES, MAX_WORDS, MIN_WORDS, NAMES, stories, story

COUNT = 3000
ALL_NAMES = NAMES["she"] + NAMES["he"]
PRONOUNS = {"she": {"she", "her", "hers", "herself"}, "he": {"he", "him", "his", "himself"}}


@pytest.fixture(scope="module")
def told() -> list[str]:
    return list(stories(COUNT, seed=0))


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def hero(text: str) -> str:
    """The first name; a friend is never named before the hero."""
    return next(word for word in words(text) if word in ALL_NAMES)


def test_same_seed_same_stories():
    digest = hashlib.sha256("\n\n".join(stories(100, seed=7)).encode()).hexdigest()
    assert digest == "180ec42c837adfea824b1d7c2bf419024989d19bb136673f4b29ed542af7a555", (
        "the bundled model was trained on other stories: retrain it, then record this hash"
    )
    assert story(random.Random(7)) == next(stories(1, seed=7))


def test_other_seed_other_stories(told):
    assert not set(told) & set(stories(COUNT, seed=1))


def test_stories_hardly_ever_repeat(told):
    assert len(set(told)) >= 0.999 * COUNT


def test_vocabulary_is_that_of_a_small_child(told):
    assert 500 < len({word.lower() for text in told for word in words(text)}) < 1200


def test_length_is_within_bounds(told):
    assert all(MIN_WORDS <= len(text.split()) <= MAX_WORDS for text in told)


def test_only_the_hero_has_pronouns(told):
    for text in told:
        other = PRONOUNS["he" if hero(text) in NAMES["she"] else "she"]
        assert not other & {word.lower() for word in words(text)}, text


def test_only_hero_and_friend_are_named_and_the_hero_throughout(told):
    for text in told:
        named = [word for word in words(text) if word in ALL_NAMES]
        assert len(set(named)) == 2 and named.count(hero(text)) >= 2, text


def test_nobody_changes_kind(told):
    for text in told:
        for name in set(words(text)) & set(ALL_NAMES):
            assert len(set(re.findall(rf"{name} the ({'|'.join(HOMES)})\b", text))) <= 1, text


def test_text_is_clean_ascii(told):
    unfilled = r"[\[\]{}|<>_/]"
    spacing = r"  | \n|\n |\n\n| [,.!?]"
    article = r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]"
    for text in told:
        assert text.isascii() and not re.search(f"{unfilled}|{spacing}|{article}", text), text


def test_every_paragraph_ends_a_sentence_and_closes_its_quotes(told):
    for text in told:
        for paragraph in text.split("\n"):
            assert paragraph[0].isupper() or paragraph[0] == '"', text
            assert re.search(r'[.!?]"?$', paragraph), text
            assert paragraph.count('"') % 2 == 0, text
