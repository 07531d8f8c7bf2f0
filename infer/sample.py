"""Continues prompts; text goes to stdout as it is made, everything else to stderr.

    python -m infer.sample --config=configs/sample.py --config.checkpoint=DIR --prompt "Once upon a time"

A prompt with <FILL_ME> is filled there (Code Llama). Every setting of configs/sample.py can be given as --config.KEY=VALUE.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from infer import program
from llama_jax import distributed

CONFIG = program.define_config()
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times (default: no text at all)")
FILL_ME = "<FILL_ME>"


def main() -> None:
    config = CONFIG.value
    settings = program.settings(config)
    llama = program.load(config)
    prompts = distributed.broadcast(PROMPT.value or [""])
    if any(FILL_ME in prompt for prompt in prompts):
        for prompt in prompts:
            _print(llama.stream_infill(prompt, settings, suffix_first=config.suffix_first))
    elif settings.logprobs >= 0:
        _report(llama, llama.generate(prompts, settings))
    else:
        for stream in _in_order(llama.stream_all(prompts, settings), len(prompts) * settings.n):
            _print(stream)


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _in_order(events: Iterator[tuple[int, str]], count: int) -> Iterator[Iterator[str]]:
    """The streams of rows that are generated together, one after the other: the first as it is made, the others from memory."""
    waiting: list[list[str]] = [[] for _ in range(count)]

    def row(index: int) -> Iterator[str]:
        yield from waiting[index]
        for b, piece in events:
            if b == index:
                yield piece
            else:
                waiting[b].append(piece)

    return (row(index) for index in range(count))


def _report(llama: Any, completions: list[Any]) -> None:
    """Texts on stdout, and a JSON line per token on stderr."""
    if not distributed.is_main():
        return
    name = llama.tokenizer.decode
    for index, completion in enumerate(completions):
        print(completion.text, flush=True)
        for token, logprob, top in zip(completion.tokens, completion.logprobs, completion.top_logprobs, strict=True):
            line = {"row": index, "token": token, "text": name([token], continued=True), "logprob": round(logprob, 6)}
            if top:
                line["top"] = {str(i): round(value, 6) for i, value in top.items()}
            print(json.dumps(line, ensure_ascii=False), file=sys.stderr)


if __name__ == "__main__":
    program.run(main)
