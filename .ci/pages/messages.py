"""Are the messages that a page shows those of the code?

A message is a line `error: ...` or `warning: ...` of a `text` block. It counts as the code's when a string of the sources, with
anything in the places of its f-string's values, is the whole of it, or what follows the name of a file and a colon.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("llama_jax", "infer", "train")
LETTERS = 12  # a pattern with fewer of its own says nothing
BLOCK = re.compile(r"```text\n(.*?)```", re.DOTALL)
SAID = re.compile(r"^(?:error|warning|note): (.*)$", re.MULTILINE)


def shown(page: str) -> list[str]:
    return [message for block in BLOCK.findall(page) for message in SAID.findall(block)]


def unknown(messages: Iterable[str]) -> list[str]:
    """Those that no code says."""
    patterns = [pattern for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) for pattern in _patterns(path)]
    return [message for message in messages if not _is_said(message, patterns)]


def _is_said(message: str, patterns: Iterable[re.Pattern]) -> bool:
    name, _, rest = message.partition(": ")
    whole = [message] if " " in name else [message, rest]
    return any(pattern.fullmatch(each) for each in whole for pattern in patterns)


def _patterns(path: Path) -> Iterable[re.Pattern]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            parts = [node]
        else:
            continue
        own = [part.value for part in parts if isinstance(part, ast.Constant)]
        if sum(map(len, own)) >= LETTERS:
            pattern = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in parts)
            yield re.compile(re.sub(r"^(error|warning|note):\\ ", "", pattern))
