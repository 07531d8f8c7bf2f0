"""Judges the bundled model: python -m bundled.judge --checkpoint bundled/checkpoint --json FILE --page docs/bundled_model.md

A few minutes on 2 CPU cores. Held-out stories and questions are made on the spot, from seeds and by a rule that training
never touches. All seeds are fixed: the same checkpoint on the same machine gets the same figures and the same samples.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_jax
from bundled.dialogues import messages
from bundled.measure import Figures, answers, names_kept, perplexities, requests_met
from bundled.page import page
from llama_jax.errors import run_command

STORIES, NGRAM_STORIES, QUESTIONS, SAMPLED, REQUESTS = 500, 50_000, 100, 25, 100
BATCH_SIZE = 50
COMPLETED = (
    "Once upon a time",
    "One sunny morning, a curious fox",
    "Long ago, near a lake, there lived",
    "There was once a little bear",
)
CONVERSATIONS = (  # system prompt, and what the user says
    ("", ("Hello!", "Who are you?", "What can you do?")),
    ("", ("Tell me a story about a proud fox named Wanda.", "Who is the friend of Wanda?", "Thank you!")),
    ("", ("Anna has a red ball. Ben has a green kite. Tess has a blue drum. Who has the green kite?", "What is 27 + 14?")),
    ("Answer as briefly as you can.", ("Which is bigger, 45 or 54?", "What comes after Tuesday?")),
    ("Your name is Otto.", ("What is your name?",)),
    ("", ("What is the capital of France?", "Tell me a story about a snowman.")),
)


def judge(llama: Any, *, stories: int, ngram_stories: int, questions: int, sampled: int, requests: int) -> Figures:
    """Every figure of the page; the numbers say how many of each are looked at (questions of each kind)."""
    return dict(
        parameters=llama.config.num_params,
        config=dataclasses.asdict(llama.config),
        perplexities=perplexities(llama, stories, ngram_stories),
        answers=answers(llama, questions),
        names=names_kept(llama, sampled),
        requests=requests_met(llama, requests),
        completions=[(prompt, llama.generate([prompt], echo=True)[0].text) for prompt in COMPLETED],
        conversations=[converse(llama, system, said) for system, said in CONVERSATIONS],
    )


def converse(llama: Any, system: str, said: Sequence[str]) -> list[dict[str, str]]:
    """A conversation in which the model answers every turn, with the settings of `infer.chat`."""
    turns: list[tuple[str, str]] = []
    for text in said:
        so_far = messages([*turns, (text, "")], system)[:-1]
        room = llama.max_length - len(llama.encode_chat(so_far))
        reply = llama.chat(so_far, max_new_tokens=max(1, 2 * room // 3))  # the rest is for what comes after
        turns.append((text, reply.text.strip()))
    return messages(turns, system)


def training(workdirs: Sequence[Path]) -> list[Figures]:
    """What runs of train.main left behind in metrics.jsonl."""
    found = []
    for workdir in workdirs:
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        seconds = math.fsum(line["step_seconds"] for line in lines)
        last = [line["loss"] for line in lines[-max(1, len(lines) // 50) :]]
        tokens = math.fsum(line["tokens_per_second"] * line["step_seconds"] for line in lines)
        found.append(dict(run=workdir.name, steps=len(lines), seconds=seconds, tokens=tokens, loss=math.fsum(last) / len(last)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the model: a chat model with the bundled tokenizer")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--page", type=Path, help="file for the page")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="WORKDIRs of the training runs, in order")
    for name, count, what in (
        ("stories", STORIES, "held-out stories"),
        ("ngram-stories", NGRAM_STORIES, "training stories that the n-gram models read"),
        ("questions", QUESTIONS, "held-out questions of each kind"),
        ("sampled", SAMPLED, "stories sampled from each beginning"),
        ("requests", REQUESTS, "stories asked for"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, help=what)
    args = parser.parse_args()
    began = time.perf_counter()
    llama = llama_jax.load(args.checkpoint, batch_size=BATCH_SIZE)
    counts = {name: getattr(args, name) for name in ("stories", "ngram_stories", "questions", "sampled", "requests")}
    figures = judge(llama, **counts) | dict(training=training(args.runs), seconds=time.perf_counter() - began)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.page:
        args.page.write_text(page(figures, shlex.join(["python", "-m", "bundled.judge", *sys.argv[1:]])))
    print(json.dumps({name: figures[name] for name in ("perplexities", "names", "requests", "seconds")}, indent=1))
    print(*(f"{kind}: {one['right']} of {one['asked']}" for kind, one in figures["answers"].items()), sep="\n")


if __name__ == "__main__":
    run_command(main)
