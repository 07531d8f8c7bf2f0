"""Every way that something random can come out."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from bundled.choices import Choices

T = TypeVar("T")


class _UndecidedError(Exception):
    pass


class _Scripted(Choices):
    """Choices that are told in advance; at the first that is not, it stops with the number of options."""

    def __init__(self, script: Sequence[int]):
        super().__init__()
        self._script = list(script)

    def pick(self, options):
        if not self._script:
            raise _UndecidedError(len(options))
        self.nats += math.log(len(options))
        return options[self._script.pop(0)]


def every(make: Callable[[Choices], T]) -> Iterator[tuple[T, float]]:
    """All results of make(choices), which only picks, each with its probability by the choices' own account."""
    scripts: list[list[int]] = [[]]
    while scripts:
        script = scripts.pop()
        choices = _Scripted(script)
        try:
            made = make(choices)
        except _UndecidedError as undecided:
            scripts += [[*script, i] for i in range(undecided.args[0])]
        else:
            yield made, math.exp(-choices.nats)
