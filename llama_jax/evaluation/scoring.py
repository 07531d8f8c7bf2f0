"""How likely continuations are after their contexts: token ids in, sums of log-probabilities out.

What requests have in common is computed once. Continuations of one token are read from one row of logits; longer ones of the
same context from its keys and values, where that is less work than reading context and continuation together. Batches are of
sequences about as long, in buckets, so that few programs are compiled.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.llama import Llama
from llama_jax.generation.programs import report
from llama_jax.generation.reading import MIN_PROMPT_BUCKET, bucket
from llama_jax.generation.state import Output, place_cache, replicate
from llama_jax.model import KVCache, Params, grow_cache, hidden_states, logits, num_slots
from llama_jax.ops.kernels import Kernels

Tokens = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]  # context and continuation, neither empty

MIN_TAIL_BUCKET = 4
QUESTIONS = 64  # positions whose logits exist at once


class Question(NamedTuple):
    """How likely `target` is after the token at `position` of a row; a part of request number `request`."""

    position: int
    target: int
    request: int


class Tail(NamedTuple):
    """Tokens that follow what a Reading has read; positions of its questions count from the tail's beginning."""

    tokens: Tokens
    questions: list[Question]


class Reading(NamedTuple):
    """Tokens that are read once, what is asked about them, and what else is read after them."""

    tokens: Tokens
    questions: list[Question]
    tails: list[Tail]

    @property
    def shape(self) -> tuple[int, int]:
        """What decides which program it needs."""
        longest = max((len(tail.tokens) for tail in self.tails), default=0)
        return bucket(len(self.tokens), 2**30, MIN_PROMPT_BUCKET), longest and bucket(longest, 2**30, MIN_TAIL_BUCKET)


def log_likelihoods(
    llama: Llama, requests: Sequence[Request], batch_size: int, progress: Callable[[int], None] = lambda n: None
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation after its context, and whether greedy decoding would have written it.

    A context loses its beginning where both together are longer than max_length + 1 tokens (the last is only predicted).

    Args:
        requests: token ids; no part may be empty, and no continuation longer than max_length.
        batch_size: the most sequences that are read at once.
        progress: called with the number of requests that are done since the last call.
    """
    for context, continuation in requests:
        if not context or not 1 <= len(continuation) <= llama.max_length:
            raise LlamaError(
                ExitCode.BAD_REQUEST,
                f"{len(context):,} tokens of context and {len(continuation):,} of continuation: expected at least 1 each, and "
                f"at most max_length ({llama.max_length:,}) of the second: shorten it, or raise max_length",
            )
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    unanswered = np.array([len(continuation) for _, continuation in requests])
    shareable = llama.config.rope_type != "dynamic"  # whose keys depend on the length of the whole
    for batch in batches(plan(requests, llama.max_length, batch_size, shareable), batch_size):
        for question, logprob, likeliest in _answers(llama, batch):
            sums[question.request] += logprob
            greedy[question.request] &= likeliest == question.target
            unanswered[question.request] -= 1
        done = int(np.sum(unanswered == 0))
        unanswered[unanswered == 0] = -1
        progress(done)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def plan(requests: Sequence[Request], max_length: int, batch_size: int, shareable: bool = True) -> list[Reading]:
    """What to read for these requests: no sequence twice, and no context twice where that is less work.

    Args:
        shareable: whether a context's keys are good for every continuation.
    """
    by_context: dict[Tokens, dict[Tokens, list[tuple[int, Tokens]]]] = {}
    for number, (context, continuation) in enumerate(requests):
        context = tuple(context)[len(continuation) - max_length - 1 :]
        continuation = tuple(continuation)
        by_tail = by_context.setdefault(context, {})
        by_tail.setdefault(continuation[:-1], []).append((number, continuation))
    readings = []
    for context, by_tail in by_context.items():
        once = shareable and _saves(context, by_tail)
        readings += _shared(context, by_tail, batch_size) if once else _whole(context, by_tail)
    return readings


def batches(readings: Sequence[Reading], batch_size: int) -> Iterator[list[Reading]]:
    """Readings that run together, the longest first: alike in shape, at most batch_size rows of them or of their tails."""
    ordered = sorted(readings, key=lambda r: (bool(r.tails), *r.shape, len(r.tokens)), reverse=True)
    batch: list[Reading] = []
    rows = 0
    for reading in ordered:
        wanted = max(1, len(reading.tails))
        alike = not batch or (reading.shape == batch[0].shape if reading.tails else not batch[0].tails)
        if batch and (not alike or rows + wanted > batch_size):
            yield batch
            batch, rows = [], 0
        batch.append(reading)
        rows += wanted
    if batch:
        yield batch


def _saves(context: Tokens, by_tail: dict[Tokens, list]) -> bool:
    """Whether fewer tokens are read, padding included, if the context is read by itself."""
    tails = [tail for tail in by_tail if tail]
    apart = sum(bucket(len(context) + len(tail), 2**30, MIN_PROMPT_BUCKET) for tail in tails)
    longest = bucket(max(map(len, tails), default=0), 2**30, MIN_TAIL_BUCKET)
    return bucket(len(context), 2**30, MIN_PROMPT_BUCKET) + len(tails) * longest < apart


def _shared(context: Tokens, by_tail: dict[Tokens, list[tuple[int, Tokens]]], batch_size: int) -> list[Reading]:
    """The context, then its tails; once more for every batch of tails."""
    first = [Question(len(context) - 1, continuation[0], n) for asked in by_tail.values() for n, continuation in asked]
    tails = [
        Tail(tail, [Question(i, continuation[i + 1], n) for n, continuation in asked for i in range(len(tail))])
        for tail, asked in sorted(by_tail.items(), key=lambda item: -len(item[0]))
        if tail
    ]
    starts = range(0, len(tails), batch_size)
    return [Reading(context, [] if start else first, tails[start : start + batch_size]) for start in starts]


def _whole(context: Tokens, by_tail: dict[Tokens, list[tuple[int, Tokens]]]) -> list[Reading]:
    """Context and tail in one row, each; what is asked after the context alone is asked of any of them."""
    rows = {tail: [] for tail in by_tail if tail or len(by_tail) == 1}
    for tail, asked in by_tail.items():
        home = tail if tail in rows else next(iter(rows))
        for n, continuation in asked:
            rows[home] += [Question(len(context) - 1 + i, target, n) for i, target in enumerate(continuation)]
    return [Reading(context + tail, questions, []) for tail, questions in rows.items()]


def _answers(llama: Llama, batch: Sequence[Reading]) -> Iterator[tuple[Question, float, int]]:
    """Every question of a batch with the log-probability of its target and the likeliest token."""
    engine = llama.engine
    tokens, lengths = engine.pad([reading.tokens for reading in batch], engine.batch(len(batch)))
    tails = [(b, tail) for b, reading in enumerate(batch) for tail in reading.tails]
    options = dict(kernels=engine.kernels)
    x, cache = engine.on_mesh(read, llama.config, llama.params, tokens, lengths, keep=bool(tails), **options)
    yield from _ask(llama, x, [(b, question) for b, reading in enumerate(batch) for question in reading.questions])
    if not tails:
        return
    rows, starts = np.zeros((2, engine.batch(len(tails))), np.int32)
    padded = np.zeros((len(rows), batch[0].shape[1]), np.int32)
    for c, (b, tail) in enumerate(tails):
        rows[c], starts[c] = b, len(batch[b].tokens)
        padded[c, : len(tail.tokens)] = tail.tokens
    x = engine.on_mesh(read_tails, llama.config, llama.params, cache, rows, padded, starts, **options)
    yield from _ask(llama, x, [(c, question) for c, (_, tail) in enumerate(tails) for question in tail.questions])


def _ask(llama: Llama, x: Array, asked: Sequence[tuple[int, Question]]) -> list[tuple[Question, float, int]]:
    """Answers questions about rows of x, [B, T, D]."""
    found: list[Output] = []
    for first in range(0, len(asked), QUESTIONS):
        part = asked[first : first + QUESTIONS]
        where = np.zeros((3, QUESTIONS), np.int32)
        where[:, : len(part)] = np.transpose([(row, question.position, question.target) for row, question in part])
        found.append(llama.engine.on_mesh(judge, llama.config, llama.params, x, *where))
    logprobs = np.concatenate([np.asarray(output.logprobs) for output in found] or [[]])
    likeliest = np.concatenate([np.asarray(output.top_ids)[:, 0] for output in found] or [[]])
    return [(q, float(logprobs[i]), int(likeliest[i])) for i, (_, q) in enumerate(asked)]


@functools.partial(jax.jit, static_argnames=("cfg", "keep", "kernels"))
def read(
    cfg: ModelConfig, params: Params, tokens: Array, lengths: Array, *, keep: bool, kernels: Kernels
) -> tuple[Array, KVCache | None]:
    """[B, T] with their lengths [B] -> [B, T, D] before the final norm, and the cache if it is kept."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = hidden_states(cfg, params, tokens, positions, rope_length=lengths, kernels=kernels)
    return x, place_cache(cache) if keep else None


@functools.partial(jax.jit, static_argnames=("cfg", "kernels"))
def read_tails(
    cfg: ModelConfig, params: Params, cache: KVCache, rows: Array, tokens: Array, starts: Array, *, kernels: Kernels
) -> Array:
    """Reads on after rows of a cache.

    Args:
        cache: of B sequences.
        rows: [C], which of them each tail follows.
        tokens: [C, T], tails, padded on the right.
        starts: [C], how long what they follow is.

    Returns:
        [C, T, D] before the final norm.
    """
    cache = jax.tree.map(lambda x: x[rows], cache)
    cache = place_cache(grow_cache(cache, num_slots(cache) + tokens.shape[1]))
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    return hidden_states(cfg, params, tokens, positions, cache, kernels=kernels)[0]


@functools.partial(jax.jit, static_argnames="cfg")
def judge(cfg: ModelConfig, params: Params, x: Array, rows: Array, positions: Array, targets: Array) -> Output:
    """Log-probability [M] of targets [M] after x[rows, positions], and the likeliest tokens, [M, 1]; x: [B, T, D]."""
    raw = logits(cfg, params, x[rows, positions][None])[0, :, : cfg.vocab_size]
    return replicate(report(raw, targets, 1))
