"""What guessing tokens gains: on text that repeats itself and on text that does not, against one token a step."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

import llama_jax
from infer import program
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.engine import Engine
from llama_jax.generation.request import Row, Settings, make_row

PERIOD = 32  # tokens that the repetitive text says again and again
ROUNDS = 3  # the best of these counts


def measure_guesses(llama: llama_jax.Llama, config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
    """The object that is printed, of each text. Both texts are the model's own, sampled at temperature 1.

    Args:
        llama: loaded with a draft.
        config: of configs/bench.py.

    Raises:
        LlamaError: the texts do not fit, or nothing would be guessed.
    """
    cfg, guessing = llama.config, llama.engine
    settings = dataclasses.replace(program.settings(config, config.steps), ignore_eos=True)
    if settings.needs_history:
        raise LlamaError(ExitCode.BAD_REQUEST, "with penalties nothing is guessed: measure without them")
    plain = Engine(
        cfg,
        guessing.params,
        llama.max_length,
        guessing.mesh,
        kernels=guessing.kernels,
        cache_dtype=guessing.cache_dtype,
    )
    for name, prompt in _texts(llama, plain, config.prompt_length).items():
        row = make_row(prompt, settings, (), vocab_size=cfg.vocab_size, max_length=llama.max_length)
        timed = {engine: _time(engine, row) for engine in (plain, guessing)}  # compiles
        for _ in range(ROUNDS):  # in turns, so that what slows the machine slows both
            timed = {engine: min(best, _time(engine, row)) for engine, best in timed.items()}
        (plain_seconds, _), (seconds, steps) = timed.values()
        made = config.steps - 1  # after the first, which the prompt gives
        yield {
            "checkpoint": config.checkpoint,
            "text": name,
            "prompt_length": len(prompt),
            "draft": config.draft,
            "draft_tokens": guessing.guesses.num_draft,
            "tokens_per_step": made / steps,
            "tokens_per_second": made / seconds,
            "plain_tokens_per_second": made / plain_seconds,
            "speed_up": plain_seconds / seconds,
        }


def _texts(llama: llama_jax.Llama, plain: Engine, length: int) -> dict[str, list[int]]:
    """Prompts of so many tokens."""
    begin = llama.tokenizer.bos_id if llama.tokenizer else None
    settings = Settings(max_new_tokens=length - 1, temperature=1.0, top_p=1.0, ignore_eos=True)
    row = make_row([begin or 0], settings, (), vocab_size=llama.config.vocab_size, max_length=llama.max_length)
    tokens = [*row.tokens, *(int(t) for output in plain.run([row], np.zeros(1, bool)) for t in output.tokens[0])]
    return {"plain": tokens, "repetitive": (tokens[:PERIOD] * -(-length // PERIOD))[:length]}


def _time(engine: Engine, row: Row) -> tuple[float, int]:
    """Seconds after the first token, and forward passes."""
    outputs = engine.run([row], np.zeros(1, bool))
    next(outputs)
    start = time.perf_counter()
    while True:
        try:
            next(outputs)
        except StopIteration as end:
            steps = int(end.value.steps[0]) if engine.guesses else row.settings.max_new_tokens - 1
            return time.perf_counter() - start, steps
