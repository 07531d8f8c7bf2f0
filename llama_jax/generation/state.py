"""What a batch of sequences carries from one decode step to the next."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.model import KVCache, cache_axes
from llama_jax.ops.sampling import History, Sampling
from llama_jax.sharding import constrain

MAX_STOP_IDS = 8
MAX_TOP_LOGPROBS = 20


class Controls(NamedTuple):
    """What each row asked for.

    Attributes:
        sampling: arrays [B].
        seed: [B, 3] uint32: high and low word of the request's seed, and which of its samples this is.
        max_new: [B] int32, tokens to generate; 0 in rows that only fill the batch.
        stop_ids: [B, 8] int32, -1 where unused.
        rope_length: [B] int32, tokens the sequence may reach (read by `dynamic` RoPE only).
        bias: [B, V] float32, or None when no row uses a bias or a penalty.
    """

    sampling: Sampling
    seed: Array
    max_new: Array
    stop_ids: Array
    rope_length: Array
    bias: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Every row has its own length and settings.

    Attributes:
        last_token: [B] int32, chosen but not yet in the cache.
        lengths: [B] int32, tokens in the cache.
        prompt_lengths: [B] int32.
        done: [B] bool.
        cache: per layer k, v [B, K', S, H], of the compute dtype or QVectors of int8.
        controls: what each row asked for.
        history: [B, V] arrays when a row uses a penalty or a bias, else None.
    """

    last_token: Array
    lengths: Array
    prompt_lengths: Array
    done: Array
    cache: KVCache
    controls: Controls
    history: History | None


class Prefix(NamedTuple):
    """What one sequence has read.

    tokens: their ids; cache: per layer k, v [1, K', S, H], the first len(tokens) slots filled.
    """

    tokens: tuple[int, ...]
    cache: KVCache


class Output(NamedTuple):
    """Tokens of n steps. A finished row has -1.

    tokens, logprobs: [B, n]; top_ids, top_logprobs: [B, n, k]. Log-probabilities are of the model itself: before penalties,
    bias, temperature and truncation.
    """

    tokens: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


def state_axes(state: DecodeState) -> DecodeState:
    """Logical axes of every array of a state: rows are divided over data and fsdp, key/value heads over tensor."""
    rows = jax.tree.map(lambda x: ("batch",) + (None,) * (x.ndim - 1), dataclasses.replace(state, cache=[]))
    return dataclasses.replace(rows, cache=cache_axes(state.cache))


def place(state: DecodeState) -> DecodeState:
    """Keeps a state where it belongs on the mesh, so that the next step finds, and overwrites, it there."""
    return jax.tree.map(lambda axes, x: constrain(x, *axes), state_axes(state), state, is_leaf=is_axes)


def place_cache(cache: KVCache) -> KVCache:
    """The same of a cache that is not in a state."""
    return jax.tree.map(lambda axes, x: constrain(x, *axes), cache_axes(cache), cache, is_leaf=is_axes)


def by_rows(output: Output) -> Output:
    """Divided as the rows are, while a chunk is made."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), output)


def replicate(output: Output) -> Output:
    """Every process reads all tokens, so that all stop alike."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), output)


def is_axes(leaf: object) -> bool:
    """Whether a leaf of a tree of logical axes."""
    return type(leaf) is tuple


def row_keys(seed: Array, positions: Array) -> Array:
    """The PRNG key of each row at each position: the request's seed, folded with the sample's number and the position.

    So the draw depends on nothing else: not on the batch, the chunk or the step count.
    """

    def key(words: Array, position: Array) -> Array:
        root = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(root, words[2]), position)

    return jax.vmap(key)(seed, positions)


def new_history(tokens: Array, lengths: Array, bias: Array) -> History:
    """History of prompts [B, T] with their lengths [B]."""
    B, T = tokens.shape
    real = jnp.arange(T) < lengths[:, None]
    in_prompt = jnp.zeros(bias.shape, bool).at[jnp.arange(B)[:, None], tokens].max(real)
    return History(in_prompt, jnp.zeros(bias.shape, jnp.int32), bias)
