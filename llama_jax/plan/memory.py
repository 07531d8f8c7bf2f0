"""Bytes per device, term by term.

Symbols: b rows (sequences) per device, T or S the length, t the tensor axis, c bytes of the compute dtype; letters as in
ModelConfig; V' and K' padded and repeated as llama_jax.mesh says. The constants below are what schedules of compilers decide,
not the mathematics; each was read in buffer assignments (libtpu 0.0.42, XLA:GPU of jax 0.10.2).

A training step is fullest in the backward pass of a layer. Beside its arguments (parameters and optimizer state) it then holds
the gradients, what the forward pass kept of every layer, what the loss left, and one layer's work. A large vocabulary can make
the loss itself, or the embedding's gradient, the fullest moment.
"""

import dataclasses

from llama_jax.mesh import MeshShape, cache_heads, padded_vocab
from llama_jax.plan.request import DTYPES, PlanRequest
from llama_jax.plan.shapes import Weight, elements, gathered, shards, weights

FLOAT32 = 4
LOGITS_BYTES = 2**28  # llama_jax.ops.loss.LOGITS_BYTES: of the logits that exist at once in training

MLP_ARRAYS = 6  # [b, T, F/t] where silu is differentiated: gate, up and their product, and the cotangents of the three
WIDTH_ARRAYS = 2  # [b, T/t, D]: the layer's middle, and the cotangent that comes from above
WHOLE_ARRAYS = 4  # [b, T, D] where tensor cuts the sequence between layers: both norms' results, twice where copied; cotangents
GATHERED_MLP = 2  # of a layer's three MLP weights, whole over fsdp at that moment; its attention's four all are
GATHERED_LAYERS = 2  # in inference: the one at work and the one that is fetched
UNREDUCED_GPU = 0.6  # of the layers, whose float32 gradients XLA:GPU has not yet scattered over fsdp (0.53 and 0.62 were read)
NORMS_GPU = 2  # [b, T/t, D] of every layer that XLA:GPU keeps with them, for the norms' gradients
HEADS_GPU = 2  # of the head's gradient: XLA:GPU's loop over chunks has it twice
LANES = 128  # of a TPU's registers: the last axis of an array is filled up to a multiple
WIDE_FSDP = 32  # llama_jax.sharding.WIDE_FSDP: from here on gradients are scattered in two steps where fsdp is the whole mesh


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        weights: parameters as stored.
        optimizer: its state.
        cache: keys and values, read and written in place.
        new_cache: keys and values that prefill makes.
        gradients: of the layers, float32.
        copies: of all layers' weights, in another layout.
        activations: kept for the backward pass, of all layers.
        layer: what one layer works in, with its gathered weights.
        head: what the loss leaves until the end of the backward pass.
        loss: what the loss works in, before there are gradients of layers; inference: logits.
        embedding: gradients of embedding and head before they are scattered, when those of the layers are done.
        is_unrolled: what a layer kept is freed when its gradients are there; a loop holds both for all layers.
    """

    weights: float = 0
    optimizer: float = 0
    cache: float = 0
    new_cache: float = 0
    gradients: float = 0
    copies: float = 0
    activations: float = 0
    layer: float = 0
    head: float = 0
    loss: float = 0
    embedding: float = 0
    is_unrolled: bool = False

    @property
    def arguments(self) -> float:
        """What is there before a step."""
        return self.weights + self.optimizer + self.cache

    @property
    def temporary(self) -> float:
        """Everything else, gradients included, at the fullest moment: a layer's, the loss's, or the embedding's gradient."""
        together = max if self.is_unrolled else lambda kept, gradients: kept + gradients
        in_layer = self.copies + together(self.activations, self.gradients) + self.head + self.layer
        in_loss = self.copies + self.activations + self.loss
        return self.new_cache + max(in_layer, in_loss, self.gradients + self.embedding)

    @property
    def total(self) -> float:
        return self.arguments + self.temporary


def plan_memory(request: PlanRequest, mesh: MeshShape) -> Memory:
    """Bytes per device of a step on a mesh."""
    if request.trains:
        return Memory(
            weights=weight_bytes(request, mesh),
            optimizer=optimizer_bytes(request, mesh),
            gradients=gradient_bytes(request, mesh),
            copies=copied_bytes(request, mesh),
            activations=saved_bytes(request, mesh),
            layer=layer_bytes(request, mesh) + gathered_bytes(request, mesh),
            head=head_bytes(request, mesh),
            loss=loss_bytes(request, mesh),
            embedding=2 * FLOAT32 * vocab_rows(request, mesh) * request.config.embed_dim,
            is_unrolled=not request.topology.chip.is_tpu,
        )
    return Memory(
        weights=weight_bytes(request, mesh),
        cache=cache_bytes(request, mesh) if request.task == "decode" else 0,
        new_cache=cache_bytes(request, mesh) if request.task == "prefill" else 0,
        copies=copied_bytes(request, mesh),
        layer=layer_bytes(request, mesh) + gathered_bytes(request, mesh),
        loss=logits_bytes(request, mesh),
    )


def weight_bytes(request: PlanRequest, mesh: MeshShape) -> int:
    """Sum over parameters of elements / shards x bytes: 4 in training; c, or 1 + 4 per output row (int8), in inference."""
    return sum(w.count * stored_bytes(request, w, mesh) for w in weights(request.config, mesh.tensor))


def stored_bytes(request: PlanRequest, weight: Weight, mesh: MeshShape) -> int:
    """One of a weight's `count` arrays, per device."""
    if request.trains:
        return FLOAT32 * elements(weight.axes, mesh)
    if request.quantize and weight.quantizable:
        return elements(weight.axes, mesh) + FLOAT32 * elements(weight.outputs, mesh)
    return request.itemsize * elements(weight.axes, mesh)


def gradient_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Of the layers, float32, in the parameters' shapes and shardings.

    TPUs whose whole mesh is fsdp, and more than WIDE_FSDP, keep the MLP's with embed as last axis: where fsdp leaves less than
    LANES of it, it is filled up. On GPUs with fsdp, UNREDUCED_GPU of them are still whole, and L x b T x NORMS_GPU x D c / t
    waits for the norms'.
    """
    layers = layer_weights(request, mesh)
    own = sum(w.count * elements(w.axes, mesh) * _filled(request, w, mesh) for w in layers)
    if request.topology.chip.is_tpu or mesh.fsdp == 1:
        return FLOAT32 * own
    whole = sum(w.count * elements(w.axes, gathered(mesh)) for w in layers)
    states = request.rows(mesh) * request.length * width(request, mesh) * request.itemsize
    return FLOAT32 * max(own, UNREDUCED_GPU * whole) + request.config.num_layers * NORMS_GPU * states


def _filled(request: PlanRequest, weight: Weight, mesh: MeshShape) -> float:
    """Elements in memory per element of a weight's gradient."""
    is_wide = request.topology.chip.is_tpu and WIDE_FSDP < mesh.fsdp == mesh.num_devices
    is_mlp = any(axis == "mlp" for axis, _ in weight.axes)
    return max(1, LANES * mesh.fsdp / request.config.embed_dim) if is_wide and is_mlp else 1


def optimizer_bytes(request: PlanRequest, mesh: MeshShape) -> int:
    """adamw: m (float32 or bfloat16) and v; lion: m; sgd: nothing. Sharded as parameters."""
    first = DTYPES[request.first_moment]
    per_element = {"adamw": first + FLOAT32, "lion": first, "sgd": 0}[request.optimizer]
    return sum(per_element * w.count * elements(w.axes, mesh) for w in weights(request.config, mesh.tensor))


def cache_bytes(request: PlanRequest, mesh: MeshShape) -> int:
    """L x 2 x b x K'/t x S x H x c; in int8 H + 4 bytes instead of H x c."""
    cfg = request.config
    heads = cache_heads(cfg.num_kv_heads, mesh.tensor) // mesh.tensor
    per_vector = cfg.head_dim + FLOAT32 if request.cache_dtype == "int8" else cfg.head_dim * request.itemsize
    return cfg.num_layers * 2 * request.rows(mesh) * heads * request.length * per_vector


def saved_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """What all layers keep for the backward pass: L x b x T x bytes per token, by remat policy.

    full: a layer's input, D c / t. projections: also the results of the projections, q, k, v, o, gate and up, of attention
    (from splash attention twice: the kernel's own copy), and the kernels' log-sum-exp. none: everything (layer_values).
    """
    cfg, c, t = request.config, request.itemsize, mesh.tensor
    if request.remat == "none":
        per_token = layer_values(request, mesh)
    else:
        per_token = width(request, mesh) * c
        if request.remat == "projections":
            kv = 2 * cfg.num_kv_heads / shards("kv_heads", cfg.num_kv_heads, mesh)
            copies = 2 if request.topology.chip.is_tpu and has_flash_attention(request) else 1
            heads = (1 + copies) * cfg.num_heads / t + kv
            per_token += c * (heads * cfg.head_dim + 2 * cfg.mlp_dim / t + width(request, mesh)) + FLOAT32 * cfg.num_heads / t
    return cfg.num_layers * request.rows(mesh) * request.length * per_token


def width(request: PlanRequest, mesh: MeshShape) -> float:
    """Values per token of an activation [B, T, D] between layers: D/t, as tensor cuts the sequence where it divides it."""
    return request.config.embed_dim / (1 if request.length % mesh.tensor else mesh.tensor)


def layer_values(request: PlanRequest, mesh: MeshShape) -> float:
    """Bytes per token of what one layer's backward pass needs from its forward pass.

    D: both norms' inputs in float32 and both results, before and after the scale; N H: rotated q, attention out twice; K' H:
    rotated k, v; N: log-sum-exp in float32; F: gate and two values of silu in float32, silu, up and their product. Where
    attention is plain, also the scores and their softmax: (4 + c) T N / t.
    """
    cfg, c, t = request.config, request.itemsize, mesh.tensor
    kv = 2 * cache_heads(cfg.num_kv_heads, t)
    between = width(request, mesh) * (2 * FLOAT32 + 4 * c)
    heads = (c * (3 * cfg.num_heads + kv) * cfg.head_dim + FLOAT32 * cfg.num_heads) / t
    mlp = cfg.mlp_dim * (3 * FLOAT32 + 3 * c) / t
    return between + heads + mlp + score_bytes(request, mesh)


def score_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Per query: its scores in float32 and their softmax in c, (4 + c) T N / t; nothing where the kernel never holds them."""
    if has_flash_attention(request):
        return 0
    return (FLOAT32 + request.itemsize) * request.length * request.config.num_heads / mesh.tensor


def has_flash_attention(request: PlanRequest) -> bool:
    """Whether scores of whole sequences are never held: by splash attention on TPUs and flash attention on GPUs, where they
    support the sizes; a device on which it does not work (llama_jax.ops.kernels.probe) holds them."""
    length, head_dim = request.length, request.config.head_dim
    if request.dtype == "float32":
        return False
    if request.topology.chip.is_tpu:
        return length % 128 == 0 and head_dim % 64 == 0
    return length % 128 == 0 and head_dim in (64, 128)


def layer_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """What one layer works in.

    Training: b T tokens; MLP_ARRAYS F c / t, WIDTH_ARRAYS D c / t, WHOLE_ARRAYS D c if t > 1, q and attention's result
    2 N H c / t, k and v 2 K' H c / t, and scores, with their cotangents. Prefill: D partial sums in float32, their sum and the
    input in c; gate, up and product; scores. Decode: one token a row, its scores against the cache, N/t x S in float32 twice.
    """
    cfg, c, t = request.config, request.itemsize, mesh.tensor
    rows, D, F = request.rows(mesh), cfg.embed_dim, cfg.mlp_dim / t
    if request.task == "decode":
        scores = 2 * FLOAT32 * request.length * cfg.num_heads / t
        return rows * (FLOAT32 * (D + cfg.num_heads * cfg.head_dim / t + 3 * F) + scores)
    tokens = rows * request.length
    if not request.trains:
        return tokens * (D * (FLOAT32 + 2 * c) + 3 * F * c + score_bytes(request, mesh))
    heads = 2 * (cfg.num_heads + cache_heads(cfg.num_kv_heads, t)) * cfg.head_dim * c / t
    between = WIDTH_ARRAYS * width(request, mesh) * c + (WHOLE_ARRAYS * D * c if t > 1 else 0)
    return tokens * (MLP_ARRAYS * F * c + between + heads + 2 * score_bytes(request, mesh))


def gathered_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Weights that are whole over fsdp. Training: a layer's attention's and GATHERED_MLP of its MLP's, in c (also on
    fsdp=1: casts). Inference: GATHERED_LAYERS as stored; nothing on fsdp=1."""
    whole, layer = gathered(mesh), layer_weights(request, mesh)
    if not request.trains:
        return GATHERED_LAYERS * sum(stored_bytes(request, w, whole) for w in layer) if mesh.fsdp > 1 else 0
    mlp = sum(elements(w.axes, whole) for w in layer if any(axis == "mlp" for axis, _ in w.axes))
    every = sum(elements(w.axes, whole) for w in layer)
    return request.itemsize * (every - mlp + mlp * GATHERED_MLP / 3)


def layer_weights(request: PlanRequest, mesh: MeshShape) -> list[Weight]:
    return [w for w in weights(request.config, mesh.tensor) if w.name.startswith("layers.")]


def copied_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Weights that XLA:TPU copies before its loop over layers (training) or tokens (decode): all of o_proj into another layout;
    to decode on v7x instead all the others and the head, where they are bfloat16, into tiles of 16 rows."""
    if not request.topology.chip.is_tpu or request.task == "prefill":
        return 0
    is_bfloat16 = not request.trains and request.dtype == "bfloat16" and not request.quantize
    retiled = is_bfloat16 and request.topology.chip.name == "v7x"
    matrices = [w for w in weights(request.config, mesh.tensor) if w.quantizable]
    return sum(w.count * stored_bytes(request, w, mesh) for w in matrices if (w.name == "layers.o_proj") != retiled)


def vocab_rows(request: PlanRequest, mesh: MeshShape) -> float:
    """V'/t."""
    return padded_vocab(request.config.vocab_size, mesh.tensor) / mesh.tensor


def head_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """What the loss leaves: the head's gradient in float32, not yet scattered, V'/t x D (HEADS_GPU of it on GPUs with fsdp);
    the last hidden states, b T D c / t, and their cotangent, b T D c. Where all logits fit into one chunk, XLA computes that
    gradient last and keeps them instead, with the gathered hidden states."""
    cfg, c = request.config, request.itemsize
    tokens, rows = request.rows(mesh) * request.length, vocab_rows(request, mesh)
    logits = FLOAT32 * tokens * rows
    copies = HEADS_GPU if mesh.fsdp > 1 and not request.topology.chip.is_tpu else 1
    kept = logits + tokens * cfg.embed_dim * c if logits <= LOGITS_BYTES else copies * FLOAT32 * rows * cfg.embed_dim
    return kept + tokens * c * (width(request, mesh) + cfg.embed_dim)


def loss_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Hidden states, gathered, and their cotangent; the head in c and its gradient in float32, V'/t x D; a chunk's logits and
    their exponentials in float32, and the logits' cotangent in c."""
    cfg, c = request.config, request.itemsize
    tokens, rows = request.rows(mesh) * request.length, vocab_rows(request, mesh)
    chunk = min(tokens * rows, LOGITS_BYTES / FLOAT32)
    return 2 * tokens * cfg.embed_dim * c + rows * cfg.embed_dim * (c + FLOAT32) + chunk * (2 * FLOAT32 + c)


def logits_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Of inference: [b, V'] in float32 and, to sample, their order in int32; the table, V'/t x D, where fsdp cuts it."""
    rows = vocab_rows(request, mesh)
    table = rows * request.config.embed_dim * request.itemsize if mesh.fsdp > 1 else 0
    return 2 * FLOAT32 * request.rows(mesh) * rows * mesh.tensor + table
