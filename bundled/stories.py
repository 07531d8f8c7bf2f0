"""Short stories for the bundled model, grown from templates: one hero and one friend, who keep names, things and places.

A plot (plots.py, more_plots.py) is a row of beats; of each beat one template is taken and filled:

    {name}    drawn when first mentioned and then kept to the end: the cast's words (`Cast`) and the plot's own slots
    {Name}    the same word with a capital
    [a|b]     one of the alternatives, drawn on the spot
    > text    the beat opens a new paragraph

Only the hero has pronouns, so that "she" and "his" never mean anybody else, and names come up in nearly every sentence: what is
left to learn, after the grammar, is to look back. Nothing is drawn that the text does not show, so the choices' entropy is that
of the stories as long as different choices tell different stories.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from bundled import more_plots, plots
from bundled.choices import Choices
from bundled.plot import Plot

PLOTS = (*plots.PLOTS, *more_plots.PLOTS)
PRONOUNS = {"she": dict(sub="she", obj="her", pos="her"), "he": dict(sub="he", obj="him", pos="his")}
NAMES = {
    "she": (
        "Anna Bella Clara Dora Ella Fanny Greta Hazel Ida Julia Kate Lily Mia Nora Olga Paula Rita Sara Tess Uma Vera Wanda "
        "Yara Zoe Alma Betty Carol Doris Emma Freya Gina Hilda Irma Jenny Karla Laura Maya Nelly Polly Ruth"
    ).split(),
    "he": (
        "Adam Ben Carl David Eddie Felix George Henry Ivan Jack Kai Leo Max Noah Oscar Paul Ralph Sam Tom Udo Victor Walter "
        "Yuri Zack Albert Bruno Conrad Dennis Emil Frank Gus Harry Igor Jonas Karl Louis Martin Nico Otto Peter"
    ).split(),
}
ALL_NAMES = NAMES["she"] + NAMES["he"]
HOMES = {
    "girl": "a small house", "boy": "a small house", "rabbit": "a warm burrow", "bear": "a deep cave", "fox": "a cozy den",
    "mouse": "a tiny hole", "cat": "a quiet barn", "dog": "a wooden hut", "duck": "a soft nest", "frog": "a cool pond",
    "squirrel": "a hollow tree", "hedgehog": "a pile of leaves", "turtle": "a little bay", "goat": "a stone shed",
    "beaver": "a house of branches", "badger": "a dark tunnel",
}  # fmt: skip
TRAITS = "kind brave curious cheerful gentle clever quiet lively friendly careful shy proud".split()
COLORS = "red blue green yellow orange purple white golden silver brown pink black".split()
NEAR = "river forest hill lake sea meadow village mill".split()
FAMILY = "mother father grandmother grandfather aunt uncle".split()

_DAYS = ("One day,", "One morning,", "One afternoon,", "One windy day,", "Then one day,", "On a bright day,")
_LATER = ("Soon after,", "After breakfast,", "A little later,", "Before lunch,")

# Opening and the ways to say when the trouble starts.
OPENINGS = (
    ("Once upon a time, there was a {trait} {kind} named {name}. {Sub} lived in {home} [near|by] the {near}.", _DAYS),
    ("Once upon a time, a {trait} {kind} [named|called] {name} lived in {home}.", _DAYS),
    ("Once upon a time, there lived a little {kind} [named|called] {name}. Everyone knew that {name} was {trait}.", _DAYS),
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
    "{Pos} best friend was {friend_full}.",
    "{name} and {friend_full} were best friends.",
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
    "> Then {name} the {trait} {kind} went home for [supper|soup and bread], tired but happy.",
)


class Story(NamedTuple):
    """A story, how surprising it is, and what it is about.

    Attributes:
        text: ASCII, paragraphs separated by one newline, none at the end.
        nats: minus the logarithm of the probability of the choices that made it.
        facts: the fields it mentions: "name", "kind", "friend", "color", ... and the plot's slots; and "about".
    """

    text: str
    nats: float
    facts: Mapping[str, str]


def story(choices: Choices) -> Story:
    """A new story."""
    before = choices.nats
    plot = choices.pick(PLOTS)
    opening, days = choices.pick(OPENINGS)
    cast = Cast(choices, plot, days)
    told = []
    for beat in ([opening], SCENES, *plot.beats, ENDINGS):
        if template := choices.pick(beat):
            told.append(_expand(choices, template).format_map(cast))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(told).replace(" > ", "\n"))
    return Story(text, choices.nats - before, {"about": plot.about, **cast})


class Cast(dict[str, str]):
    """The fields of a story's templates, each drawn when first asked for: hero and friend (another name and another kind), the
    words that describe them, and the plot's slots."""

    def __init__(self, choices: Choices, plot: Plot, days: tuple[str, ...]):
        super().__init__()
        self._choices, self._plot = choices, plot
        self._lists = dict(trait=TRAITS, near=NEAR, family=FAMILY, color=COLORS, day=days)

    def __missing__(self, field: str) -> str:
        small = field[:1].lower() + field[1:]
        if small != field:
            return self[small][:1].upper() + self[small][1:]
        if field in self._plot.groups:
            self._draw_slot(field)
        elif field in self._lists:
            self[field] = self._choices.pick(self._lists[field])
        elif field in ("sub", "obj", "pos"):
            self.update(PRONOUNS["she" if self["name"] in NAMES["she"] else "he"])
        elif field in ("name_full", "friend_full"):
            self[field] = self._full_name(field.removesuffix("_full"))
        elif field in ("name", "friend"):
            self[field] = self._draw_name(field)
        elif field in ("kind", "friend_kind"):
            self[field] = self._draw_kind(field)
        elif field == "home":
            self[field] = HOMES[self["kind"]]
        else:
            raise KeyError(field)
        return self[field]

    def _draw_slot(self, field: str) -> None:
        """One value of the field's group that no other slot of the group has."""
        slots, values = self._plot.groups[field]
        taken = {"/".join(self[part] for part in slot.split("/")) for slot in slots if slot.split("/")[0] in self}
        slot = next(slot for slot in slots if field in slot.split("/"))
        value = self._choices.pick([value for value in values if value not in taken])
        self.update(zip(slot.split("/"), value.split("/"), strict=True))

    def _draw_name(self, field: str) -> str:
        """The hero's name fits what is known of the hero; the friend's is another one."""
        if field == "friend":
            hero = self["name"]
            return self._choices.pick([name for name in ALL_NAMES if name != hero])
        return self._choices.pick({"girl": NAMES["she"], "boy": NAMES["he"]}.get(self.get("kind", ""), ALL_NAMES))

    def _draw_kind(self, field: str) -> str:
        """A girl has a girl's name; the friend is of another kind than the hero."""
        name = self["friend"] if field == "friend_kind" else self.get("name", "")
        wrong = {"boy"} if name in NAMES["she"] else {"girl"} if name in NAMES["he"] else set()
        wrong.add(self.get("kind" if field == "friend_kind" else "friend_kind", ""))
        return self._choices.pick([kind for kind in HOMES if kind not in wrong])

    def _full_name(self, who: str) -> str:
        kind = self["kind" if who == "name" else "friend_kind"]
        return f"little {self[who]}" if kind in ("girl", "boy") else f"{self[who]} the {kind}"


def _expand(choices: Choices, template: str) -> str:
    return re.sub(r"\[([^\[\]]*)\]", lambda match: choices.pick(match[1].split("|")), template)
