"""Bytes per device, term by term.

Symbols: b rows (sequences) per device, T or S the length, t the tensor axis, c bytes of the compute dtype; letters as in
ModelConfig; V' and K' padded and repeated as llama_jax.mesh says. A training step holds at once its arguments (parameters and
optimizer state), the gradients, what the forward pass kept for the backward pass, and either one layer's work or the head's.
"""

import dataclasses

from llama_jax.mesh import MeshShape, cache_heads, padded_vocab
from llama_jax.plan.request import PlanRequest
from llama_jax.plan.shapes import Weight, elements, gathered, shards, weights

FLOAT32 = 4

# What a compiler's schedule decides, not the mathematics; to be set by what compiled programs report.
GATHERED_LAYERS = 2  # layers whose weights are whole over fsdp at once: the one at work and the one that is fetched
COTANGENTS = 1.0  # cotangents alive in one layer's backward pass, as a share of the values it needs from its forward pass
LOSS_CHUNK = 1024  # tokens per device whose logits exist at once in training
LOGITS_COPIES = 2  # float32 arrays of logits alive at once: themselves and their cotangent; or, to sample, sorted
SCORE_BYTES = 11  # per score of plain attention, kept for its backward pass: float32 twice, weights in bfloat16, mask


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        weights: parameters as stored.
        optimizer: its state.
        gradients: float32.
        cache: keys and values.
        activations: kept for the backward pass, of all layers.
        layer: what one layer works in, with its gathered weights.
        head: logits of a chunk and the head's gradient before it is scattered.
    """

    weights: float = 0
    optimizer: float = 0
    gradients: float = 0
    cache: float = 0
    activations: float = 0
    layer: float = 0
    head: float = 0

    @property
    def arguments(self) -> float:
        """What is there before and after a step."""
        return self.weights + self.optimizer + self.cache

    @property
    def temporary(self) -> float:
        """Activations and work: the backward pass of a layer and the head's do not meet."""
        return self.activations + max(self.layer, self.head)

    @property
    def total(self) -> float:
        return self.arguments + self.gradients + self.temporary


def plan_memory(request: PlanRequest, mesh: MeshShape) -> Memory:
    """Bytes per device of a step on a mesh."""
    layer = layer_bytes(request, mesh) + gathered_bytes(request, mesh)
    if not request.trains:
        return Memory(
            weights=weight_bytes(request, mesh), cache=cache_bytes(request, mesh), layer=layer, head=head_bytes(request, mesh)
        )
    return Memory(
        weights=weight_bytes(request, mesh),
        optimizer=optimizer_bytes(request, mesh),
        gradients=gradient_bytes(request, mesh),
        activations=saved_bytes(request, mesh),
        layer=layer,
        head=head_bytes(request, mesh),
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


def gradient_bytes(request: PlanRequest, mesh: MeshShape) -> int:
    """float32 in the parameters' shapes and shardings."""
    return sum(FLOAT32 * w.count * elements(w.axes, mesh) for w in weights(request.config, mesh.tensor))


def optimizer_bytes(request: PlanRequest, mesh: MeshShape) -> int:
    """adamw: m (float32 or bfloat16) and v; lion: m; adafactor: rows and columns of v; sgd: nothing. Sharded as parameters."""
    moments = {"adamw": (2 if request.first_moment == "bfloat16" else 4) + 4, "lion": 4, "adafactor": 0, "sgd": 0}
    per_element = moments[request.optimizer]
    total = 0
    for w in weights(request.config, mesh.tensor):
        state = FLOAT32 * _factored(w, mesh) if request.optimizer == "adafactor" else per_element * elements(w.axes, mesh)
        total += w.count * state
    return total


def _factored(weight: Weight, mesh: MeshShape, min_size: int = 128) -> int:
    """Elements of adafactor's v: without its largest axis, and without its second (optax.scale_by_factored_rms); all of it
    where the second is under 128."""
    by_size = sorted(weight.axes, key=lambda axis: axis[1])
    if len(by_size) < 2 or by_size[-2][1] < min_size:
        return elements(weight.axes, mesh)
    return elements((*by_size[:-2], by_size[-2]), mesh) + elements((*by_size[:-2], by_size[-1]), mesh)


def cache_bytes(request: PlanRequest, mesh: MeshShape) -> int:
    """L x 2 x b x K'/t x S x H x c."""
    cfg = request.config
    heads = cache_heads(cfg.num_kv_heads, mesh.tensor) // mesh.tensor
    return cfg.num_layers * 2 * request.rows(mesh) * heads * request.length * cfg.head_dim * request.itemsize


def saved_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """What all layers keep for the backward pass: L x b x T x bytes per token, by remat policy.

    full: a layer's input, D c. projections: also q, k, v, the attention's result (twice: the kernel's own copy), o, gate, up.
    none: everything (layer_values). As jax's saved_residuals lists them for llama_jax.model.block.
    """
    cfg, c, t = request.config, request.itemsize, mesh.tensor
    if request.remat == "none":
        per_token = layer_values(request, mesh)
    else:
        per_token = cfg.embed_dim * c
        if request.remat == "projections":
            kv = 2 * cfg.num_kv_heads / shards("kv_heads", cfg.num_kv_heads, mesh)
            heads = 3 * cfg.num_heads / t + kv
            per_token += c * (heads * cfg.head_dim + 2 * cfg.mlp_dim / t + cfg.embed_dim) + FLOAT32 * cfg.num_heads / t
    return cfg.num_layers * request.rows(mesh) * request.length * per_token


def layer_values(request: PlanRequest, mesh: MeshShape) -> float:
    """Bytes per token of what one layer's backward pass needs from its forward pass.

    D: both norms' inputs in float32 and both results, before and after the scale; N H: rotated q, attention out twice; K' H:
    rotated k, v; N: log-sum-exp in float32; F: gate and two values of silu in float32, silu, up and their product. Where
    attention is plain, also the scores: SCORE_BYTES x T x N / t.
    """
    cfg, c, t = request.config, request.itemsize, mesh.tensor
    kv = 2 * cache_heads(cfg.num_kv_heads, t)
    width = cfg.embed_dim * (2 * FLOAT32 + 4 * c)
    heads = (c * (3 * cfg.num_heads + kv) * cfg.head_dim + FLOAT32 * cfg.num_heads) / t
    mlp = cfg.mlp_dim * (3 * FLOAT32 + 3 * c) / t
    scores = 0 if has_flash_attention(request) else SCORE_BYTES * request.length * cfg.num_heads / t
    return width + heads + mlp + scores


def has_flash_attention(request: PlanRequest) -> bool:
    """Whether scores of whole sequences are never held: splash attention, on TPUs, where it supports the sizes."""
    return request.topology.chip.is_tpu and request.length % 128 == 0 and request.config.head_dim % 64 == 0


def layer_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """What one layer works in.

    Training: b x T x layer_values x (1 + COTANGENTS). Prefill: the same values without cotangents. Decode: one token a row, and
    its scores against the cache, N/t x S in float32 twice.
    """
    rows, cfg = request.rows(mesh), request.config
    if request.task == "decode":
        scores = 2 * FLOAT32 * request.length * cfg.num_heads / mesh.tensor
        return rows * (cfg.embed_dim + (cfg.num_heads * cfg.head_dim + 3 * cfg.mlp_dim) / mesh.tensor) * FLOAT32 + rows * scores
    values = rows * request.length * layer_values(request, mesh)
    return values * (1 + COTANGENTS) if request.trains else values


def gathered_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Weights of layers that are whole over fsdp: GATHERED_LAYERS in the compute dtype (inference: as stored); in training
    also one layer's gradient in float32 before it is scattered. Nothing on fsdp=1 except the cast and that gradient."""
    whole = gathered(mesh)
    layer = [w for w in weights(request.config, mesh.tensor) if w.name.startswith("layers.")]
    size = sum(elements(w.axes, whole) for w in layer)
    if request.trains:
        return (request.itemsize * (GATHERED_LAYERS if mesh.fsdp > 1 else 1) + FLOAT32) * size
    return GATHERED_LAYERS * sum(stored_bytes(request, w, whole) for w in layer) if mesh.fsdp > 1 else 0


def head_bytes(request: PlanRequest, mesh: MeshShape) -> float:
    """Logits in float32, LOGITS_COPIES x chunk x V'/t; in training also the head, V'/t x D, gathered in c and its gradient in
    float32, and the last hidden states with their cotangent, b x T x D x (c + 4). The embedding's gather is the head's size,
    and at another time."""
    cfg = request.config
    vocab = padded_vocab(cfg.vocab_size, mesh.tensor) / mesh.tensor
    tokens = request.rows(mesh) * request.length
    if request.trains:
        head = vocab * cfg.embed_dim * (request.itemsize + FLOAT32)
        return (
            LOGITS_COPIES * FLOAT32 * min(LOSS_CHUNK, tokens) * vocab
            + head
            + tokens * cfg.embed_dim * (request.itemsize + FLOAT32)
        )
    table = vocab * cfg.embed_dim * request.itemsize if mesh.fsdp > 1 else 0
    return LOGITS_COPIES * FLOAT32 * request.rows(mesh) * vocab * mesh.tensor + table
