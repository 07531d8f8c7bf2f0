"""The compiled programs: prefill, decode, and what goes around them. Arrays in, arrays out; the host loop is in engine.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.config import ModelConfig
from llama_jax.generation.state import (
    Controls,
    DecodeState,
    Output,
    by_rows,
    is_axes,
    new_history,
    place,
    place_cache,
    replicate,
    row_keys,
)
from llama_jax.model import KVCache, Params, cache_axes, empty_cache, grow_cache, hidden_states, logits, num_slots, round_cache
from llama_jax.ops.kernels import Kernels
from llama_jax.ops.sampling import penalise, sample, top_k
from llama_jax.sharding import constrain

CHUNK = 32  # the most tokens one decode call makes
SCORE_SLICE = 64  # positions whose logits exist at once
CACHED_SLICE = 128  # positions that read a rounded cache at once


@functools.partial(jax.jit, static_argnames=("cfg", "cache_length", "num_top", "kernels", "cache_dtype"))
def prefill(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    lengths: Array,
    controls: Controls,
    *,
    cache_length: int,
    num_top: int,
    kernels: Kernels = True,
    cache_dtype: str = "auto",
) -> tuple[DecodeState, Output]:
    """Reads the prompts and chooses the first token of each answer. It attends with keys and values as they were computed, and
    stores them rounded where the cache is.

    Args:
        tokens: [B, T] int32, padded on the right with any token.
        lengths: [B] int32, at least 1.
        cache_length: S of the state's cache, at least T.
        num_top: alternatives to report per token.
        kernels: whether attention may use the platform's kernel.
        cache_dtype: one of llama_jax.choices.CACHE_DTYPES.

    Returns:
        The state, and the first token of every row ([B, 1]).
    """
    options = dict(cache_length=cache_length, kernels=kernels, cache_dtype=cache_dtype)
    cache, last = read(cfg, params, tokens, lengths, controls.rope_length, **options)
    return begin(cfg, params, cache, last, tokens, lengths, controls, num_top=num_top)


@functools.partial(jax.jit, static_argnames=("cfg", "cache_length", "kernels", "cache_dtype"))
def read(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    lengths: Array,
    rope_length: Array,
    *,
    cache_length: int,
    kernels: Kernels = True,
    cache_dtype: str = "auto",
) -> tuple[KVCache, Array]:
    """Reads the first tokens of prompts, as `prefill` does, and chooses nothing: `extend` reads on, `begin` chooses.

    Args:
        tokens: [B, T] int32, the first T of every prompt.
        lengths: [B] int32, of the whole prompts.

    Returns:
        The cache, and [B, 1, D]: what the layers make of each prompt's last token, zeros where that is still to come.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = hidden_states(cfg, params, tokens, positions, rope_length=rope_length, kernels=kernels)
    return place_cache(grow_cache(round_cache(cache, cache_dtype), cache_length)), _at(x, positions, lengths - 1)


@functools.partial(jax.jit, static_argnames=("cfg", "kernels"), donate_argnames=("cache", "last"))
def extend(
    cfg: ModelConfig,
    params: Params,
    cache: KVCache,
    last: Array,
    tokens: Array,
    start: Array,
    lengths: Array,
    rope_length: Array,
    *,
    kernels: Kernels = True,
) -> tuple[KVCache, Array]:
    """Reads the next T tokens of prompts; the arguments' and results' meaning is `read`'s. Of a rounded cache they read rounded
    keys and values.

    Args:
        cache: donated; the first `start` tokens of every row, and room for T more.
        last: donated.
        tokens: [B, T] int32.
        start: scalar, so that programs do not depend on it.
    """
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = hidden_states(cfg, params, tokens, positions, cache, rope_length, kernels=kernels)
    return place_cache(cache), last + _at(x, positions, lengths - 1)


@functools.partial(jax.jit, static_argnames=("cfg", "num_top"), donate_argnames="cache")
def begin(
    cfg: ModelConfig,
    params: Params,
    cache: KVCache,
    last: Array,
    tokens: Array | None,
    lengths: Array,
    controls: Controls,
    *,
    num_top: int,
) -> tuple[DecodeState, Output]:
    """Chooses the first token of each answer from what `read` and `extend` left, as `prefill` does.

    Args:
        cache: donated.
        tokens: [B, T], the whole prompts; needed where controls have a bias.
    """
    state = DecodeState(
        last_token=jnp.zeros_like(lengths),
        lengths=lengths,
        prompt_lengths=lengths,
        done=controls.max_new <= 0,
        cache=cache,
        controls=controls,
        history=None if controls.bias is None else new_history(tokens, lengths, controls.bias),
    )
    state, output = _choose(cfg, state, logits(cfg, params, last)[:, 0], num_top)
    return place(state), replicate(jax.tree.map(lambda x: x[:, None], output))


@functools.partial(jax.jit, static_argnames=("batch", "cache_length"))
def spread(cache: KVCache, *, batch: int, cache_length: int) -> KVCache:
    """One sequence's cache [1, K', S, H] -> the same in every row of a batch, with as many slots as asked for."""
    kept = min(cache_length, num_slots(cache))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :, :kept], (batch, *x[:, :, :kept].shape[1:])), cache)
    return place_cache(grow_cache(rows, cache_length))


@jax.jit
def first_row(cache: KVCache) -> KVCache:
    """The cache of the first sequence [1, K', S, H], on a mesh a copy on every device of a row."""
    return jax.tree.map(lambda axes, x: constrain(x[:1], None, *axes[1:]), cache_axes(cache), cache, is_leaf=is_axes)


@functools.partial(jax.jit, static_argnames=("cfg", "num_top", "kernels"), donate_argnames="state")
def decode(
    cfg: ModelConfig, params: Params, state: DecodeState, halt: Array, n: Array, *, num_top: int, kernels: Kernels = True
) -> tuple[DecodeState, Output]:
    """Makes up to n tokens a row in one program: forward, sampling and stopping all on the device.

    Args:
        state: donated; its cache has room for n more tokens in every row that is not done.
        halt: [B] bool, rows that the host has ended (a stop string, a reader who left).
        n: scalar, at most CHUNK; not a constant of the program, so a reader in a hurry and a batch job share it.
        kernels: whether attention may use the platform's kernels.

    Returns:
        The state, and n tokens a row in the first columns of [B, CHUNK].
    """
    B = state.done.shape[0]
    empty = Output(
        jnp.full((B, CHUNK), -1, jnp.int32),
        jnp.zeros((B, CHUNK)),
        jnp.zeros((B, CHUNK, num_top), jnp.int32),
        jnp.zeros((B, CHUNK, num_top)),
    )

    def more(carry) -> Array:
        step, state, _ = carry
        return (step < n) & ~jnp.all(state.done)

    def body(carry):
        step, state, outputs = carry
        state, output = _decode_step(cfg, params, state, num_top, kernels)
        outputs = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, step, 1), outputs, output)
        return step + 1, place(state), by_rows(outputs)

    state = place(dataclasses.replace(state, done=state.done | halt))
    _, state, outputs = jax.lax.while_loop(more, body, (jnp.int32(0), state, by_rows(empty)))
    return place(state), replicate(outputs)


@functools.partial(jax.jit, static_argnames="cache_length")
def grow(state: DecodeState, *, cache_length: int) -> DecodeState:
    """The same state with a longer cache."""
    return place(dataclasses.replace(state, cache=grow_cache(state.cache, cache_length)))


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, slot: Array, row: DecodeState) -> DecodeState:
    """Puts the first row of a state (of the same cache length) into a row of a batch, in place.

    On a mesh the state has as many rows as the mesh divides, and its first moves to the devices of the slot.
    """
    return place(jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one[0], slot, 0), state, row))


@functools.partial(jax.jit, static_argnames=("cfg", "num_top", "kernels", "cache_dtype"))
def score(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    rope_length: Array,
    *,
    num_top: int,
    kernels: Kernels = True,
    cache_dtype: str = "auto",
) -> Output:
    """How likely each token is after those before it: [B, T] -> Output of [B, T - 1] for tokens[:, 1:].

    The head is applied to a slice of positions at a time: [B, T, V] in float32 never exists.
    """
    B, T = tokens.shape
    x = _whole_states(cfg, params, tokens, rope_length, kernels, cache_dtype)
    slices = -(-T // SCORE_SLICE)
    pad = slices * SCORE_SLICE - T
    x = constrain(x, "batch", "length", "act_embed")
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(B, slices, SCORE_SLICE, -1)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, pad + 1))).reshape(B, slices, SCORE_SLICE)

    def score_slice(i: Array) -> Output:
        return report(logits(cfg, params, x[:, i]), targets[:, i], num_top)

    outputs = jax.lax.map(score_slice, jnp.arange(slices))  # [slices, B, SCORE_SLICE, ...]
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, slices * SCORE_SLICE, *x.shape[3:])[:, : T - 1], outputs)
    return replicate(rows)


@functools.partial(jax.jit, static_argnames=("cfg", "kernels", "cache_dtype"))
def all_logits(
    cfg: ModelConfig, params: Params, tokens: Array, rope_length: Array, *, kernels: Kernels = True, cache_dtype: str = "auto"
) -> Array:
    """[B, T] -> [B, T, V'] float32, divided over the mesh."""
    return logits(cfg, params, _whole_states(cfg, params, tokens, rope_length, kernels, cache_dtype))


def _whole_states(
    cfg: ModelConfig, params: Params, tokens: Array, rope_length: Array, kernels: Kernels, cache_dtype: str
) -> Array:
    """[B, T, D] of sequences from their beginning; every token reads a rounded cache as it would when decoded."""
    B, T = tokens.shape
    if cache_dtype == "auto":
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        return hidden_states(cfg, params, tokens, positions, rope_length=rope_length, kernels=kernels)[0]
    size = min(T, CACHED_SLICE)
    starts = jnp.arange(0, T, size)
    parts = jnp.pad(tokens, ((0, 0), (0, len(starts) * size - T))).reshape(B, len(starts), size)

    def read(cache: KVCache, part: tuple[Array, Array]) -> tuple[KVCache, Array]:
        tokens, start = part
        positions = jnp.broadcast_to(start + jnp.arange(size), (B, size))
        return hidden_states(cfg, params, tokens, positions, cache, rope_length, kernels=kernels)[::-1]

    cache = empty_cache(cfg, (B, len(starts) * size), params["embedding"].dtype, cache_dtype)
    _, x = jax.lax.scan(read, cache, (parts.swapaxes(0, 1), starts))  # [slices, B, size, D]
    return x.swapaxes(0, 1).reshape(B, len(starts) * size, -1)[:, :T]


def _at(x: Array, positions: Array, wanted: Array) -> Array:
    """[B, T, D] at one position a row: [B, 1, D]; zeros where it is not among them."""
    # A sum of one position and zeros, where indexing would gather a sequence that lies on several devices.
    return jnp.sum(jnp.where((positions == wanted[:, None])[..., None], x, 0), axis=1, keepdims=True)


def _decode_step(
    cfg: ModelConfig, params: Params, state: DecodeState, num_top: int, kernels: Kernels
) -> tuple[DecodeState, Output]:
    tokens, positions = state.last_token[:, None], state.lengths[:, None]
    x, cache = hidden_states(cfg, params, tokens, positions, state.cache, state.controls.rope_length, kernels=kernels)
    lengths = jnp.where(state.done, state.lengths, state.lengths + 1)
    state = dataclasses.replace(state, cache=cache, lengths=lengths)
    return _choose(cfg, state, logits(cfg, params, x, kernels=kernels)[:, 0], num_top)


def _choose(cfg: ModelConfig, state: DecodeState, raw: Array, num_top: int) -> tuple[DecodeState, Output]:
    """Samples the token that follows `lengths` tokens, reports it and decides which rows end with it.

    Args:
        raw: [B, V'] float32 logits; gathered here, once a step: sampling needs a row whole.
    """
    raw = constrain(raw, "batch", None)[:, : cfg.vocab_size]
    controls, history = state.controls, state.history
    adjusted = raw if history is None else penalise(raw, history, controls.sampling)
    token = sample(adjusted, row_keys(controls.seed, state.lengths), controls.sampling)
    output = report(raw, token, num_top)._replace(tokens=jnp.where(state.done, -1, token))
    if history is not None:
        counts = history.counts.at[jnp.arange(token.shape[0]), token].add(jnp.where(state.done, 0, 1))
        history = history._replace(counts=counts)
    made = state.lengths - state.prompt_lengths + 1
    ends = jnp.any(token[:, None] == controls.stop_ids, axis=-1) | (made >= controls.max_new)
    last_token = jnp.where(state.done, state.last_token, token)
    return dataclasses.replace(state, last_token=last_token, done=state.done | ends, history=history), output


def report(raw: Array, token: Array, num_top: int) -> Output:
    """Tokens [...] with their log-probabilities [...] and the likeliest alternatives [..., num_top]; raw: [..., V]."""
    normaliser = jax.nn.logsumexp(raw, axis=-1, keepdims=True)
    # A sum of one logit and zeros, where indexing would gather a vocabulary that lies on several devices.
    chosen = jnp.sum(jnp.where(jnp.arange(raw.shape[-1]) == token[..., None], raw, 0), axis=-1, keepdims=True) - normaliser
    top, ids = top_k(raw, num_top)
    return Output(token, chosen[..., 0], ids, top - normaliser)
