"""Attention of many tokens on GPUs, of whole sequences with gradients, or to a cache: FlashAttention-2 (Dao 2023,
arXiv:2307.08691) in Pallas, compiled by Triton.

Scores are never held, a key/value head is read by all its query heads in place, and blocks that lie above the diagonal or in
other segments are not visited. jax's own kernel (pallas.ops.gpu.attention) needs keys repeated per query head and visits every
segment, and it is deprecated; cuDNN's takes no segments.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

LENGTH_MULTIPLE = 128  # of the largest tile
CACHED_MULTIPLE = 64  # of tokens and slots of a cache
HEAD_DIMS = (64, 128)
LOWEST = -1e30  # that a query's highest score is taken to be; finite, so that a block of scores of -inf leaves no NaN


# A model's layers then share one trace, and a rematerialised one drops a kernel whose results it has saved.
_once_per_shape = functools.partial(jax.jit, static_argnames=("tile", "interpret"))


class Tile(NamedTuple):
    """How a kernel cuts the scores: rows of queries and of keys at a time, warps that share them, blocks loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the forward kernel, and of the two that make the gradients of q and of k and v.

    The fastest of five each on an H200, rows of five segments (benchmarks/gpu_attention.py): small ones skip more.
    """

    forward: Tile = Tile(64, 64, 4, 3)
    dq: Tile = Tile(64, 64, 4, 2)
    dkv: Tile = Tile(64, 64, 4, 2)


TILES = Tiles()


class Spans(NamedTuple):
    """Which blocks have a segment in common.

    Attributes:
        ids: [B, T] segments.
        first_forward, first_dq: [B, T/queries] the first block of keys that a block of queries meets.
        end_dkv: [B, T/keys] one past the last block of queries that a block of keys meets.
    """

    ids: Array
    first_forward: Array
    first_dq: Array
    end_dkv: Array


def supports(length: int, head_dim: int) -> bool:
    """Whether sequences of this length and heads of this width can be cut into the kernels' tiles."""
    return length % LENGTH_MULTIPLE == 0 and head_dim in HEAD_DIMS


def supports_cached(length: int, slots: int, head_dim: int) -> bool:
    """Whether so many tokens of a row, and so many slots of a cache, can be cut into the kernel's tiles."""
    return length % CACHED_MULTIPLE == 0 and slots % CACHED_MULTIPLE == 0 and head_dim in HEAD_DIMS


def attend_flash(
    q: Array, k: Array, v: Array, segment_ids: Array | None, *, tiles: Tiles = TILES, interpret: bool = False
) -> Array:
    """ops.attention.attend_causal by the kernels; what they save for the backward pass is named "attention" (for remat).

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H]; segment_ids: [B, T] or None.
        tiles: sizes that divide T.
        interpret: run it in JAX operations (for tests on a CPU).
    """
    spans = None if segment_ids is None else segment_spans(segment_ids, tiles)
    return _attend(q, k, v, spans, tiles, interpret)


def segment_spans(segment_ids: Array, tiles: Tiles) -> Spans:
    """Where blocks of queries and keys meet: as far as the ranges of their segments' numbers overlap, so that numbers in any
    order are right, and rising ones are skipped where they can be."""

    def ranges(block: int) -> tuple[Array, Array]:
        blocks = segment_ids.reshape(segment_ids.shape[0], -1, block)
        return blocks.min(axis=2), blocks.max(axis=2)

    def meets(tile: Tile) -> Array:
        """[B, T/queries, T/keys]"""
        (q_low, q_high), (k_low, k_high) = ranges(tile.queries), ranges(tile.keys)
        return (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])

    def first(tile: Tile) -> Array:
        return jnp.argmax(meets(tile), axis=2).astype(jnp.int32)

    backwards = meets(tiles.dkv)[:, ::-1]
    end = backwards.shape[1] - jnp.argmax(backwards, axis=1).astype(jnp.int32)
    return Spans(segment_ids, first(tiles.forward), first(tiles.dq), end)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, spans: Spans | None, tiles: Tiles, interpret: bool) -> Array:
    return _forward(q, k, v, spans, tiles.forward, interpret)[0]


def _attend_forward(q: Array, k: Array, v: Array, spans: Spans | None, tiles: Tiles, interpret: bool) -> tuple[Array, tuple]:
    out, log_sums = _forward(q, k, v, spans, tiles.forward, interpret)
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "attention")
    return out, (q, k, v, spans, out, log_sums)


def _attend_backward(tiles: Tiles, interpret: bool, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, spans, out, log_sums = saved
    products = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=3).swapaxes(1, 2)  # [B, N, T]
    rest = (d_out, log_sums, products, spans)
    return _d_queries(q, k, v, *rest, tiles.dq, interpret), *_d_keys_values(q, k, v, *rest, tiles.dkv, interpret), None


_attend.defvjp(_attend_forward, _attend_backward)


@_once_per_shape
def attend_flash_cached(
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    tile: Tile = TILES.forward,
    interpret: bool = False,
) -> Array:
    """ops.attention.attend_cached of consecutive tokens, which are in the cache: blocks of slots that they see are read.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H], of q's dtype, or int8 with scales.
        starts: [B] int32, of the first token of each row; T more slots are there.
        k_scale, v_scale: [B, K, S] float32; they multiply scores and probabilities.
        tile: sizes that divide T and S.
        interpret: run it in JAX operations (for tests on a CPU).
    """
    scales = () if k_scale is None else (k_scale, v_scale)
    (out,) = _call_forward(q, k, v, (starts.astype(jnp.int32), *scales), tile, interpret, cached=True)
    return out


@_once_per_shape
def _forward(q: Array, k: Array, v: Array, spans: Spans | None, tile: Tile, interpret: bool) -> tuple[Array, Array]:
    """Returns out [B, T, N, H] and, of every query's scores in base 2, the logarithm of their exponentials' sum [B, N, T]."""
    more = () if spans is None else (spans.ids, spans.first_forward)
    return _call_forward(q, k, v, more, tile, interpret, cached=False)


def _call_forward(
    q: Array, k: Array, v: Array, more: tuple[Array, ...], tile: Tile, interpret: bool, *, cached: bool
) -> tuple[Array, ...]:
    """Of a cache [B, K, S, H], with `more` its rows' starts and its scales, without the logarithms; or of k and v as q is."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3] if cached else k.shape[2:0:-1]
    count, group, outputs = T // tile.queries, N // K, 1 if cached else 2

    def rows(i: Any, b: Any, n: Any) -> tuple:
        return b, count - 1 - i, n, 0  # the longest first

    def of_head(i: Any, b: Any, n: Any) -> tuple:
        head = jax.lax.div(n, group)
        return (b, head, 0, 0) if cached else (b, 0, head, 0)

    keys = pl.BlockSpec((None, None, S, H) if cached else (None, S, None, H), of_head)
    if cached:
        scale = pl.BlockSpec((None, None, S), lambda i, b, n: of_head(i, b, n)[:3])
        specs = [pl.BlockSpec((None,), lambda i, b, n: (b,)), scale, scale][: len(more)]
    else:
        specs = _span_specs(*more)
    return _call(
        functools.partial(_forward_kernel, tile=tile, cached=cached),
        grid=(count, B, N),
        in_specs=[pl.BlockSpec((None, tile.queries, None, H), rows), keys, keys, *specs],
        out_specs=[
            pl.BlockSpec((None, tile.queries, None, H), rows),
            pl.BlockSpec((None, None, tile.queries), lambda i, b, n: (b, n, count - 1 - i)),
        ][:outputs],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)][:outputs],
        name="flash_attention_cached" if cached else "flash_attention",
        tile=tile,
        interpret=interpret,
    )(q, k, v, *more)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, tile: Tile, cached: bool) -> None:
    more, (out_ref, *log_sums_refs) = (refs[:-1], refs[-1:]) if cached else (refs[:-2], refs[-2:])
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    q, scale = q_ref[...], _scale(q_ref)
    look = _Look(i, tile, start=more[0][...]) if cached else _Look(i, tile, *more)
    k_scales, v_scales = more[1:] if cached and len(more) > 1 else (None, None)

    def visit(j: Array, carry: tuple[Array, Array, Array], *, diagonal: bool) -> tuple[Array, Array, Array]:
        out, highest, total = carry
        at = pl.ds(j * tile.keys, tile.keys)
        scores = _dot(q, k_ref[at, :].astype(q.dtype).T)
        if k_scales is not None:
            scores = scores * k_scales[at][None, :]
        scores = look.mask(scores, j, diagonal)
        higher = jnp.maximum(highest, jnp.max(scores, axis=1) * scale)
        shrink, weights = jnp.exp2(highest - higher), jnp.exp2(scores * scale - higher[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        if v_scales is not None:
            weights = weights * v_scales[at][None, :]
        return out * shrink[:, None] + _dot(weights.astype(q.dtype), v_ref[at, :].astype(q.dtype)), higher, total

    empty = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(tile.queries, LOWEST, jnp.float32),
        jnp.zeros(tile.queries, jnp.float32),
    )
    out, highest, total = look.over_keys(visit, empty)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    for log_sums_ref in log_sums_refs:
        log_sums_ref[...] = highest + jnp.log2(total)


@_once_per_shape
def _d_queries(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_sums: Array,
    products: Array,
    spans: Spans | None,
    tile: Tile,
    interpret: bool,
) -> Array:
    B, T, N, H = q.shape
    count, group = T // tile.queries, N // k.shape[2]
    rows = pl.BlockSpec((None, tile.queries, None, H), lambda i, b, n: (b, count - 1 - i, n, 0))
    sums = pl.BlockSpec((None, None, tile.queries), lambda i, b, n: (b, n, count - 1 - i))
    keys = pl.BlockSpec((None, T, None, H), lambda i, b, n: (b, 0, jax.lax.div(n, group), 0))
    more = () if spans is None else (spans.ids, spans.first_dq)
    return _call(
        functools.partial(_d_queries_kernel, tile=tile),
        grid=(count, B, N),
        in_specs=[rows, keys, keys, rows, sums, sums, *_span_specs(*more)],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention_dq",
        tile=tile,
        interpret=interpret,
    )(q, k, v, d_out, log_sums, products, *more)


def _d_queries_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, d_out_ref: Any, log_sums_ref: Any, products_ref: Any, *refs: Any, tile: Tile
) -> None:
    *spans, dq_ref = refs
    q, d_out, scale = q_ref[...], d_out_ref[...], _scale(q_ref)
    log_sums, products = log_sums_ref[...], products_ref[...]
    look = _Look(pl.num_programs(0) - 1 - pl.program_id(0), tile, *spans)

    def visit(j: Array, dq: Array, *, diagonal: bool) -> Array:
        at = pl.ds(j * tile.keys, tile.keys)
        k = k_ref[at, :]
        weights = jnp.exp2(look.mask(_dot(q, k.T), j, diagonal) * scale - log_sums[:, None])
        d_scores = weights * (_dot(d_out, v_ref[at, :].T) - products[:, None])
        return dq + _dot(d_scores.astype(k.dtype), k)

    dq = look.over_keys(visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * (scale * math.log(2))).astype(dq_ref.dtype)


@_once_per_shape
def _d_keys_values(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_sums: Array,
    products: Array,
    spans: Spans | None,
    tile: Tile,
    interpret: bool,
) -> tuple[Array, Array]:
    B, T, N, H = q.shape
    count, K = T // tile.keys, k.shape[2]
    rows = pl.BlockSpec((None, T, N // K, H), lambda j, b, n: (b, 0, n, 0))
    sums = pl.BlockSpec((None, N // K, T), lambda j, b, n: (b, n, 0))
    keys = pl.BlockSpec((None, tile.keys, None, H), lambda j, b, n: (b, j, n, 0))
    more = () if spans is None else (spans.ids, spans.end_dkv)
    return _call(
        functools.partial(_d_keys_values_kernel, tile=tile),
        grid=(count, B, K),
        in_specs=[rows, keys, keys, rows, sums, sums, *_span_specs(*more)],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="flash_attention_dkv",
        tile=tile,
        interpret=interpret,
    )(q, k, v, d_out, log_sums, products, *more)


def _d_keys_values_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, d_out_ref: Any, log_sums_ref: Any, products_ref: Any, *refs: Any, tile: Tile
) -> None:
    """One block of keys against every block of queries that sees it, of every head of its group; scores are [keys, queries]."""
    *spans, dk_ref, dv_ref = refs
    T, group, _ = q_ref.shape
    j = pl.program_id(0)
    k, v, scale = k_ref[...], v_ref[...], _scale(q_ref)
    key_rows = j * tile.keys + jnp.arange(tile.keys)
    ids, end = (spans[0][pl.ds(j * tile.keys, tile.keys)], spans[1][j]) if spans else (None, T // tile.queries)

    def visit(i: Array, carry: tuple[Array, Array], *, head: Array, diagonal: bool) -> tuple[Array, Array]:
        dk, dv = carry
        at = pl.ds(i * tile.queries, tile.queries)
        q, d_out = q_ref[at, head, :], d_out_ref[at, head, :]
        scores = _dot(k, q.T)
        if spans:
            scores = jnp.where(ids[:, None] == spans[0][at][None, :], scores, -jnp.inf)
        if diagonal:
            scores = jnp.where(key_rows[:, None] <= i * tile.queries + jnp.arange(tile.queries)[None, :], scores, -jnp.inf)
        weights = jnp.exp2(scores * scale - log_sums_ref[head, at][None, :])
        dv = dv + _dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (_dot(v, d_out.T) - products_ref[head, at][None, :])
        return dk + _dot(d_scores.astype(q.dtype), q), dv

    start = jax.lax.div(j * tile.keys, tile.queries)
    below = jax.lax.div((j + 1) * tile.keys + tile.queries - 1, tile.queries)  # the diagonal; not after end

    def visit_head(head: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        carry = jax.lax.fori_loop(start, below, functools.partial(visit, head=head, diagonal=True), carry)
        return jax.lax.fori_loop(below, end, functools.partial(visit, head=head, diagonal=False), carry)

    dk, dv = jax.lax.fori_loop(0, group, visit_head, (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)))
    dk_ref[...] = (dk * (scale * math.log(2))).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


class _Look:
    """Where block i of queries looks: the blocks of keys it visits, and what of them it may not see.

    Args:
        i: block of queries.
        spans: references to a row's segments [T] and to the first block of keys [T/queries] where there are segments.
        start: keys before the first query's own.
    """

    def __init__(self, i: Array, tile: Tile, *spans: Any, start: Array | int = 0):
        self.tile = tile
        first = start + i * tile.queries
        self.rows = first + jnp.arange(tile.queries)
        self.all_ids = spans[0] if spans else None
        self.ids = self.all_ids[pl.ds(i * tile.queries, tile.queries)] if spans else None
        self.start = spans[1][i] if spans else 0
        self.end = jax.lax.div(first + tile.queries + tile.keys - 1, tile.keys)
        self.crossing = jax.lax.div(first, tile.keys)  # the diagonal, from here on; not before self.start

    def over_keys(self, visit: Any, carry: Any) -> Any:
        carry = jax.lax.fori_loop(self.start, self.crossing, functools.partial(visit, diagonal=False), carry)
        return jax.lax.fori_loop(self.crossing, self.end, functools.partial(visit, diagonal=True), carry)

    def mask(self, scores: Array, j: Array, diagonal: bool) -> Array:
        """scores: [queries, keys] of block j of keys."""
        if self.all_ids is not None:
            ids = self.all_ids[pl.ds(j * self.tile.keys, self.tile.keys)]
            scores = jnp.where(self.ids[:, None] == ids[None, :], scores, -jnp.inf)
        if diagonal:
            columns = j * self.tile.keys + jnp.arange(self.tile.keys)
            scores = jnp.where(columns[None, :] <= self.rows[:, None], scores, -jnp.inf)
        return scores


def _span_specs(*arrays: Array) -> list[pl.BlockSpec]:
    """Of a row's segments and of its blocks' first or last, where there are some."""
    return [pl.BlockSpec((None, x.shape[1]), lambda i, b, n: (b, 0)) for x in arrays]


def _scale(q_ref: Any) -> float:
    """Of scores, in base 2."""
    return q_ref.shape[-1] ** -0.5 * math.log2(math.e)


def _dot(a: Array, b: Array) -> Array:
    """A matrix product summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _call(kernel: Any, *, tile: Tile, **call: Any) -> Any:
    from jax.experimental.pallas import triton

    return pl.pallas_call(kernel, compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages), **call)
