"""Answers of lm-eval's `generate_until`: token ids and its generation arguments in, text out."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.llama import Llama
from llama_jax.generation.reading import common_length
from llama_jax.generation.request import Settings
from llama_jax.text.chat import stop_ids

Request = tuple[Sequence[int], Mapping[str, Any]]  # a prompt, and lm-eval's generation arguments

SHARED = 64  # tokens that prompts begin with alike before their beginning is read by itself
MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
AS_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
KNOWN = ("until", "do_sample", *MAX_TOKENS, *AS_SETTINGS)


def settings_of(llama: Llama, arguments: Mapping[str, Any], max_new_tokens: int) -> Settings:
    """lm-eval's generation arguments as Settings: greedy unless do_sample or a temperature says otherwise.

    A stop string that is the text of a control token becomes its id, as control tokens have no text in an answer.

    Args:
        max_new_tokens: where the arguments have none.

    Raises:
        LlamaError: there is an argument that we do not know.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if unknown := sorted(given.keys() - set(KNOWN)):
        raise LlamaError(
            ExitCode.BAD_REQUEST, f"generation arguments {', '.join(unknown)} are not known; known: {', '.join(KNOWN)}"
        )
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    controls = {text: llama.tokenizer.token_id(text) for text in until}
    ends = [*stop_ids(llama.tokenizer, llama.chat_format), *(i for i in controls.values() if i is not None)]
    sampled = given.get("do_sample", given.get("temperature", 0) > 0)
    more = {name: given[name] for name in AS_SETTINGS if name in given}
    neutral = {"temperature": 1.0, "top_p": 1.0}
    more = neutral | more if sampled else more | {"temperature": 0.0}
    new = next((int(given[name]) for name in MAX_TOKENS if name in given), max_new_tokens)
    return Settings(
        max_new_tokens=max(new, 1),
        stop=[text for text in until if text and controls[text] is None],
        stop_ids=list(dict.fromkeys(ends)),
        **more,
    )


def answers(
    llama: Llama,
    requests: Sequence[Request],
    batch_size: int,
    max_new_tokens: int = 256,
    progress: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Continues prompts; what many begin with is read once, and prompts about as long run together.

    A prompt loses its beginning where it and its answer are longer than max_length together. A prompt that comes again with the
    same arguments gets another sample.

    Args:
        max_new_tokens: where the arguments say none.
        progress: called with the number of answers that came since the last call.

    Raises:
        LlamaError: an argument is not known, or leaves no room for a prompt.
    """
    prompts, settings = [], []
    seen: collections.Counter = collections.Counter()
    for tokens, arguments in requests:
        own = settings_of(llama, arguments, max_new_tokens)
        room = llama.max_length - own.max_new_tokens
        if room < 1:
            raise LlamaError(
                ExitCode.BAD_REQUEST,
                f"max_gen_toks is {own.max_new_tokens:,} and max_length {llama.max_length:,}: no room is left for a prompt: "
                "lower the first (--gen_kwargs max_gen_toks=N) or raise the second",
            )
        prompts.append(tuple(tokens[-room:]))
        again = (prompts[-1], repr(own))
        settings.append(dataclasses.replace(own, seed=own.seed + seen[again]))
        seen[again] += 1
    texts = [""] * len(requests)
    for group, shared in _groups(prompts):
        prefix = llama.prefill(shared) if shared and llama.config.rope_type != "dynamic" else None
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            done = llama.generate([prompts[i] for i in batch], [settings[i] for i in batch], prefix=prefix)
            for i, completion in zip(batch, done, strict=True):
                texts[i] = completion.text
            progress(len(batch))
    return texts


def _groups(prompts: Sequence[tuple[int, ...]]) -> list[tuple[list[int], tuple[int, ...]]]:
    """Indices of prompts that begin alike, the longest first, with what they begin with; () for those like no other."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        found.setdefault(prompts[i][:SHARED], []).append(i)
    alone = [i for group in found.values() if len(group) == 1 or len(prompts[group[0]]) < SHARED for i in group]
    groups = [(alone, ())] if alone else []
    for group in found.values():
        if group[0] not in set(alone):
            first, *others = (prompts[i] for i in group)
            groups.append((group, first[: min(common_length(first, other) for other in others)]))
    return groups
