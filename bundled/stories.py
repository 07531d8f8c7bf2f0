"""Short stories for children that this repository writes itself: the text on which the bundled model is trained.

A story is one plot (`plots.py`) told about one cast. Everything that a reader should be able to follow is drawn once, before
the telling: the hero's name, kind and pronouns, the friend, the thing and its color, the places. A model that keeps them
straight to the last line has learnt to read back, which is what makes these stories worth training on. Pronouns of the third
person are the hero's alone; everybody else is called by name.

Templates are plain text: `{field}` is a drawn word (`{Field}` with a capital), `[one|another]` an
alternative drawn on the spot.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence

from bundled.plots import PLOTS

PRONOUNS = {"she": dict(sub="she", obj="her", pos="her"), "he": dict(sub="he", obj="him", pos="his")}
NAMES = {
    "she": "Anna Bella Clara Daisy Ella Flora Grace Hazel Ida Julia Kate Lily Mia Nora Olive Pearl Rosa Sara Tess".split(),
    "he": "Adam Ben Carl David Eddie Felix George Henry Ivan Jack Kai Leo Max Noah Oscar Paul Ralph Sam Tom".split(),
}
HOMES = {
    "girl": "a small house", "boy": "a small house", "rabbit": "a warm burrow", "bear": "a deep cave", "fox": "a cozy den",
    "mouse": "a tiny hole", "cat": "a quiet barn", "dog": "a wooden hut", "duck": "a soft nest", "frog": "a cool pond",
    "squirrel": "a hollow tree", "hedgehog": "a pile of leaves",
}  # fmt: skip
TRAITS = "kind brave curious cheerful gentle clever quiet lively friendly careful".split()
COLORS = "red blue green yellow orange purple white golden silver brown".split()
NEAR = "river forest hill lake sea meadow village mill".split()
FAMILY = "mother father grandmother grandfather aunt uncle".split()
MIN_WORDS, MAX_WORDS = 60, 140

_DAYS = ("One day,", "One morning,", "One afternoon,", "One windy day,", "Then one day,", "On a bright day,")
_LATER = ("Soon after,", "After breakfast,", "A little later,", "Before lunch,")

# Opening and the ways to say when the trouble starts.
OPENINGS = (
    ("Once upon a time, there was a {trait} {kind} named {name}. {Sub} lived in {home} [near|by] the {near}.", _DAYS),
    ("Once upon a time, a {trait} {kind} [named|called] {name} lived in {home}.", _DAYS),
    ("There was once a little {kind} named {name}. {name} was very {trait}.", _DAYS),
    ("There was once a {trait} {kind} who lived near the {near}. {Pos} name was {name}.", _DAYS),
    ("In {home} by the {near} lived a {trait} {kind}. {Pos} name was {name}.", _DAYS),
    ("Long ago, near a {near}, there lived a {trait} little {kind} [named|called] {name}.", _DAYS),
    ("{name} was a {trait} {kind} who lived [by|near] the {near}.", _DAYS),
    ("This is the story of {name}, a {trait} {kind} from the {near}.", _DAYS),
    ("One sunny morning, a {trait} {kind} named {name} [woke up|got up] early.", _LATER),
    ("One [warm|cool|bright] morning, {name_full} [looked out at|walked to] the {near}.", _LATER),
    ("It was a [quiet|lovely|warm] morning. {name}, a {trait} {kind}, was [very happy|full of plans].", _LATER),
)

SCENES = (
    "",
    "",
    "{Pos} best friend was {friend_full}.",
    "{name} [liked|loved] to [sing|dance|draw|read|run|dig] [in the sun|all day long].",
    "Every day {sub} [played|walked] with {pos} friend {friend}.",
    "{Sub} [liked|loved] [soup|pie|jam|bread|honey], songs and [stories|games].",
)

ENDINGS = (
    "",
    "> From that day on, {name} and {friend} stayed the best of friends.",
    "> That night, {name} fell asleep with a smile.",
    "> {name} and {friend} [laughed|played|sang] until the sun went down.",
    "> It was the best day of the [year|week|summer], and {name} never forgot it.",
    "> {name} told everyone at home the whole story that evening.",
    "> Then the {trait} {kind} went home for [supper|soup and bread], tired but happy.",
)


def story(rng: random.Random) -> str:
    """One story of MIN_WORDS to MAX_WORDS words: ASCII, paragraphs separated by one newline, none at the end."""
    while True:
        text = _tell(rng)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text


def stories(count: int, seed: int) -> Iterator[str]:
    """`count` stories; the same for the same seed on every Python (only `choice` is drawn from, stable since 3.2)."""
    rng = random.Random(seed)
    for _ in range(count):
        yield story(rng)


def _tell(rng: random.Random) -> str:
    plot = rng.choice(PLOTS)
    opening, days = rng.choice(OPENINGS)
    fields = _cast(rng) | _draw(rng, plot.slots)
    fields |= {name.capitalize(): value[:1].upper() + value[1:] for name, value in fields.items()} | {"Day": rng.choice(days)}
    beats = [opening, rng.choice(SCENES), *(rng.choice(beat) for beat in plot.beats), rng.choice(ENDINGS)]
    text = " ".join(_expand(rng, beat, fields) for beat in beats if beat)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.replace(" > ", "\n"))


def _cast(rng: random.Random) -> dict[str, str]:
    """Hero, friend (another name and another kind), and the words that describe them."""
    kinds = _distinct(rng, list(HOMES), 2)
    people = []
    for kind in kinds:
        gender = {"girl": "she", "boy": "he"}.get(kind) or rng.choice(("she", "he"))
        people.append((rng.choice([n for n in NAMES[gender] if n not in (name for name, _ in people)]), gender))
    (name, gender), (friend, _) = people
    return PRONOUNS[gender] | dict(
        name=name,
        name_full=_full_name(name, kinds[0]),
        kind=kinds[0],
        home=HOMES[kinds[0]],
        trait=rng.choice(TRAITS),
        near=rng.choice(NEAR),
        friend=friend,
        friend_full=_full_name(friend, kinds[1]),
        family=rng.choice(FAMILY),
        color=rng.choice(COLORS),
    )


def _full_name(name: str, kind: str) -> str:
    return f"little {name}" if kind in ("girl", "boy") else f"{name} the {kind}"


def _draw(rng: random.Random, slots: Mapping[str, str]) -> dict[str, str]:
    """Fills a plot's slots (the notation: `Plot`)."""
    fields: dict[str, str] = {}
    for names, values in slots.items():
        names = names.split(" ")
        for name, value in zip(names, _distinct(rng, values.split(", "), len(names)), strict=True):
            fields.update(zip(name.split("/"), value.split("/"), strict=True))
    return fields


def _distinct(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    left, drawn = list(values), []
    for _ in range(count):
        drawn.append(rng.choice(left))
        left.remove(drawn[-1])
    return drawn


def _expand(rng: random.Random, template: str, fields: Mapping[str, str]) -> str:
    return re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), template).format_map(fields)
