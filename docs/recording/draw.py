"""An asciicast as an animated SVG: every state of a line is a text that CSS shows for as long as it stands there.

Where nothing moves (a printed page, a reader who asked for less motion) the last screen is shown.
"""

import re
from collections.abc import Iterable
from xml.sax.saxutils import escape

TICK = 0.15  # seconds between two pictures, at least
CHARACTER, LINE, MARGIN = 7.25, 16, 12  # in pixels; of a font of 12
HELD = 3.0  # seconds at the end
ESCAPE = re.compile(r"\x1b\[[0-9;?]*([A-Za-z])")


class Screen:
    """A terminal that knows line ends, carriage returns, and erasing to the end of the line; what scrolls away is kept."""

    def __init__(self, columns: int):
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        at = 0
        while at < len(text):
            if found := ESCAPE.match(text, at):
                at = found.end()
                if found[1] == "K":
                    del self.lines[self.row][self.column :]
                elif found[1] == "A":
                    self.row = max(0, self.row - 1)
                continue
            self._put(text[at])
            at += 1

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        elif character >= " ":
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.lines[self.row]
            line += " " * (self.column + 1 - len(line))
            line[self.column] = character
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def texts(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def draw(events: Iterable[tuple[float, str]], columns: int, rows: int, seconds: float) -> str:
    """events: (seconds, text). Returns the SVG's text; it runs for `seconds` + HELD, again and again."""
    total = seconds + HELD
    states, scrolls = _states(events, columns, rows)
    width, height = columns * CHARACTER + 2 * MARGIN, rows * LINE + 2 * MARGIN
    style, texts = [], []
    for number, (line, text, start, end) in enumerate(states):
        steps = [f"0%{{visibility:{'hidden' if start else 'visible'}}}", f"{100 * start / total:.2f}%{{visibility:visible}}"]
        if end is not None:
            steps.append(f"{100 * end / total:.2f}%{{visibility:hidden}}")
        style.append(f"@keyframes t{number}{{{''.join(steps)}}}")
        shown = ' class="gone"' if end is not None else ' class="typed"' if text.startswith("$ ") else ""
        texts.append(f'<text{shown} y="{line * LINE}" style="animation-name:t{number}">{escape(text)}</text>')
    moves = "".join(f"{100 * at / total:.2f}%{{transform:translateY({-first * LINE}px)}}" for at, first in scrolls)
    last = scrolls[-1][1] * LINE
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">
<style>
text{{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#d8dee9;white-space:pre}}
.typed{{fill:#a3d977}}.gone{{visibility:hidden}}
text,.all{{animation:{total:g}s step-end infinite}}
.all{{transform:translateY({-last}px);animation-name:all}}
@keyframes all{{{moves}}}
{"".join(style)}
@media(prefers-reduced-motion){{text,.all{{animation:none!important}}}}
</style>
<rect width="100%" height="100%" rx="8" fill="#1f2430"/>
<svg x="{MARGIN}" y="{MARGIN}" width="{columns * CHARACTER:g}" height="{rows * LINE}">
<g class="all"><g transform="translate(0 {LINE - 4})">
{chr(10).join(texts)}
</g></g></svg>
</svg>
"""


State = tuple[int, str, float, float | None]


def _states(events: Iterable[tuple[float, str]], columns: int, rows: int) -> tuple[list[State], list[tuple[float, int]]]:
    """(line, text, from, until) of all that stood anywhere, and (time, first line on the screen)."""
    screen = Screen(columns)
    open_states: dict[int, tuple[str, float]] = {}
    closed: list[State] = []
    scrolls = [(0.0, 0)]
    for at, text in _pictures(events):
        screen.write(text)
        for line, now in enumerate(screen.texts()):
            before, since = open_states.get(line, ("", at))
            if now != before:
                if before:
                    closed.append((line, before, since, at))
                open_states[line] = (now, at)
        first = max(0, len(screen.lines) - rows)
        if first != scrolls[-1][1]:
            scrolls.append((at, first))
    return closed + [(line, text, since, None) for line, (text, since) in open_states.items() if text], scrolls


def _pictures(events: Iterable[tuple[float, str]]) -> Iterable[tuple[float, str]]:
    """Events that come within TICK of the first are one."""
    first, text = 0.0, ""
    for at, more in events:
        if text and at - first >= TICK:
            yield first, text
            first, text = at, ""
        text += more
    yield first, text
