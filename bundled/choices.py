"""Random choices that keep account of themselves, and which side of the split a seed or a question is on."""

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "held_out"]
HELD_OUT_ONE_IN = 10


class Choices:
    """Random choices from a seed; the same on every Python (random.Random seeded by a string, `choice` stable since 3.2).

    Attributes:
        nats: minus the logarithm of the probability of all choices so far; its mean over seeds is the entropy of the choices.
            What is made of them has at most that entropy, and exactly that if different choices always make different things.
    """

    def __init__(self, *seed: str | int):
        self._random = random.Random("/".join(map(str, seed)))
        self.nats = 0.0

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, which differ from each other, each with the same probability."""
        self.nats += math.log(len(options))
        return self._random.choice(options)

    def several(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order."""
        left, drawn = list(options), []
        for _ in range(count):
            drawn.append(self.pick(left))
            left.remove(drawn[-1])
        return drawn

    def weighted(self, options: Mapping[T, int]) -> T:
        """One of the options, as often as its weight says."""
        total = sum(options.values())
        at = self._random.randrange(total)
        for option, weight in options.items():
            at -= weight
            if at < 0:
                self.nats += math.log(total / weight)
                return option
        raise AssertionError("a weight is negative")


def side(key: str) -> Split:
    """Where a question belongs, by its own content alone: one in HELD_OUT_ONE_IN is never trained on, whatever the seed."""
    return "train" if zlib.crc32(key.encode()) % HELD_OUT_ONE_IN else "held_out"
