"""Tokens per step and per second with guesses and without: on text that repeats itself and on text that does not.

    python benchmarks/speculation.py [--checkpoint DIR] [--draft DIR]

One line of JSON per text and way; every way is warmed up, and the ways take turns, best of --rounds.
"""

import argparse
import json
import time

import numpy as np

import llama_jax
from llama_jax.generation.request import make_row

TEXTS = {
    "plain": "Once upon a time there was a little girl",
    "repetitive": "The red cat sat on the big mat. The blue dog ran to the old tree. " * 3 + "The red cat",
}
NEW_TOKENS = 128


def measure(llama: llama_jax.Llama, text: str) -> tuple[float, float]:
    """Seconds after the first token, and tokens per forward pass."""
    tokens = llama.tokenizer.encode(text, bos=True)
    settings = llama_jax.Settings(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    row = make_row(tokens, settings, (), vocab_size=llama.config.vocab_size, max_length=llama.max_length)
    outputs = llama.engine.run([row], np.zeros(1, bool))
    next(outputs)
    start = time.perf_counter()
    while True:
        try:
            next(outputs)
        except StopIteration as end:
            seconds, state = time.perf_counter() - start, end.value
            break
    steps = int(state.steps[0]) if llama.engine.guesses else NEW_TOKENS - 1
    return seconds, (NEW_TOKENS - 1) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="bundled/checkpoint")
    parser.add_argument("--draft", default="", help="a smaller model, beside looking up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    ways = {"none": ("", 0), "lookup 3": ("lookup", 3), "lookup 7": ("lookup", 7)}
    if args.draft:
        ways["draft 4"] = (args.draft, 4)
    models = {
        way: llama_jax.load(args.checkpoint, draft=draft, draft_tokens=n, dtype=args.dtype) for way, (draft, n) in ways.items()
    }
    for name, text in TEXTS.items():
        best = {way: measure(llama, text) for way, llama in models.items()}
        for _ in range(args.rounds):
            for way, llama in models.items():
                best[way] = min(best[way], measure(llama, text))
        for way, (seconds, per_step) in best.items():
            rate = (NEW_TOKENS - 1) / seconds
            line = {"text": name, "guesses": way, "tokens_per_step": round(per_step, 2), "tokens_per_second": round(rate, 1)}
            print(json.dumps(line | {"speed_up": round(best["none"][0] / seconds, 2)}), flush=True)


if __name__ == "__main__":
    main()
