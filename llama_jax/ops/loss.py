"""Cross-entropy over a vocabulary, without ever holding the logits of all tokens.

Head and loss are one function: a chunk of tokens at a time gets its logits, its loss and, when a gradient is asked for, its
share of both gradients at once, since the loss is a sum and its cotangent a number. So the head is multiplied three times and
not four (nothing is computed again), the largest temporary is a chunk of logits, and on a mesh every device works on its own
tokens and its own part of the vocabulary: what is exchanged per chunk is three numbers a token and the gradient of the
activations, and the head's gradient is summed in float32 and scattered once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.ops.attention import MASKED
from llama_jax.ops.linear import gather_table, local_ids, matmul
from llama_jax.sharding import RULES, constrain, is_partitioned, mesh_axis_size, per_device, sum_and_scatter

LOGITS_BYTES = 2**28  # of a chunk's logits in float32, on each device
X_AXES, HEAD_AXES, GATHERED_AXES, TOKEN_AXES = (
    ("batch", "length", "act_embed"), ("vocab", "embed"), ("vocab", "act_embed"), ("batch", "length"),
)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(x: Array, head: Array, targets: Array, weights: Array, vocab_size: int, z_loss: float) -> tuple[Array, Array]:
    """Sum over tokens of weight * (-log p(target) + z_loss * log(Z)^2), with p = softmax(x @ head.T) and Z its normaliser.

    The last term keeps logits from drifting (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Products are in x's dtype
    and summed in float32; softmax and loss are float32.

    Args:
        x: [B, T, D], after the final norm.
        head: [V', D]; rows from vocab_size on are padding, and have no probability.
        targets: [B, T] int32.
        weights: [B, T] float32; 1 / (number of tokens) for a mean, 0 where there is nothing to learn.
        vocab_size: V.
        z_loss: 0 for none.

    Returns:
        Two float32 scalars: the sum, in which x and head have gradients and the others none; and, to be reported, what it is
        without z_loss, in which nothing has.
    """
    return _run(x, head, targets, weights, vocab_size, z_loss, with_gradients=False)[0]


def _forward(x, head, targets, weights, vocab_size, z_loss):
    losses, dx, dhead = _run(x, head, targets, weights, vocab_size, z_loss, with_gradients=True)
    return losses, (dx, constrain(dhead, *HEAD_AXES).astype(head.dtype))


def _backward(vocab_size, z_loss, gradients, cotangents):
    (dx, dhead), (cotangent, _) = gradients, cotangents
    return (dx * cotangent).astype(dx.dtype), (dhead * cotangent).astype(dhead.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _run(
    x, head, targets, weights, vocab_size, z_loss, *, with_gradients
) -> tuple[tuple[Array, Array], Array | None, Array | None]:
    """Both losses and, if asked for, the gradients of x (its dtype) and of head (float32)."""
    gathered = gather_table(head, x.dtype)
    local = functools.partial(
        _local_loss, vocab_size=vocab_size, z_loss=z_loss, with_gradients=with_gradients, on_mesh=is_partitioned()
    )
    outputs = (((), ()), X_AXES, HEAD_AXES) if with_gradients else (((), ()), (), ())
    return per_device(local, (X_AXES, GATHERED_AXES, TOKEN_AXES, TOKEN_AXES), outputs)(x, gathered, targets, weights)


def _local_loss(x, head, targets, weights, *, vocab_size, z_loss, with_gradients, on_mesh):
    """One device's tokens and part of the vocabulary; sums over the others where it needs theirs."""
    B, T, D = x.shape
    V = head.shape[0]
    chunks = -(-B * T * V * 4 // LOGITS_BYTES)
    size = -(-B * T // chunks)
    pad = chunks * size - B * T
    xs = tuple(
        jnp.pad(a.reshape(B * T, *a.shape[2:]), ((0, pad),) + ((0, 0),) * (a.ndim - 2)).reshape(chunks, size, *a.shape[2:])
        for a in (x, targets, weights)
    )
    over_vocab = functools.partial(jax.lax.psum, axis_name="tensor") if on_mesh else lambda part: part
    first = jax.lax.axis_index("tensor") * V if on_mesh else 0
    has_padding = V * mesh_axis_size("tensor") > vocab_size

    def chunk(carry, inputs):
        loss, unpenalised, dhead = carry
        x, targets, weights = inputs
        logits = matmul("MD,VD->MV", x, head)
        if has_padding:
            logits = jnp.where(jnp.arange(V) + first < vocab_size, logits, MASKED)
        largest = jnp.max(logits, axis=-1)
        largest = jax.lax.pmax(largest, "tensor") if on_mesh else largest
        exps = jnp.exp(logits - largest[:, None])
        total = over_vocab(jnp.sum(exps, axis=-1))
        log_z = largest + jnp.log(total)
        targets = local_ids(targets, V)
        target = over_vocab(jax.lax.platform_dependent(logits, targets, cpu=_indexed, default=_summed))
        loss += jnp.sum(weights * (log_z - target + z_loss * log_z**2))
        unpenalised += jnp.sum(weights * (log_z - target))
        if not with_gradients:
            return (loss, unpenalised, dhead), None
        probs = exps * ((1 + 2 * z_loss * log_z) / total)[:, None]
        dlogits = ((probs - _is_target(logits, targets)) * weights[:, None]).astype(x.dtype)
        dx = over_vocab(matmul("MV,VD->MD", dlogits, head)).astype(x.dtype)
        return (loss, unpenalised, dhead + matmul("MV,MD->VD", dlogits, x)), dx

    dhead = jnp.zeros((V, D), jnp.float32) if with_gradients else None
    (loss, unpenalised, dhead), dx = jax.lax.scan(chunk, (jnp.float32(0), jnp.float32(0), dhead), xs)
    losses = (loss, unpenalised)
    if on_mesh:
        losses = jax.lax.psum(losses, RULES["batch"])
    if not with_gradients:
        return losses, None, None
    if on_mesh:
        dhead = sum_and_scatter(dhead, axis=1)
    return losses, dx.reshape(chunks * size, D)[: B * T].reshape(B, T, D), dhead


def _indexed(logits: Array, targets: Array) -> Array:
    """[M, V], [M] -> [M], 0 where a target lies past the end. XLA:CPU would write what is summed in memory."""
    return logits.at[jnp.arange(logits.shape[0]), targets].get(mode="fill", fill_value=0)


def _summed(logits: Array, targets: Array) -> Array:
    """The same, fused with what else is done with logits."""
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)


def _is_target(logits: Array, targets: Array) -> Array:
    return jnp.arange(logits.shape[1]) == targets[:, None]
