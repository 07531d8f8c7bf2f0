"""Writes everything that the bundled model is trained on: python -m bundled.make_data --output DIR

    DIR/tokenizer.model             trained on the first of the texts below
    DIR/pretrain.jsonl              {"text": ...}: stories, and exercises (pages of questions and answers)
    DIR/sft.jsonl                   {"messages": [...]}: dialogues; and some more stories, so that they are not forgotten
    DIR/held_out/stories.jsonl      {"text": ...}
    DIR/held_out/dialogues.jsonl    {"messages": [...]}
    DIR/data.json                   how many of each, how large, with which hash

The bytes depend on the numbers asked for alone, not on the machine or the number of processes: every text has its own seed,
the split's name, the kind's and its number. Beyond that, no question of the held-out side is part of training (`questions.py`).
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bundled.choices import Choices, Split
from bundled.dialogues import Message, dialogue, exercise
from bundled.stories import story
from bundled.tokenizer import train_tokenizer

STORIES, EXERCISES, DIALOGUES, HELD_OUT = 60_000, 24_000, 56_000, 500  # 10.7, 3.9 and 8.0 M tokens
DIALOGUES_PER_STORY = 8  # in sft.jsonl
TOKENIZER_STORIES, TOKENIZER_EXERCISES, TOKENIZER_DIALOGUES = 6000, 3000, 3000
CHUNK = 500

Part = tuple[Split, str, Sequence[int]]  # split, kind, numbers
Record = dict[str, str | list[Message]]
MAKERS: dict[str, Callable[[Choices, Split], Record]] = {
    "story": lambda choices, split: {"text": story(choices).text},
    "exercise": lambda choices, split: {"text": exercise(choices, split)},
    "dialogue": lambda choices, split: {"messages": dialogue(choices, split)},
}


def records(split: Split, kind: str, numbers: Sequence[int]) -> list[Record]:
    """Texts of a kind, by number; each has a seed that no other text has."""
    return [MAKERS[kind](Choices(split, kind, number), split) for number in numbers]


def tokenizer_texts() -> Iterator[str]:
    """What the tokenizer is trained on: the first texts of each kind, dialogues between Llama 2's tags."""
    for kind, count in (("story", TOKENIZER_STORIES), ("exercise", TOKENIZER_EXERCISES)):
        for record in records("train", kind, range(count)):
            yield record["text"]
    tags = {"system": "<<SYS>>\n{}\n<</SYS>>", "user": "[INST] {} [/INST]", "assistant": "{}"}
    for record in records("train", "dialogue", range(TOKENIZER_DIALOGUES)):
        yield from (tags[message["role"]].format(message["content"]) for message in record["messages"])


def make_data(output: Path, *, stories: int, exercises: int, dialogues: int, held_out: int, processes: int = 1) -> None:
    """Writes the files listed above.

    Args:
        output: directory to write into.
        stories, exercises: in pretrain.jsonl.
        dialogues: in sft.jsonl; one story more for every DIALOGUES_PER_STORY of them.
        held_out: stories, and dialogues, for evaluation.
        processes: that share the work.
    """
    again = range(stories, stories + dialogues // DIALOGUES_PER_STORY)
    files = {
        "pretrain.jsonl": [("train", "story", range(stories)), ("train", "exercise", range(exercises))],
        "sft.jsonl": [("train", "dialogue", range(dialogues)), ("train", "story", again)],
        "held_out/stories.jsonl": [("held_out", "story", range(held_out))],
        "held_out/dialogues.jsonl": [("held_out", "dialogue", range(held_out))],
    }
    (output / "held_out").mkdir(parents=True, exist_ok=True)
    (output / "tokenizer.model").write_bytes(train_tokenizer(tokenizer_texts()))
    with contextlib.ExitStack() as stack:
        run = map
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(processes, spawn)).map
        about = {name: _write(output / name, parts, run) for name, parts in files.items()}
    (output / "data.json").write_text(json.dumps(about, indent=1) + "\n")


def _write(path: Path, parts: Sequence[Part], run: Callable) -> dict[str, int | str]:
    """Writes the records of the parts in their order; returns what data.json says of the file."""
    chunks = [(split, kind, numbers[at : at + CHUNK]) for split, kind, numbers in parts for at in range(0, len(numbers), CHUNK)]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for lines in run(_lines, chunks):
            file.write(lines)
            digest.update(lines)
    count = sum(len(numbers) for _, _, numbers in parts)
    return dict(records=count, bytes=path.stat().st_size, sha256=digest.hexdigest())


def _lines(part: Part) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records(*part)).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--stories", type=int, default=STORIES)
    parser.add_argument("--exercises", type=int, default=EXERCISES)
    parser.add_argument("--dialogues", type=int, default=DIALOGUES)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="stories, and dialogues, for evaluation")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    make_data(**vars(args))
    print((args.output / "data.json").read_text(), end="")


if __name__ == "__main__":
    main()
