"""Predicted seconds of a step: the slowest of what overlaps, plus what cannot.

Terms, per device:
    FLOPs  2 P T + 2 T^2 N H L a sequence forward (P parameters in products; attention's causal half), three times that in
           training, and the layers' forward once more where it is computed again (remat full); at FLOPS_SHARE of the peak.
    HBM    bytes read and written at the published bandwidth. Decode: (weights + cache) / bandwidth, a floor.
    ICI    all-reduces over tensor, gathers and scatters over fsdp, all-reduces over data inside a slice or node.
    DCN    the same across slices or nodes.

Overlap (jax-ml/scaling-book, training.md): FSDP's and data parallelism's collectives are "not on the critical path" and hide
behind the computation, so a step takes the maximum of the terms; tensor parallelism's all-reduces are "on the critical path",
and little of the same rows can run meanwhile, so they are added. Decode (inference.md): attention is always bound by HBM, so
the cache's time is added to the larger of the weights' and the FLOPs'.
"""

import dataclasses

from llama_jax.config import ModelConfig
from llama_jax.mesh import MeshShape, padded_vocab
from llama_jax.plan import memory
from llama_jax.plan.interconnect import Wire, wires
from llama_jax.plan.request import PlanRequest
from llama_jax.plan.shapes import elements, gathered, weights

FLOPS_SHARE = 0.8  # of the peak that matrix products reach: 790 of 989 TFLOP/s on one H200 with random data; assumed elsewhere
FLOAT32 = memory.FLOAT32
OPTIMIZER_SLOTS = {"adamw": 2, "lion": 1, "sgd": 0}


@dataclasses.dataclass(frozen=True)
class Timing:
    """A step's seconds by term, and what follows from them.

    Attributes:
        compute_seconds, hbm_seconds, ici_seconds, dcn_seconds: each as if alone.
        step_seconds: predicted.
        bound: the largest term: "FLOPs", "HBM", "ICI" (NVLink or PCIe for GPUs) or "DCN" (the nodes' network).
        tokens_per_second: of the whole batch; decode makes one per sequence and step.
        flops_share: the model's FLOPs (nothing computed twice) as a share of the devices' peak: MFU with causal attention.
    """

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    step_seconds: float
    bound: str
    tokens_per_second: float
    flops_share: float


def plan_timing(request: PlanRequest, mesh: MeshShape) -> Timing:
    """The predicted step on a mesh."""
    chip, work = request.topology.chip, step_flops(request)
    peak = chip.peak(request.dtype)
    rows_filled = request.rows(mesh) * mesh.batch_shards / request.batch  # inference computes the rows it fills up, too
    compute = (work + recomputed_flops(request)) * rows_filled / (mesh.num_devices * peak * FLOPS_SHARE)
    weight_seconds = weight_traffic(request, mesh) / chip.hbm_bandwidth
    other_seconds = other_traffic(request, mesh) / chip.hbm_bandwidth
    hidden = hidden_seconds(request, mesh)
    exposed, exposed_network = exposed_seconds(request, mesh)
    terms = {
        "FLOPs": compute,
        "HBM": weight_seconds + other_seconds,
        "ICI": hidden["ICI"] + (0 if exposed_network else exposed),
        "DCN": hidden["DCN"] + (exposed if exposed_network else 0),
    }
    if request.task == "decode":
        alone = other_seconds + max(weight_seconds, compute)
    else:
        alone = max(terms["FLOPs"], terms["HBM"])
    step = max(alone, hidden["ICI"], hidden["DCN"]) + exposed
    tokens = request.batch * (1 if request.task == "decode" else request.length)
    return Timing(
        compute_seconds=terms["FLOPs"],
        hbm_seconds=terms["HBM"],
        ici_seconds=terms["ICI"],
        dcn_seconds=terms["DCN"],
        step_seconds=step,
        bound=max(terms, key=terms.__getitem__),
        tokens_per_second=tokens / step,
        flops_share=work / (step * mesh.num_devices * peak),
    )


def linear_params(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters in products with activations: of the layers, and of the head. The embedding is looked up, norms multiply."""
    whole = MeshShape()
    layers = sum(w.count * elements(w.axes, whole) for w in weights(cfg) if w.name.startswith("layers.") and w.inputs)
    return layers, cfg.vocab_size * cfg.embed_dim


def forward_flops(request: PlanRequest) -> tuple[float, float]:
    """Of the whole batch: the layers', and the head's."""
    cfg, B, T = request.config, request.batch, request.length
    layers, head = linear_params(cfg)
    width = cfg.num_heads * cfg.head_dim * cfg.num_layers
    if request.task == "decode":
        return B * (2 * layers + 4 * T * width), B * 2 * head
    return B * (2 * layers * T + 2 * T**2 * width), B * 2 * head * (T if request.trains else 1)


def step_flops(request: PlanRequest) -> float:
    """FLOPs of the mathematics: forward, and in training twice that for the backward pass."""
    return sum(forward_flops(request)) * (3 if request.trains else 1)


def recomputed_flops(request: PlanRequest) -> float:
    """FLOPs of products computed again: the head's (the loss goes by chunks), and with remat full the layers'."""
    layers, head = forward_flops(request)
    return 0.0 if not request.trains else head + (layers if request.remat == "full" else 0)


def weight_traffic(request: PlanRequest, mesh: MeshShape) -> float:
    """HBM bytes per device for weights.

    Inference reads all but the embedding once; what is gathered over fsdp is written first. Training reads them gathered in c
    forward, backward and where recomputed, writes and reads float32 gradients, and the optimizer reads and writes its state.
    """
    whole = gathered(mesh)
    read = [w for w in weights(request.config, mesh.tensor) if w.name != "embedding" or request.config.tied_head]
    if not request.trains:
        stored = sum(w.count * memory.stored_bytes(request, w, whole) for w in read)
        return stored * (2 if mesh.fsdp > 1 else 1)
    size = sum(w.count * elements(w.axes, whole) for w in read)
    passes = 3 if request.remat == "full" else 2
    own = memory.weight_bytes(request, mesh)  # float32 of this device's part
    return passes * request.itemsize * size + FLOAT32 * size + own * (3 + 2 * OPTIMIZER_SLOTS[request.optimizer])


def other_traffic(request: PlanRequest, mesh: MeshShape) -> float:
    """HBM bytes per device for the cache (decode reads all that is allocated, prefill writes it) and for activations: what is
    saved is written and read, and what layers work in is written and read once a pass."""
    cache = 0 if request.trains else memory.cache_bytes(request, mesh)
    if request.task == "decode":
        return cache
    work = request.config.num_layers * request.rows(mesh) * request.length * memory.layer_values(request, mesh)
    if not request.trains:
        return cache + 2 * work
    passes = 3 if request.remat == "full" else 2
    return 2 * memory.saved_bytes(request, mesh) + 2 * passes * work


def hidden_seconds(request: PlanRequest, mesh: MeshShape) -> dict[str, float]:
    """Collectives that run beside the computation, by network.

    Inference with fsdp gathers the weights as stored, once a step. Training gathers them in c forward and backward, scatters
    float32 gradients over fsdp and all-reduces what each device then has over data: inside a slice, and, each device of a slice
    its share, across slices.
    """
    along, whole = wires(request.topology, mesh), gathered(mesh)
    every = weights(request.config, mesh.tensor)
    seconds = {"ICI": 0.0, "DCN": 0.0}

    def add(wire: Wire, value: float) -> None:
        seconds["DCN" if wire.network else "ICI"] += value

    if not request.trains:
        stored = sum(w.count * memory.stored_bytes(request, w, whole) for w in every)
        add(along["fsdp"], along["fsdp"].gather_seconds(stored))
        return seconds
    size = sum(w.count * elements(w.axes, whole) for w in every)
    add(along["fsdp"], 2 * along["fsdp"].gather_seconds(request.itemsize * size) + along["fsdp"].gather_seconds(FLOAT32 * size))
    own = memory.weight_bytes(request, mesh)
    add(along["data"], along["data"].reduce_seconds(own))
    add(along["dcn_data"], along["dcn_data"].reduce_seconds(own / mesh.data))
    return seconds


def exposed_seconds(request: PlanRequest, mesh: MeshShape) -> tuple[float, bool]:
    """Seconds of tensor's collectives, and whether they leave the node.

    Of [b, T, D] in c, counted in all-reduces: a reduce-scatter of a projection's result to the devices' parts of the sequence,
    or the all-gather of a norm's result from them, is half of one. Forward 2 a layer; backward 2, and the two norms' results
    gathered again; remat full also computes the attention's result again. The embedding's sum, and in training its cotangent
    and the head's input and cotangent. Inference also gathers [b, V'] float32 logits once.
    """
    cfg, wire = request.config, wires(request.topology, mesh)["tensor"]
    rows = request.rows(mesh)
    nbytes = rows * (1 if request.task == "decode" else request.length) * cfg.embed_dim * request.itemsize
    per_layer, ends = (2, 1) if not request.trains else (5.5 if request.remat == "full" else 5, 3)
    seconds = (per_layer * cfg.num_layers + ends) * wire.reduce_seconds(nbytes)
    if not request.trains:
        seconds += wire.gather_seconds(rows * padded_vocab(cfg.vocab_size, mesh.tensor) * FLOAT32)
    return seconds, wire.network
