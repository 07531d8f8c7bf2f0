"""Two models side by side: what they write, and where their predictions of a text part."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from infer import program
from infer.divergence import Divergence, StoredLogits, log_softmax, measure, predictions
from infer.windows import check_windows
from llama_jax import distributed
from llama_jax.checkpoint.quantized import innermost
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.draft import first_difference
from llama_jax.generation.llama import Llama
from llama_jax.generation.load import Prepared
from llama_jax.generation.reading import common_length
from llama_jax.generation.request import Settings
from llama_jax.text.chat import stop_ids
from llama_jax.text.tokenizer import Tokenizer

MOST_WINDOW = 1024  # by default: [window, V] logits are in memory, 0.5 GB for a vocabulary of 128,000
NUM_LARGEST = 12
NUM_BEGINNINGS, BEGINNING_TOKENS = 3, 16  # prompts, where only texts are given


class Sample(NamedTuple):
    """A model's continuation of a prompt.

    Attributes:
        kind: "greedy" or "sampled".
        tokens: without the one that ended it.
    """

    kind: str
    prompt: list[int]
    tokens: list[int]


class Fork(NamedTuple):
    """Where two continuations of a prompt part.

    Attributes:
        at: how many tokens both begin with.
        tokens: what a and b have next; None for the end.
        probabilities: of these two by model a, and by model b; before temperature and the other settings.
    """

    at: int
    tokens: tuple[int | None, int | None]
    probabilities: tuple[tuple[float, float], tuple[float, float]]


class Comparison(NamedTuple):
    """All that is reported.

    Attributes:
        facts: of a and b, what `describe` says.
        samples: pairs of a's and b's.
        forks: of each pair; None where both are equal.
        settings: of the sampled ones.
        texts: (name, tokens) of what the divergence is measured on.
        texts_of_a: whether these are a's samples.
    """

    facts: list[dict[str, Any]]
    samples: list[tuple[Sample, Sample]]
    forks: list[Fork | None]
    settings: Settings
    texts: list[tuple[str, list[int]]]
    texts_of_a: bool
    divergence: Divergence


def compare(
    config: ml_collections.ConfigDict,
    sides: Sequence[Prepared],
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    prompts: Sequence[str],
    settings: Settings,
) -> Comparison:
    """Runs one model after the other, each in memory alone.

    Args:
        sides: a and b.
        texts: (name, text); none: a's samples.
        prompts: none: the beginnings of the texts, or no text at all.
    """
    rows = [(name, tokenizer.encode(text, bos=tokenizer.bos_id is not None)) for name, text in texts]
    starts = [tokenizer.encode(prompt, bos=tokenizer.adds_bos and tokenizer.bos_id is not None) for prompt in prompts or [""]]
    if rows and not prompts:
        starts = [row[: max(1, min(BEGINNING_TOKENS, len(row) // 2))] for _, row in rows[:NUM_BEGINNINGS]]

    a, b = sides
    window, stride = check_windows(config.window or min(MOST_WINDOW, a.max_length), config.stride, a.max_length)
    llama = a.load()
    with StoredLogits(llama.config.vocab_size) as stored:
        facts, samples = [describe(a, config.a.adapter, llama)], _samples(llama, starts, settings)
        places = [stored.append(_answer_logits(llama, sample)) for sample in samples]
        own = [(f"{one.kind} text {i // 2 + 1} of a", [*one.prompt, *one.tokens]) for i, one in enumerate(samples)]
        rows = _cut(rows or own, config.max_tokens)
        begin = stored.count
        for block in predictions(llama, [row for _, row in rows], window, stride):
            stored.append(block)
        del llama  # before the other one is read
        llama = b.load()
        facts.append(describe(b, config.b.adapter, llama))
        pairs = list(zip(samples, _samples(llama, starts, settings), strict=True))
        ends = list(stop_ids(tokenizer, ""))
        forks = [fork(llama, stored, place, ends, *pair) for place, pair in zip(places, pairs, strict=True)]
        targets = [token for _, row in rows for token in row[1:]]
        second = predictions(llama, [row for _, row in rows], window, stride)
        divergence = measure(stored, begin, second, targets, NUM_LARGEST)
        return Comparison(facts, pairs, forks, settings, rows, not texts, divergence)


def fork(llama: Llama, stored: StoredLogits, place: int, ends: list[int], a: Sample, b: Sample) -> Fork | None:
    """Where samples of both models part; None where they are equal.

    Args:
        llama: model b.
        place: of model a's logits that predict a.tokens[0], in `stored`; those of the others, and of what follows, come next.
        ends: tokens that end a sample.
    """
    if a.tokens == b.tokens:
        return None
    at = common_length(a.tokens, b.tokens)
    tokens = tuple(sample.tokens[at] if at < len(sample.tokens) else None for sample in (a, b))
    found = []
    for logits in (stored.read(place + at, 1)[0], llama.logits([[*b.prompt, *b.tokens[:at]]])[0, -1]):
        probabilities = np.exp(log_softmax(logits))
        found.append(tuple(float(probabilities[ends if token is None else [token]].sum()) for token in tokens))
    return Fork(at, tokens, tuple(found))


def describe(side: Prepared, adapter: str, llama: Llama) -> dict[str, Any]:
    """What a model is, for the report; bytes: of the arrays in memory, over all devices."""
    opened = side.opened
    if isinstance(opened, Checkpoint):
        source, made_by, quantize = opened.source, opened.command, opened.quantize
    else:
        source, made_by, quantize = {"kind": opened.kind, "path": str(opened.path)}, "", ""
    cfg, leaves = llama.config, jax.tree.leaves(llama.params)
    return {
        "checkpoint": str(opened.path),
        "adapter": adapter,
        "base": str(innermost(opened).path) if innermost(opened) is not opened else "",
        "parameters": cfg.num_params,
        "layers": cfg.num_layers,
        "width": cfg.embed_dim,
        "heads": cfg.num_heads,
        "kv_heads": cfg.num_kv_heads,
        "vocabulary": cfg.vocab_size,
        "context": cfg.max_length,
        "dtype": llama.params["embedding"].dtype.name,
        "quantize": side.quantize or quantize,
        "cache_dtype": side.cache_dtype,
        "bytes": sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in leaves),
        "source": f"{source.get('kind', '')} {source.get('path', '')}".strip(),
        "made_by": made_by,
    }


def summary(comparison: Comparison, tokenizer: Tokenizer) -> dict[str, Any]:
    """The numbers, as JSON can hold them."""
    numbers = {name: _rounded(value) for name, value in comparison.divergence.summary().items()}
    samples = []
    for (a, _), found in zip(comparison.samples, comparison.forks, strict=True):
        samples.append({"prompt": tokenizer.decode(a.prompt), "kind": a.kind, "same": found is None})
        if found:
            (a_a, a_b), (b_a, b_b) = found.probabilities
            tokens = {"same_tokens": found.at, "token_a": found.tokens[0], "token_b": found.tokens[1]}
            likely = {"a_of_token_a": a_a, "a_of_token_b": a_b, "b_of_token_a": b_a, "b_of_token_b": b_b}
            samples[-1] |= tokens | {name: _rounded(value) for name, value in likely.items()}
    return {"a": comparison.facts[0], "b": comparison.facts[1]} | numbers | {"samples": samples}


def open_sides(config: ml_collections.ConfigDict, checkpoints: Sequence[str]) -> tuple[list[Prepared], Tokenizer]:
    """Both sides, of which nothing is read yet, and the tokenizer they share.

    Raises:
        LlamaError: a setting of either cannot be, or they cannot be compared.
    """
    shared = {name: config[name] for name in ("mesh", "max_length", "batch_size")}
    given = [dict(side) | shared | {"checkpoint": path} for side, path in zip((config.a, config.b), checkpoints, strict=True)]
    sides = [program.prepare(ml_collections.ConfigDict(side)) for side in given]
    a, b = (side.opened for side in sides)
    if a.config.vocab_size != b.config.vocab_size:
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"{a.path} has a vocabulary of {a.config.vocab_size:,} tokens, {b.path} of {b.config.vocab_size:,}: only models of "
            "the same tokens can be compared",
        )
    tokenizers = [side.tokenizer for side in sides]
    if all(tokenizers) and (differs := first_difference(*tokenizers)):
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"the tokenizers of {a.path} (it) and {b.path} differ: {differs}; only models of the same tokens can be compared",
        )
    if not any(tokenizers):
        raise LlamaError(ExitCode.BAD_TOKENIZER, "neither model has a tokenizer: --config.a.tokenizer=FILE")
    length = min(side.max_length for side in sides)
    return [dataclasses.replace(side, max_length=length) for side in sides], tokenizers[0] or tokenizers[1]


def _samples(llama: Llama, starts: Sequence[list[int]], settings: Settings) -> list[Sample]:
    """Of each prompt a greedy one, and one of the seed."""
    kinds = {"greedy": dataclasses.replace(settings, temperature=0.0), "sampled": settings}
    asked = [(start, kind) for start in starts for kind in kinds]
    completions = llama.generate([start for start, _ in asked], [kinds[kind] for _, kind in asked])
    return [Sample(kind, start, one.tokens) for (start, kind), one in zip(asked, completions, strict=True)]


def _answer_logits(llama: Llama, sample: Sample) -> np.ndarray:
    """[tokens + 1, V]: what predicts each token of a sample, and what follows it."""
    return llama.logits([[*sample.prompt, *sample.tokens]])[0, len(sample.prompt) - 1 :]


def _cut(rows: Sequence[tuple[str, list[int]]], most: int) -> list[tuple[str, list[int]]]:
    """The first rows, as many as have `most` tokens to predict; the last of them may be cut."""
    kept, left = [], most
    for name, row in rows:
        if left and len(row) > 1:
            kept.append((name, row[: left + 1]))
            left -= len(kept[-1][1]) - 1
    if not kept:
        raise LlamaError(ExitCode.BAD_REQUEST, "nothing to compare on: no text has 2 tokens; give --text FILE")
    if (total := sum(max(len(row) - 1, 0) for _, row in rows)) > most:
        distributed.note(f"note: compared on the first {most:,} of {total:,} tokens: config.max_tokens")
    return kept


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
