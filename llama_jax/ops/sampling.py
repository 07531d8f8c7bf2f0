"""From logits to the next token: penalties, temperature, truncation, one draw. Every row has its own settings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.sharding import constrain, mesh_axis_size


class Sampling(NamedTuple):
    """How each row samples; all [B].

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token; penalties of 1 (repetition) and 0 (frequency,
    presence) change nothing.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition: Array
    frequency: Array
    presence: Array


class History(NamedTuple):
    """What penalties look at, and the bias; all [B, V]: tokens of the prompt (bool), counts of generated tokens, bias."""

    in_prompt: Array
    counts: Array
    bias: Array


def penalise(logits: Array, history: History, sampling: Sampling) -> Array:
    """Lowers the logits of tokens already seen, then adds the bias.

    Repetition, over prompt and answer: positive logits are divided, negative multiplied (Keskar et al. 2019, arXiv:1909.05858,
    section 4.1). Frequency and presence, over the answer only: l - count * frequency - (count > 0) * presence (OpenAI API).

    Args:
        logits: [B, V] float32.
    """
    repetition, frequency, presence = (x[:, None] for x in (sampling.repetition, sampling.frequency, sampling.presence))
    seen = history.in_prompt | (history.counts > 0)
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, scaled, logits)
    return logits - history.counts * frequency - (history.counts > 0) * presence + history.bias


def sample(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """Draws a token per row: temperature, then top-k, then top-p, then min-p, each over what the one before left.

    A draw is the largest of logits plus noise (Gumbel 1954), and the noise is a token's own, wherever it ranks: from one key
    nearly the same probabilities nearly always draw the same token.

    Args:
        logits: [B, V] float32.
        keys: [B] PRNG keys, used once.

    Returns:
        [B] int32. Rows with temperature 0 take the largest logit, the first of equals.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_) -> Array:
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)  # before dividing: a tiny temperature overflows
        scaled = shifted / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        noise = jnp.take_along_axis(noise, order, axis=-1)
        rank = jnp.argmax(jnp.where(keep(ranked, sampling), ranked + noise, -jnp.inf), axis=-1)
        token = jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, token, greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda _: greedy, None)


def keep(ranked: Array, sampling: Sampling) -> Array:
    """Which of the ranked tokens stay; the first always does.

    top-p is Meta's rule: with c the inclusive cumulative probability, token i goes when c_i - p_i > p, so the token that
    crosses p stays (facebookresearch/llama generation.py, sample_top_p). min-p drops what is less than that share of the
    likeliest (Nguyen et al. 2024, arXiv:2407.01082).

    Args:
        ranked: [B, V] logits, largest first, already divided by the temperature.

    Returns:
        [B, V] bool.
    """
    V = ranked.shape[-1]
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, V)[:, None]
    in_top_k = jnp.arange(V) < top_k
    probs = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    in_top_p = jnp.cumsum(probs, axis=-1) - probs <= sampling.top_p[:, None]
    in_min_p = probs >= sampling.min_p[:, None] * probs[:, :1]
    return (in_top_k & in_top_p & in_min_p).at[:, 0].set(True)


def top_k(logits: Array, k: int) -> tuple[Array, Array]:
    """The k largest of [..., V] and their ids (int32), the first of equals first.

    A vocabulary that lies on several devices is not gathered: each gives its k largest, and the largest of those are taken.
    """
    V, parts = logits.shape[-1], mesh_axis_size("tensor")
    if V % parts or k == 0 or k > V // parts:
        values, ids = jax.lax.top_k(logits, k)
        return values, ids.astype(jnp.int32)
    batch = ("batch",) + (None,) * (logits.ndim - 2)
    local = constrain(logits.reshape(*logits.shape[:-1], parts, V // parts), *batch, "vocab", None)
    values, ids = jax.lax.top_k(local, k)
    ids = ids + jnp.arange(parts)[:, None] * (V // parts)
    values, ids = (constrain(x.reshape(*x.shape[:-2], parts * k), *batch, None) for x in (values, ids))
    values, rank = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, rank, axis=-1).astype(jnp.int32)
