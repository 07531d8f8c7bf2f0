"""Questions whose answers can be checked: sums, comparisons, facts looked up in the question, and a few known by heart.

A question belongs to the training or the held-out side by its content alone (`choices.side` of its key), so that no seed can
bring a held-out one into training. Sums have their operands as key: 3 + 5 and 5 + 3 are one question in any words. What is
known by heart (days, opposites) has the wording as key: the fact was read in training, in other words.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from bundled.choices import Choices, Split, side
from bundled.stories import ALL_NAMES, COLORS, HOMES, NAMES, Story, story

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
OPPOSITES = [
    pair.split("/")
    for pair in (
        "hot/cold big/small day/night up/down happy/sad fast/slow old/young full/empty open/closed left/right wet/dry "
        "hard/soft long/short dark/bright loud/quiet early/late clean/dirty good/bad heavy/light high/low"
    ).split()
]
SOUNDS = {
    "cow": "moo", "cat": "meow", "dog": "woof", "duck": "quack", "sheep": "baa", "bird": "tweet", "pig": "oink", "owl": "hoo",
    "horse": "neigh", "mouse": "squeak", "frog": "croak", "bee": "buzz",
}  # fmt: skip
THINGS = (
    "ball kite drum boat doll train hat bell scarf book whistle wagon spoon candle basket pillow mirror ribbon cup lamp chair "
    "flute box coat clock sled bucket balloon stone key"
).split()
PLACES = (
    "under the bed, in the garden, behind the door, near the well, in the tall grass, beside the gate, behind the barn, inside "
    "the basket, on the table, by the mailbox, under the bridge, on the roof, in the kitchen, on the shelf"
).split(", ")
LARGEST = 49  # operand of a sum
LARGEST_COMPARED = 99


class Question(NamedTuple):
    """What a user asks and what is right.

    Attributes:
        kind: a key of KINDS.
        text: the question, with whatever has to be looked up.
        answer: the word or number that decides.
        reply: the sentence to learn; it holds the answer and none of the others.
        others: the wrong answers that a reader of the question might give; empty for numbers.
        key: what is held out.
        system: a system prompt that holds the answer, "" for none.
    """

    kind: str
    text: str
    answer: str
    reply: str
    others: tuple[str, ...] = ()
    key: str = ""
    system: str = ""

    def is_right(self, reply: str) -> bool:
        """The answer is said and none of the others; among numbers, the last one counts."""
        if self.answer.isdigit():
            return re.findall(r"\d+", reply)[-1:] == [self.answer]
        return [w for w in (self.answer, *self.others) if re.search(rf"\b{re.escape(w)}\b", reply, re.I)] == [self.answer]


def question(choices: Choices, kind: str, split: Split) -> Question:
    """A question of this kind on this side of the split; drawn again until it is."""
    while True:
        drawn = KINDS[kind](choices)._replace(kind=kind)
        drawn = drawn._replace(key=f"{kind}: {drawn.key or drawn.text}")
        if side(drawn.key) == split:
            return drawn


def _sum(choices: Choices) -> Question:
    a, b = choices.pick(range(LARGEST + 1)), choices.pick(range(LARGEST + 1))
    text = worded(
        choices, "What is {a} + {b}?|How much is {a} + {b}?|{a} + {b} = ?|What is {a} plus {b}?|Add {a} and {b}.", a=a, b=b
    )
    return Question("", text, str(a + b), f"{a} + {b} = {a + b}.", key=f"{min(a, b)} + {max(a, b)}")


def _difference(choices: Choices) -> Question:
    a, b = sorted((choices.pick(range(LARGEST_COMPARED + 1)), choices.pick(range(LARGEST + 1))), reverse=True)
    text = worded(
        choices,
        "What is {a} - {b}?|How much is {a} - {b}?|{a} - {b} = ?|What is {a} minus {b}?|Take {b} away from {a}.",
        a=a,
        b=b,
    )
    return Question("", text, str(a - b), f"{a} - {b} = {a - b}.", key=f"{a} - {b}")


def _comparison(choices: Choices) -> Question:
    a, b = choices.several(range(LARGEST_COMPARED + 1), 2)
    word, pick = choices.pick((("bigger", max), ("larger", max), ("smaller", min)))
    wordings = "Which is {word}, {a} or {b}?|Which number is {word}: {a} or {b}?|What is {word}, {a} or {b}?"
    text = worded(choices, wordings, word=word, a=a, b=b)
    return Question("", text, str(pick(a, b)), f"{pick(a, b)} is {word}.", key=f"{min(a, b)} {max(a, b)}")


def _next_number(choices: Choices) -> Question:
    a = choices.pick(range(1, LARGEST_COMPARED))
    word, step = choices.pick((("after", 1), ("before", -1)))
    text = worded(
        choices, "What number comes {word} {a}?|Which number comes right {word} {a}?|What comes {word} {a}?", a=a, word=word
    )
    return Question("", text, str(a + step), f"The answer is {a + step}.", key=f"{word} {a}")


def _owner(choices: Choices) -> Question:
    people, things, colors, facts = _belongings(choices)
    i = choices.pick(range(len(people)))
    text = worded(choices, "Who has the {thing}?|Who has the {color} {thing}?", thing=things[i], color=colors[i])
    return Question("", f"{facts} {text}", people[i], f"{people[i]} has the {things[i]}.", _but(people, i))


def _thing(choices: Choices) -> Question:
    people, things, colors, facts = _belongings(choices)
    i = choices.pick(range(len(people)))
    text = worded(choices, "What does {name} have?|What is it that {name} has?", name=people[i])
    return Question("", f"{facts} {text}", things[i], f"{people[i]} has a {colors[i]} {things[i]}.", _but(things, i))


def _color(choices: Choices) -> Question:
    people, things, colors, facts = _belongings(choices)
    i = choices.pick(range(len(people)))
    text = worded(choices, "What color is the {thing}?|Which color does the {thing} have?", thing=things[i])
    return Question("", f"{facts} {text}", colors[i], f"The {things[i]} is {colors[i]}.", _but(colors, i))


def _belongings(choices: Choices) -> tuple[list[str], list[str], list[str], str]:
    """Two to four people, what each has, its color, and the sentences that say so."""
    count = choices.pick((2, 3, 4))
    people, things, colors = (choices.several(options, count) for options in (ALL_NAMES, THINGS, COLORS))
    facts = [f"{p} has a {c} {t}." for p, t, c in zip(people, things, colors, strict=True)]
    return people, things, colors, with_articles(" ".join(facts))


def _place(choices: Choices) -> Question:
    count = choices.pick((2, 3, 4))
    things, places = choices.several(THINGS, count), choices.several(PLACES, count)
    facts = " ".join(f"The {t} is {p}." for t, p in zip(things, places, strict=True))
    i = choices.pick(range(count))
    text = worded(choices, "Where is the {thing}?|Where can I find the {thing}?", thing=things[i])
    return Question("", f"{facts} {text}", places[i], f"The {things[i]} is {places[i]}.", _but(places, i))


def _gift(choices: Choices) -> Question:
    """Two have a thing, one gives it to a third: who has it now?"""
    first, second, third = choices.several(ALL_NAMES, 3)
    thing, other = choices.several(THINGS, 2)
    facts = f"{first} has a {thing}. {second} has a {other}. {first} gives the {thing} to {third}."
    owner, asked = choices.pick(((third, thing), (second, other)))
    text = worded(choices, "Who has the {thing} now?|Who has the {thing} in the end?", thing=asked)
    others = tuple(name for name in (first, second, third) if name != owner)
    return Question("", with_articles(f"{facts} {text}"), owner, f"{owner} has the {asked}.", others)


def _count(choices: Choices) -> Question:
    things = choices.several(THINGS, choices.pick(range(2, 8)))
    text = worded(choices, "How many things are in this list: {list}?|Count these things: {list}.", list=", ".join(things))
    return Question("", text, str(len(things)), f"There are {len(things)} things.")


def _position(choices: Choices) -> Question:
    things = choices.several(THINGS, choices.pick(range(3, 6)))
    word, i = choices.pick((("first", 0), ("second", 1), ("last", len(things) - 1)))
    text = worded(
        choices,
        "Which word is {word} in this list: {list}?|What is the {word} word of: {list}?",
        word=word,
        list=", ".join(things),
    )
    return Question("", text, things[i], f"The {word} word is {things[i]}.", _but(things, i))


def _repetition(choices: Choices) -> Question:
    words = choices.several(THINGS, choices.pick((2, 3, 4)))
    text = worded(choices, "Please repeat: {list}.|Say this after me: {list}.", list=" ".join(words))
    return Question("", text, " ".join(words), " ".join(words) + ".")


def _calendar(choices: Choices) -> Question:
    noun, names = choices.pick((("day", DAYS), ("month", MONTHS)))
    i = choices.pick(range(len(names)))
    word, step = choices.pick((("after", 1), ("before", -1)))
    wordings = (
        "What {noun} comes {word} {name}?|Which {noun} comes {word} {name}?|What {noun} is {word} {name}?|Which {noun} is "
        "{word} {name}?|What comes {word} {name}?|Which {noun} comes right {word} {name}?|Tell me the {noun} {word} {name}."
    )
    text = worded(choices, wordings, noun=noun, word=word, name=names[i])
    answer = names[(i + step) % len(names)]
    others = tuple(name for name in names if name not in (answer, names[i]))
    return Question("", text, answer, f"{answer} comes {word} {names[i]}.", others)


def _opposite(choices: Choices) -> Question:
    pair = choices.several(choices.pick(OPPOSITES), 2)
    wordings = (
        "What is the opposite of {word}?|Tell me the opposite of {word}.|What is the contrary of {word}?|Which word means the "
        "opposite of {word}?|If it is not {word}, what is it?|What is not {word} at all?"
    )
    others = tuple(word for words in OPPOSITES for word in words if word not in pair)
    return Question("", worded(choices, wordings, word=pair[0]), pair[1], f"The opposite of {pair[0]} is {pair[1]}.", others)


def _sound(choices: Choices) -> Question:
    animal = choices.pick(list(SOUNDS))
    wordings = (
        "What does [a|the] {animal} say?|What sound does [a|the] {animal} make?|How does [a|the] {animal} go?|Tell me what "
        "[a|the] {animal} says.|Which sound comes from [a|the] {animal}?"
    )
    others = tuple(sound for name, sound in SOUNDS.items() if name != animal)
    text = with_articles(worded(choices, wordings, animal=animal))
    return Question("", text, SOUNDS[animal], with_articles(f"A {animal} says {SOUNDS[animal]}."), others)


def _own_name(choices: Choices) -> Question:
    name = choices.pick(ALL_NAMES)
    system = worded(choices, "Your name is {name}.|You are called {name}.|You are {name}, a friendly storyteller.", name=name)
    text = choices.pick(("What is your name?", "Who are you?", "What are you called?", "Tell me your name."))
    others = tuple(other for other in ALL_NAMES if other != name)
    return Question("", text, name, f"My name is {name}.", others, f"{system} {text}", system)


def _story(choices: Choices) -> Question:
    told = story(choices)
    asked = choices.pick(story_questions(told))
    return asked._replace(text=f"{told.text}\n{asked.text}")


def story_questions(told: Story) -> list[Question]:
    """What can be asked about a story, without the story."""
    name, friend, facts = told.facts["name"], told.facts.get("friend"), told.facts
    hero = "girl" if name in NAMES["she"] else "boy"
    found = []
    if friend:
        found.append(Question("story", f"Who is the friend of {name}?", friend, f"It is {friend}.", (name,)))
        reply = f"The story is about {name}."
        found.append(Question("story", "Who is the story about?", name, reply, (friend,)))
        found.append(Question("story", "What is the name of the hero?", name, f"The name of the hero is {name}.", (friend,)))
    kind = facts.get("kind")
    if kind and kind != hero and f" {kind}" in told.text:
        others = tuple(other for other in HOMES if other != kind)
        found.append(Question("story", f"What kind of animal is {name}?", kind, f"{name} is a {kind}.", others))
    color, thing = facts.get("color"), facts.get("thing", facts.get("gift", facts.get("tool")))
    if color and thing and f" {color} {thing}" in told.text:
        others = tuple(other for other in COLORS if other != color)
        found.append(Question("story", f"What color is the {thing}?", color, f"The {thing} is {color}.", others))
    return [asked._replace(reply=with_articles(asked.reply)) for asked in found]


def worded(choices: Choices, wordings: str, **fields: object) -> str:
    """One of the wordings, separated by "|" outside brackets, with [a|b] drawn and fields filled in."""
    drawn = choices.pick(re.split(r"\|(?![^\[]*\])", wordings))
    return re.sub(r"\[([^\[\]]*)\]", lambda match: choices.pick(match[1].split("|")), drawn).format_map(fields)


def with_articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _but(options: list[str], i: int) -> tuple[str, ...]:
    return tuple(options[:i] + options[i + 1 :])


KINDS: dict[str, Callable[[Choices], Question]] = {
    "sum": _sum,
    "difference": _difference,
    "comparison": _comparison,
    "next number": _next_number,
    "owner": _owner,
    "thing": _thing,
    "color": _color,
    "place": _place,
    "gift": _gift,
    "count": _count,
    "position": _position,
    "repetition": _repetition,
    "calendar": _calendar,
    "opposite": _opposite,
    "sound": _sound,
    "own name": _own_name,
    "story": _story,
}
