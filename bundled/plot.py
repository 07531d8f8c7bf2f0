"""What a plot is (the notation of its text: `stories.py`)."""

import dataclasses
import functools
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Plot:
    """A small problem and how it ends.

    Attributes:
        about: what a listener would ask for: "a story about ...".
        slots: what is drawn for the whole story, besides the cast: names and values, separated by ", ". "a b" draws two
            different values, "a/b" one value whose halves belong together.
        text: beats separated by empty lines; each line is one way to tell its beat; "> " opens a paragraph.
    """

    about: str
    slots: Mapping[str, str]
    text: str

    @functools.cached_property
    def beats(self) -> list[list[str]]:
        return [block.splitlines() for block in self.text.strip().split("\n\n")]

    @functools.cached_property
    def groups(self) -> dict[str, tuple[list[str], list[str]]]:
        """Field -> its group's slots, from which different values are drawn, and the values; a slot is "a" or "a/b"."""
        found = {}
        for names, values in self.slots.items():
            for slot in names.split(" "):
                found |= {field: (names.split(" "), values.split(", ")) for field in slot.split("/")}
        return found
