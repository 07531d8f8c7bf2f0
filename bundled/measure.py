"""What the bundled model is held to: perplexity, right answers, names that stay, stories as they were asked for."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bundled.choices import Choices
from bundled.dialogues import messages, question_messages, story_request
from bundled.make_data import records
from bundled.ngram import NGram
from bundled.questions import KINDS, Question, question
from bundled.stories import ALL_NAMES, HOMES, NAMES, PRONOUNS, Story, story

BEGINNINGS = ("Once upon a time", "There was once", "One sunny morning", "Long ago")
MAX_ANSWER = 48  # tokens; the longest right answer is shorter
DRAWS_PER_QUESTION = 20  # a kind that has few questions has no more of them after so many draws each

Figures = dict[str, Any]


def held_out_stories(count: int) -> list[Story]:
    """Stories of seeds that no training text has; the text of make_data's held_out/stories.jsonl."""
    return [story(Choices("held_out", "story", number)) for number in range(count)]


def held_out_questions(kind: str, count: int) -> list[Question]:
    """Different questions on the held-out side; fewer where there are fewer."""
    drawn = (question(Choices("held_out", "question", kind, i), kind, "held_out") for i in range(DRAWS_PER_QUESTION * count))
    found: dict[str, Question] = {}
    for asked in drawn:
        found.setdefault(asked.key, asked)
        if len(found) == count:
            break
    return list(found.values())


def perplexities(llama: Any, count: int, ngram_stories: int) -> Figures:
    """Of held-out stories, per token, BOS given and EOS counted: the model's, n-gram models', and the choices' that made them.

    Args:
        llama: the model.
        count: held-out stories.
        ngram_stories: training stories that the n-gram models are made of.

    Returns:
        perplexity by "model", "3-gram", "5-gram" and "generator", and "stories", "tokens", "nats_per_story".
    """
    told = held_out_stories(count)

    def encoded(text: str) -> list[int]:
        return llama.tokenizer.encode(text, bos=True, eos=True)

    rows = [encoded(one.text) for one in told]
    tokens = sum(map(len, rows)) - count
    nats = sum(one.nats for one in told)
    loss = -sum(float(np.sum(llama.score(row).logprobs, dtype=np.float64)) for row in rows)
    found = {"model": math.exp(loss / tokens), "generator": math.exp(nats / tokens)}
    seen = [encoded(record["text"]) for record in records("train", "story", range(ngram_stories))]
    for order in (3, 5):
        found[f"{order}-gram"] = NGram(seen, order, llama.config.vocab_size).perplexity(rows)
    return dict(
        perplexity=found,
        stories=count,
        tokens=tokens,
        ngram_stories=ngram_stories,
        nats_per_story=dict(generator=nats / count, model=loss / count),
    )


def answers(llama: Any, per_kind: int) -> dict[str, Figures]:
    """Held-out questions asked in the chat format and answered greedily.

    Returns:
        by kind: asked, right, by guessing among the answers the question offers (None for numbers), and the first wrong answer.
    """
    asked = [one for kind in KINDS for one in held_out_questions(kind, per_kind)]
    replies = reply_all(llama, [question_messages(one) for one in asked], temperature=0.0, max_new_tokens=MAX_ANSWER)
    found = {}
    for kind in KINDS:
        mine = [(one, reply) for one, reply in zip(asked, replies, strict=True) if one.kind == kind]
        right = [one.is_right(reply) for one, reply in mine]
        wrong = [(one.text, one.answer, reply) for (one, reply), is_right in zip(mine, right, strict=True) if not is_right]
        options = [1 / (1 + len(one.others)) for one, _ in mine if one.others]
        found[kind] = dict(
            asked=len(mine),
            right=sum(right),
            by_guessing=sum(options) / len(mine) if options else None,
            a_wrong_one=wrong[0] if wrong else None,
        )
    return found


def names_kept(llama: Any, per_beginning: int) -> Figures:
    """How many stories, sampled as `make sample` does, keep to their names; and the names that heroes have."""
    texts = [done.text for done in llama.generate(BEGINNINGS, n=per_beginning, echo=True, max_new_tokens=0)]
    judged = [consistency(text) for text in texts]
    heroes = Counter(name for text in texts if (name := next(iter(people(text)), "")))
    return dict(
        sampled=len(texts),
        **{fault: sum(fault in faults for faults in judged) for fault in FAULTS},
        consistent=sum(not faults for faults in judged),
        different_heroes=len(heroes),
        different_texts=len(set(texts)),
    )


PEOPLE = frozenset(ALL_NAMES)
FAULTS = ("third name", "hero forgotten", "wrong pronoun", "changed kind")


def consistency(text: str) -> set[str]:
    """Which of FAULTS a story has: the generator's stories have none.

    Third name: more people than hero and friend. Hero forgotten: the first name comes up once only. Wrong pronoun: one that is
    not of the hero's gender, and only the hero has any. Changed kind: somebody is "the fox" here and "the bear" there.
    """
    named = people(text)
    if not named:
        return {"hero forgotten"}
    hero, faults = named[0], set()
    if len(set(named)) > 2:
        faults.add("third name")
    if named.count(hero) < 2:
        faults.add("hero forgotten")
    others = PRONOUNS["he" if hero in NAMES["she"] else "she"].values()
    if set(others) & set(re.findall(r"\w+", text.lower())):
        faults.add("wrong pronoun")
    kinds: dict[str, set[str]] = {}
    for name, kind in re.findall(rf"\b({'|'.join(ALL_NAMES)}) the ({'|'.join(HOMES)})\b", text):
        kinds.setdefault(name, set()).add(kind)
    if any(len(of_one) > 1 for of_one in kinds.values()):
        faults.add("changed kind")
    return faults


def people(text: str) -> list[str]:
    """Names of people, in order, every time they come up."""
    return [word for word in re.findall(r"[A-Z][a-z]+", text) if word in PEOPLE]


def requests_met(llama: Any, count: int) -> Figures:
    """How many stories asked for in the chat format are about what was asked for, and consistent."""
    wishes = []
    for number in range(count):
        choices = Choices("held_out", "request", number)
        wishes.append(story_request(choices, story(choices)))
    wishes = [(text, words) for text, words in wishes if words]
    replies = reply_all(llama, [messages([(text, "")])[:-1] for text, _ in wishes], max_new_tokens=0)
    met = [
        all(re.search(rf"\b{re.escape(w)}\b", reply) for w in words) for (_, words), reply in zip(wishes, replies, strict=True)
    ]
    consistent = [ok and not consistency(reply) for ok, reply in zip(met, replies, strict=True)]
    return dict(asked=len(wishes), met=sum(met), met_and_consistent=sum(consistent))


def reply_all(llama: Any, conversations: Sequence[Sequence[Mapping[str, str]]], **settings: Any) -> list[str]:
    """The model's answers to conversations, many at once: those of like length together."""
    prompts = [llama.encode_chat(one) for one in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [""] * len(prompts)
    for i, done in zip(order, llama.generate([prompts[i] for i in order], **settings), strict=True):
        replies[i] = done.text.strip()
    return replies
