"""Proves a checkpoint: the float64 reference, run from the source files, against the JAX model, run from the checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.source import Source
from llama_jax.checkpoint.store import ArrayReader, Checkpoint
from llama_jax.config import ModelConfig
from llama_jax.model import logits
from llama_jax.model.block import Block
from llama_jax.ops.rope import rope_angles
from llama_jax.reference import llama as reference
from llama_jax.reference.rope import interleave, rope_frequencies

TOLERANCE = 1e-4  # of the largest value at that place; float32 arithmetic leaves about 1e-6

# A layer's weights in the reference -> their names in a Hugging Face file, and in our checkpoint. Not taken from the readers:
# what verify proves includes their tables.
LAYER = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "wq": ("self_attn.q_proj", "q_proj"),
    "wk": ("self_attn.k_proj", "k_proj"),
    "wv": ("self_attn.v_proj", "v_proj"),
    "wo": ("self_attn.o_proj", "o_proj"),
    "ffn_norm": ("post_attention_layernorm", "mlp_norm"),
    "w1": ("mlp.gate_proj", "gate_proj"),
    "w3": ("mlp.up_proj", "up_proj"),
    "w2": ("mlp.down_proj", "down_proj"),
}
TABLES = {
    "embedding": ("tok_embeddings.weight", "model.embed_tokens.weight"),
    "final_norm": ("norm.weight", "model.norm.weight"),
    "lm_head": ("output.weight", "lm_head.weight"),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What verify found.

    Attributes:
        errors: place -> (largest difference, largest value of the reference), in the order of computation.
        greedy_agreement: positions at which both choose the same token.
        tokens: positions compared.
        faults: sentences, the first one about the first place that differs; empty when the checkpoint is right.
    """

    errors: dict[str, tuple[float, float]]
    greedy_agreement: int
    tokens: int
    faults: list[str]


class SourceWeights:
    """The source's weights in Meta's names, shapes and RoPE convention, rounded to the checkpoint's dtype."""

    def __init__(self, source: Source, dtype: np.dtype):
        self._source = source
        self._dtype = dtype
        self._hf = source.kind == "Hugging Face"

    def layer(self, i: int) -> dict[str, np.ndarray]:
        cfg = self._source.config
        weights = {}
        for name, (hf, _) in LAYER.items():
            part = "" if name.endswith("norm") else "attention." if name[1] in "qkvo" else "feed_forward."
            weight = self._read(f"model.layers.{i}.{hf}.weight" if self._hf else f"layers.{i}.{part}{name}.weight")
            heads = {"wq": cfg.num_heads, "wk": cfg.num_kv_heads}.get(name)
            weights[name] = interleave(weight, heads) if heads and self._hf else weight
        return weights

    def table(self, name: str) -> np.ndarray:
        """embedding, final_norm or lm_head; a source without a head has the embedding for one."""
        raw = TABLES[name][self._hf]
        return self._read(raw if raw in self._source.raw else TABLES["embedding"][self._hf])

    def _read(self, name: str) -> np.ndarray:
        array = self._source.raw[name]
        values = array.read().astype(self._dtype, copy=False)
        array.release()
        return values


def verify(checkpoint: Checkpoint, source: Source, num_tokens: int = 64, show: bool = False) -> Report:
    """Compares a checkpoint with its source on random tokens (seed 0).

    Args:
        num_tokens: T; positions 0 to T - 1.
        show: print each place as it is reached.
    """
    cfg, theirs = checkpoint.config, source.config
    faults = list(_config_faults(cfg, theirs))
    shape = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    if any(getattr(cfg, name) != getattr(theirs, name) for name in shape):
        return Report({}, 0, 0, faults)
    errors: dict[str, tuple[float, float]] = {}
    weights, arrays = SourceWeights(source, checkpoint.dtype), checkpoint.arrays()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, num_tokens)
    positions = np.arange(num_tokens)
    freqs, factor = rope_frequencies(theirs, num_tokens)
    cos, sin = rope_angles(cfg, jnp.asarray(positions)[None], num_tokens)
    run_block = jax.jit(
        lambda layer, x: Block(cfg).apply({"params": layer}, x, jnp.asarray(positions)[None], cos, sin, None)[0]
    )

    def compare(place: str, ours: jax.Array, expected: np.ndarray, differing: Iterator[str]) -> None:
        errors[place] = (float(np.abs(np.asarray(ours, np.float64)[0] - expected).max()), float(np.abs(expected).max()))
        if show:
            print(f"{place:12} {errors[place][0]:.2e}  of {errors[place][1]:.3g}", flush=True)
        faults.extend(f"{place}: {fault}" for fault in differing)
        # NaN is a difference too, so the comparison is turned round.
        if not errors[place][0] <= TOLERANCE * errors[place][1] and not faults:
            faults.append(f"{place}: the weights are equal and the results are not: llama_jax computes this wrongly; report it")

    table = weights.table("embedding")
    x_ref = reference.embed(table, tokens)
    stored = arrays.read("embedding")
    x = jnp.asarray(stored[tokens].astype(np.float32))[None]
    compare("embedding", x, x_ref, _weight_faults("embedding", stored, table))
    for i in range(cfg.num_layers):
        expected, layer = weights.layer(i), _read_layer(arrays, i)
        x_ref = reference.block(theirs, x_ref, expected, positions, freqs, factor)
        x = run_block({name: value.astype(np.float32) for name, value in layer.items()}, x)
        compare(f"layer {i}", x, x_ref, _layer_faults(cfg, i, layer, expected))
    norm, output = weights.table("final_norm"), weights.table("lm_head")
    head = "embedding" if cfg.tied_head else "lm_head"
    params = {name: arrays.read(name) for name in ("final_norm", head)}
    expected_logits = reference.head(x_ref, norm, output, theirs.norm_eps)
    ours = logits(cfg, {name: jnp.asarray(value.astype(np.float32)) for name, value in params.items()}, x)
    differing = [*_weight_faults("final_norm", params["final_norm"], norm), *_head_faults(cfg, params[head], output)]
    compare("logits", ours, expected_logits, iter(differing))
    agreement = int((np.asarray(ours)[0].argmax(-1) == expected_logits.argmax(-1)).sum())
    return Report(errors, agreement, num_tokens, faults)


def _config_faults(cfg: ModelConfig, theirs: ModelConfig) -> Iterator[str]:
    causes = {
        "rope_theta": "wrong theta",
        "norm_eps": "wrong epsilon",
        "tied_head": "tied head",
        "num_kv_heads": "wrong number of key/value heads",
    }
    for field in dataclasses.fields(cfg):
        ours, expected = getattr(cfg, field.name), getattr(theirs, field.name)
        if ours != expected and field.name != "max_length":  # the context does not change what is computed
            cause = causes.get(field.name, "rotary scaling" if field.name.startswith("rope") else "another model's config")
            yield f"config: {field.name} is {ours}, the source says {expected} (likely cause: {cause})"


def _read_layer(arrays: ArrayReader, i: int) -> dict[str, np.ndarray]:
    return {ours: arrays.read(f"layers.{i}.{ours}") for _, ours in LAYER.values()}


def _layer_faults(
    cfg: ModelConfig, i: int, layer: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> Iterator[str]:
    for name, (_, ours) in LAYER.items():
        heads = {"wq": cfg.num_heads, "wk": cfg.num_kv_heads}.get(name)
        for fault in _weight_faults(f"layers.{i}.{ours}", layer[ours], expected[name], heads):
            twin = next((other for other, weight in expected.items() if np.array_equal(layer[ours], weight)), None)
            yield f"layers.{i}.{ours} is not the source's (likely cause: swapped, it is {LAYER[twin][1]})" if twin else fault


def _head_faults(cfg: ModelConfig, ours: np.ndarray, expected: np.ndarray) -> Iterator[str]:
    for fault in _weight_faults("lm_head", ours, expected):
        yield f"{fault}; the checkpoint's head is tied to the embedding, the source's is not" if cfg.tied_head else fault


def _weight_faults(name: str, ours: np.ndarray, expected: np.ndarray, heads: int | None = None) -> Iterator[str]:
    """A sentence when a weight is not the source's, with the likely cause.

    Args:
        ours: as in the checkpoint.
        expected: in Meta's shape and RoPE convention.
        heads: for q and k: how many heads have rows to permute.
    """
    flat = ours.reshape(expected.shape)
    if np.array_equal(interleave(flat, heads) if heads else flat, expected):
        return
    if heads and np.array_equal(flat, expected):
        cause = "its rows were not permuted from interleaved RoPE pairs to halves"
    elif heads and np.array_equal(interleave(interleave(flat, heads), heads), expected):
        cause = "its rows were permuted twice"
    elif expected.ndim == 2 and np.array_equal(flat.reshape(expected.shape[::-1]).T, expected):
        cause = "it was transposed"
    elif expected.ndim == 2 and expected.shape[0] == expected.shape[1] and np.array_equal(flat.T, expected):
        cause = "it was transposed"
    else:
        share = np.mean(flat != (interleave(expected, heads) if heads else expected))
        cause = f"other values ({share:.1%} of them), of another checkpoint or a damaged file"
    yield f"{name} is not the source's (likely cause: {cause})"
