"""The texts that a program is given in files: one a file, or one a line of JSONL."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.errors import ExitCode, LlamaError

JSONL = (".jsonl", ".ndjson")


class Text(NamedTuple):
    """A document: its file (and line), and what is in it."""

    name: str
    text: str


def read_texts(paths: Sequence[str | Path]) -> list[Text]:
    """The documents of files in their order: the whole of one, or of JSONL every line's `text`.

    Raises:
        LlamaError: a file cannot be read, or has no text where one is expected.
    """
    return [text for path in paths for text in _read(Path(path))]


def _read(path: Path) -> list[Text]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaError(ExitCode.BAD_REQUEST, f"cannot read {path} as UTF-8 text: {error}") from None
    texts = list(_lines(path, content)) if path.suffix in JSONL else [Text(str(path), content)] if content else []
    if not texts:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{path} is empty: nothing to score")
    return texts


def _lines(path: Path, content: str) -> Iterator[Text]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LlamaError(ExitCode.BAD_REQUEST, f"{path}:{number} is no JSON: {error}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise LlamaError(
                ExitCode.BAD_REQUEST, f'{path}:{number} is {line.strip()[:60]!r}, expected {{"text": "..."}} that is not empty'
            )
        yield Text(f"{path}:{number}", text)
