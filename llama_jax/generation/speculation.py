"""Several tokens a step: guesses, which one forward pass of the model checks (Leviathan et al. 2023, arXiv:2211.17192).

A guess is accepted where it is the token that the model draws there itself, with the key of that position: so the tokens are
those of plain decoding, with any settings, and not only their distribution. Guesses are what followed the last tokens where
they stood before ("lookup"), or the draws of a smaller model with the same keys, which agree wherever the two models nearly do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.config import ModelConfig
from llama_jax.generation import programs
from llama_jax.generation.reading import Reader
from llama_jax.generation.state import DecodeState, Output, by_rows, place, place_cache, replicate, row_keys
from llama_jax.model import KVCache, Params, grow_cache, hidden_states, logits, num_slots
from llama_jax.ops.kernels import Kernels
from llama_jax.ops.sampling import sample
from llama_jax.sharding import constrain

NGRAM = 3  # tokens that are looked up at most
LOOKUP_TOKENS, DRAFT_TOKENS = 7, 4  # guesses a step, when not given
SLACK = 128  # slots of a cache beyond the last token of a context: guesses there are written, too; as kernels cut a cache


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Where guesses come from.

    Attributes:
        num_draft: guesses a step.
        draft: of the smaller model; None to look them up.
    """

    num_draft: int
    draft: Reader | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculativeState:
    """A DecodeState and what guesses are made from.

    Attributes:
        tokens: [B, S] int32, prompt and answer, last_token at index lengths; anything after it.
        draft_cache: of the smaller model, filled as the target's is; None without one.
        steps: [B] int32, forward passes in which a row was under way.
    """

    target: DecodeState
    tokens: Array
    draft_cache: KVCache | None
    steps: Array


@functools.partial(jax.jit, donate_argnames=("target", "draft_cache"))
def start(target: DecodeState, tokens: Array, draft_cache: KVCache | None) -> SpeculativeState:
    """After prefill: tokens [B, T] are the prompts; both caches are donated."""
    tokens = jnp.pad(tokens, ((0, 0), (0, num_slots(target.cache) - tokens.shape[1])))
    tokens = _put(tokens, target.last_token[:, None], target.lengths, jnp.ones_like(target.lengths))
    if draft_cache is not None:
        draft_cache = grow_cache(draft_cache, num_slots(target.cache))
    return _place(SpeculativeState(target, tokens, draft_cache, jnp.zeros_like(target.lengths)))


@functools.partial(jax.jit, static_argnames="cache_length")
def grow(state: SpeculativeState, *, cache_length: int) -> SpeculativeState:
    """The same state with longer caches."""
    target = dataclasses.replace(state.target, cache=grow_cache(state.target.cache, cache_length))
    draft_cache = None if state.draft_cache is None else grow_cache(state.draft_cache, cache_length)
    tokens = jnp.pad(state.tokens, ((0, 0), (0, cache_length - state.tokens.shape[1])))
    return _place(dataclasses.replace(state, target=target, tokens=tokens, draft_cache=draft_cache))


@functools.partial(jax.jit, static_argnames=("cfg", "draft_cfg", "num_draft", "num_top", "kernels"), donate_argnames="state")
def speculate(
    cfg: ModelConfig,
    params: Params,
    state: SpeculativeState,
    halt: Array,
    n: Array,
    *,
    num_draft: int,
    num_top: int,
    draft_cfg: ModelConfig | None = None,
    draft_params: Params | None = None,
    kernels: Kernels = True,
) -> tuple[SpeculativeState, Output]:
    """n steps, each of which makes 1 to num_draft + 1 tokens a row.

    Args:
        state: donated; its caches have room for n * (num_draft + 1) more tokens in every row that is not done, and for
            num_draft + 1 in others. No row has a penalty or a bias.
        halt: [B] bool, rows that the host has ended.
        n: scalar, at most steps_of(num_draft).
        kernels: whether attention may use the platform's kernels.

    Returns:
        The state, and the tokens of every row in the first of so many columns; -1 after them.
    """
    B, columns = halt.shape[0], steps_of(num_draft) * (num_draft + 1)
    empty = Output(
        jnp.full((B, columns), -1, jnp.int32),
        jnp.zeros((B, columns)),
        jnp.zeros((B, columns, num_top), jnp.int32),
        jnp.zeros((B, columns, num_top)),
    )

    def more(carry) -> Array:
        step, state, _, _ = carry
        return (step < n) & ~jnp.all(state.target.done)

    def body(carry):
        step, state, made, outputs = carry
        if draft_cfg is None:
            guesses = look_up(state.tokens, state.target.lengths, num_draft)
        else:
            guesses, draft_cache = _guess(draft_cfg, draft_params, state, num_draft, kernels)
            state = dataclasses.replace(state, draft_cache=draft_cache)
        state, output, count = _check(cfg, params, state, guesses, num_top, kernels)
        outputs = jax.tree.map(lambda all, new: _put(all, new, made, count), outputs, output)
        return step + 1, _place(state), made + count, by_rows(outputs)

    target = dataclasses.replace(state.target, done=state.target.done | halt)
    state = _place(dataclasses.replace(state, target=target))
    _, state, _, outputs = jax.lax.while_loop(more, body, (jnp.int32(0), state, jnp.zeros(B, jnp.int32), by_rows(empty)))
    return _place(state), replicate(outputs)


def steps_of(num_draft: int) -> int:
    """Steps of one call: about as many tokens, at most, as `programs.decode` makes."""
    return max(1, programs.CHUNK // (num_draft + 1))


def look_up(tokens: Array, lengths: Array, num_draft: int) -> Array:
    """What followed the last tokens where they stood before (prompt lookup: Saxena 2023, apoorvumang/prompt-lookup-decoding).

    Of all earlier places the one that agrees in the most of the last NGRAM tokens, and of those the latest; where the text
    after it ends, it goes on from its beginning.

    Args:
        tokens: [B, S]; the last one of a row at index lengths.
        lengths: [B].

    Returns:
        [B, num_draft]; anything where nothing agrees.
    """
    S = tokens.shape[1]
    place = jnp.arange(S)
    agree, score = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for back in range(NGRAM):
        wanted = _one(tokens, lengths - back)[:, None]
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :S]
        agree &= (earlier == wanted) & (lengths[:, None] >= back)
        score += agree
    rank = jnp.where(place < lengths[:, None], score * S + place, -1)
    found = jnp.argmax(rank, axis=1)
    period = jnp.maximum(lengths - found, 1)
    following = found[:, None] + 1 + jnp.arange(num_draft) % period[:, None]
    return jnp.take_along_axis(tokens, following, axis=1)


def _guess(
    cfg: ModelConfig, params: Params, state: SpeculativeState, num_draft: int, kernels: Kernels
) -> tuple[Array, KVCache]:
    """The smaller model's own draws [B, num_draft]; its cache then has the last of them, too."""
    controls, lengths = state.target.controls, state.target.lengths

    def step(carry: tuple[Array, KVCache], i: Array) -> tuple[tuple[Array, KVCache], Array]:
        token, cache = carry
        x, cache = hidden_states(
            cfg, params, token[:, None], lengths[:, None] + i, cache, controls.rope_length, kernels=kernels
        )
        raw = constrain(logits(cfg, params, x)[:, 0], "batch", None)[:, : cfg.vocab_size]
        token = sample(raw, row_keys(controls.seed, lengths + 1 + i), controls.sampling)
        return (token, place_cache(cache)), token

    (_, cache), drawn = jax.lax.scan(step, (state.target.last_token, state.draft_cache), jnp.arange(num_draft + 1))
    return drawn[:num_draft].T, cache


def _check(
    cfg: ModelConfig, params: Params, state: SpeculativeState, guesses: Array, num_top: int, kernels: Kernels
) -> tuple[SpeculativeState, Output, Array]:
    """The tokens that plain decoding makes as far as guesses agree, and the one after: [B, K + 1], of each row so many."""
    target = state.target
    controls, B, K = target.controls, guesses.shape[0], guesses.shape[1]
    tokens = jnp.concatenate([target.last_token[:, None], guesses], axis=1)
    offsets = jnp.arange(K + 1)
    positions = target.lengths[:, None] + offsets
    x, cache = hidden_states(cfg, params, tokens, positions, target.cache, controls.rope_length, kernels=kernels)
    raw = constrain(logits(cfg, params, x), "batch", None, None)[..., : cfg.vocab_size]

    each = jax.tree.map(lambda a: jnp.repeat(a, K + 1, axis=0), (controls.seed, controls.sampling))
    keys = row_keys(each[0], (target.lengths[:, None] + 1 + offsets).reshape(-1))
    drawn = sample(raw.reshape(B * (K + 1), -1), keys, each[1]).reshape(B, K + 1)
    agreed = jnp.sum(jnp.cumprod(drawn[:, :K] == guesses, axis=1), axis=1)
    made = target.lengths - target.prompt_lengths + 2 + offsets[:, None]  # [K + 1, B]: tokens of the answer with this one
    ends = jnp.any(drawn[..., None] == controls.stop_ids[:, None], axis=-1) | (made.T >= controls.max_new[:, None])
    first_end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1), K + 1)
    count = jnp.where(target.done, 0, jnp.minimum(agreed, first_end) + 1)

    output = programs.report(raw, drawn, num_top)
    output = output._replace(tokens=jnp.where(offsets < count[:, None], drawn, -1))
    last_token = jnp.where(target.done, target.last_token, _one(drawn, count - 1))
    lengths = target.lengths + count
    done = target.done | (first_end < count)
    new = dataclasses.replace(target, last_token=last_token, lengths=lengths, done=done, cache=cache)
    steps = state.steps + ~target.done
    written = _put(state.tokens, drawn, target.lengths + 1, count)
    return dataclasses.replace(state, target=new, tokens=written, steps=steps), output, count


def cache_of(state: DecodeState | SpeculativeState) -> KVCache:
    """The target's."""
    return state.cache if isinstance(state, DecodeState) else state.target.cache


def _put(all: Array, new: Array, at: Array, count: Array) -> Array:
    """[B, S, ...] with the first count [B] of new [B, N, ...] from index `at` [B] on."""
    for i in range(new.shape[1]):
        here = (jnp.arange(all.shape[1]) == (at + i)[:, None]) & (i < count)[:, None]
        here = here.reshape(*here.shape, *[1] * (all.ndim - 2))
        all = jnp.where(here, new[:, i : i + 1], all)
    return all


def _one(x: Array, at: Array) -> Array:
    """[B, S] -> [B]: the element at an index of each row, 0 where it is outside."""
    return jnp.sum(jnp.where(jnp.arange(x.shape[1]) == at[:, None], x, 0), axis=1)


def _place(state: SpeculativeState) -> SpeculativeState:
    return SpeculativeState(
        place(state.target),
        constrain(state.tokens, "batch", None),
        None if state.draft_cache is None else place_cache(state.draft_cache),
        constrain(state.steps, "batch"),
    )
