"""What a Llama is: `ModelConfig`, the published presets, and reading one from Meta's params.json or HF's config.json.

Imports no jax: run configurations and command lines read this file and must start at once. Numbers come from the papers
(arXiv:2302.13971 table 2, 2307.09288 table 1, 2308.12950, 2407.21783 table 3) and from the released params.json and
config.json files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import ExitCode, LlamaError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that changes what the model computes; flat and hashable, so it is a static argument of jitted functions.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: V, D, L, N, K, H, F.
        max_length: context in tokens that the weights were trained or released for.
        norm_eps: epsilon inside the square root of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_type: default | linear | dynamic (NTK) | yarn | llama3; the fields below are read by the types named.
        rope_factor: linear, dynamic, yarn, llama3: how far the context is stretched.
        rope_original_length: dynamic, yarn, llama3: context before stretching.
        rope_low_freq_factor, rope_high_freq_factor: llama3.
        rope_beta_fast, rope_beta_slow, rope_truncate: yarn.
        rope_attention_factor: yarn: multiplies cos and sin.
        tied_head: the embedding is also the output projection; there is no lm_head.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    norm_eps: float
    rope_theta: float
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_original_length: int = 0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True
    rope_attention_factor: float = 1.0
    tied_head: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wrong_type = isinstance(value, bool) != (field.type is bool) or not isinstance(
                value, (int, float) if field.type is float else field.type
            )
            if wrong_type:
                raise LlamaError(
                    ExitCode.BAD_CONFIG, f"{field.name} is {value!r}, expected {field.type.__name__}: correct the config"
                )
        for name in SIZES:
            if getattr(self, name) <= 0:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("norm_eps", "rope_theta", "rope_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise LlamaError(
                ExitCode.BAD_CONFIG,
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads: the first must be a multiple "
                "of the second",
            )
        if self.head_dim % 2:
            raise LlamaError(ExitCode.BAD_CONFIG, f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.rope_type not in ROPE_TYPES:
            raise LlamaError(ExitCode.BAD_CONFIG, f"rope_type {self.rope_type!r} is unknown; known: {', '.join(ROPE_TYPES)}")
        if self.rope_type in ("dynamic", "yarn", "llama3") and self.rope_original_length <= 0:
            raise LlamaError(ExitCode.BAD_CONFIG, f"rope_type {self.rope_type!r} needs rope_original_length")

    @property
    def num_params(self) -> int:
        """Parameters in all, a tied head counted once."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        tables = (1 if self.tied_head else 2) * self.vocab_size * self.embed_dim
        return tables + self.num_layers * layer + self.embed_dim


SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_length")


def mlp_dim_rule(embed_dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's feed-forward width: two thirds of 4 D, times the multiplier, rounded up (facebookresearch/llama model.py)."""
    width = int(2 * (4 * embed_dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _llama(vocab, embed, layers, heads, kv_heads, mlp, length, eps=1e-5, theta=1e4, head_dim=128, **more) -> ModelConfig:
    return ModelConfig(vocab, embed, layers, heads, kv_heads, head_dim, mlp, length, eps, theta, **more)


def _llama3(factor: float) -> dict[str, Any]:
    return dict(theta=5e5, rope_type="llama3", rope_factor=factor, rope_original_length=8192)


PRESETS: dict[str, ModelConfig] = {
    "llama1_7b": _llama(32000, 4096, 32, 32, 32, 11008, 2048, eps=1e-6),
    "llama1_13b": _llama(32000, 5120, 40, 40, 40, 13824, 2048, eps=1e-6),
    "llama1_33b": _llama(32000, 6656, 60, 52, 52, 17920, 2048, eps=1e-6),
    "llama1_65b": _llama(32000, 8192, 80, 64, 64, 22016, 2048),
    "llama2_7b": _llama(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama2_13b": _llama(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama2_34b": _llama(32000, 8192, 48, 64, 8, 22016, 4096),  # never released; shape inferred from Code Llama 34B
    "llama2_70b": _llama(32000, 8192, 80, 64, 8, 28672, 4096),
    "codellama_7b": _llama(32016, 4096, 32, 32, 32, 11008, 16384, theta=1e6),
    "codellama_7b_python": _llama(32000, 4096, 32, 32, 32, 11008, 16384, theta=1e6),
    "codellama_13b": _llama(32016, 5120, 40, 40, 40, 13824, 16384, theta=1e6),
    "codellama_13b_python": _llama(32000, 5120, 40, 40, 40, 13824, 16384, theta=1e6),
    "codellama_34b": _llama(32000, 8192, 48, 64, 8, 22016, 16384, theta=1e6),
    "codellama_70b": _llama(32016, 8192, 80, 64, 8, 28672, 16384, theta=1e6),
    "llama3_8b": _llama(128256, 4096, 32, 32, 8, 14336, 8192, theta=5e5),
    "llama3_70b": _llama(128256, 8192, 80, 64, 8, 28672, 8192, theta=5e5),
    "llama3_1_8b": _llama(128256, 4096, 32, 32, 8, 14336, 131072, **_llama3(8.0)),
    "llama3_1_70b": _llama(128256, 8192, 80, 64, 8, 28672, 131072, **_llama3(8.0)),
    "llama3_1_405b": _llama(128256, 16384, 126, 128, 8, 53248, 131072, **_llama3(8.0)),
    "llama3_2_1b": _llama(128256, 2048, 16, 32, 8, 8192, 131072, head_dim=64, tied_head=True, **_llama3(32.0)),
    "llama3_2_3b": _llama(128256, 3072, 28, 24, 8, 8192, 131072, tied_head=True, **_llama3(32.0)),
    "llama3_3_70b": _llama(128256, 8192, 80, 64, 8, 28672, 131072, **_llama3(8.0)),
    # N, K, H, D and F all differ, so that no swap of axes passes a test.
    "tiny": _llama(320, 48, 3, 6, 2, 80, 256, head_dim=10),
}

_META_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta",
    "use_scaled_rope", "rope_scaling_factor", "max_batch_size", "max_seq_len",
}  # fmt: skip


def from_meta(
    params: Mapping[str, Any], *, vocab_size: int, tied_head: bool, max_length: int | None = None
) -> tuple[ModelConfig, list[str]]:
    """Reads Meta's params.json; what it does not say is decided here.

    The context comes from the preset with the same shape, theta and epsilon. The llama3 RoPE factor is 32 for the shapes of
    3.2 1B and 3B and 8 otherwise (their config.json on Hugging Face; Meta's code has 8 for all, meta-llama/llama-models#172).

    Args:
        params: the parsed file; everything may sit under a "model" key.
        vocab_size: rows of the embedding (params.json says -1 in Llama 1 and 2).
        tied_head: the checkpoint has one table for embedding and head.
        max_length: overrides the context.

    Returns:
        The config and sentences a user should read about what was assumed.

    Raises:
        LlamaError: a size is missing, or a key is unknown and so may change the mathematics.
    """
    params = params.get("model", params)
    if not isinstance(params, Mapping):
        raise LlamaError(ExitCode.BAD_CONFIG, f"params.json holds {type(params).__name__}, expected an object")
    unknown = sorted(k for k, v in params.items() if k not in _META_KEYS and v not in (None, False))
    if unknown:
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"params.json says {', '.join(f'{k}={params[k]!r}' for k in unknown)}, which llama_jax does not compute: "
            "it handles the text models of Llama 1 to 3.3, neither quantised nor with adapters",
        )
    missing = [k for k in ("dim", "n_layers", "n_heads") if not isinstance(params.get(k), int)]
    if missing:
        raise LlamaError(ExitCode.BAD_CONFIG, f"params.json lacks {', '.join(missing)}: it should be the file Meta ships")
    stated = params.get("vocab_size", -1)
    if stated not in (-1, None, vocab_size):
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"params.json says {stated} tokens, the embedding has {vocab_size} rows: wrong params.json?",
        )
    embed_dim, num_heads = params["dim"], params["n_heads"]
    if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
        raise LlamaError(ExitCode.BAD_CONFIG, f"params.json: dim {embed_dim} is not a multiple of n_heads {num_heads}")
    multiplier, multiple_of = params.get("ffn_dim_multiplier"), params.get("multiple_of", 256)
    if not isinstance(multiple_of, int) or multiple_of <= 0 or not isinstance(multiplier, (int, float, type(None))):
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"params.json: multiple_of {multiple_of!r} and ffn_dim_multiplier {multiplier!r} give no feed-forward width",
        )
    head_dim, layers = embed_dim // num_heads, params["n_layers"]
    config = ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=params.get("n_kv_heads") or num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim_rule(embed_dim, multiple_of, multiplier),
        max_length=1,
        norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_theta=float(params.get("rope_theta", 1e4)),
        tied_head=tied_head,
    )
    if params.get("use_scaled_rope"):
        small = (embed_dim, layers) in ((2048, 16), (3072, 28))
        factor = float(params.get("rope_scaling_factor") or (32.0 if small else 8.0))
        config = dataclasses.replace(config, rope_type="llama3", rope_factor=factor, rope_original_length=8192)
    notes = []
    names = [name for name, preset in PRESETS.items() if _same_but_length(config, preset)]
    if max_length is not None:
        length = max_length
    elif names:
        length = PRESETS[names[0]].max_length
        notes.append(f"context {length}, as {names[0]} has the same shape, theta and epsilon (--max-length changes it)")
    else:
        length = 2048
        notes.append(
            "warning: no published model has this shape, theta and epsilon: context set to 2048; --max-length N changes it"
        )
    return dataclasses.replace(config, max_length=length), notes


def _same_but_length(a: ModelConfig, b: ModelConfig) -> bool:
    return dataclasses.replace(a, max_length=1, tied_head=b.tied_head) == dataclasses.replace(b, max_length=1)


# Attributes of config.json that change the mathematics, with the values under which they change nothing.
_HF_MUST_BE: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "query_pre_attn_scalar": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "layer_types": (None,),
    "no_rope_layers": (None,),
    "alibi": (None, False),
}


def from_huggingface(config: Mapping[str, Any], *, max_length: int | None = None) -> tuple[ModelConfig, list[str]]:
    """Reads HF's config.json, with the key names of old files and of transformers 5 (`rope_parameters`, `dtype`).

    Context: `max_position_embeddings`, or `max_sequence_length` where that is larger (Vicuna 16k). For `dynamic` scaling the
    first is the length before stretching (transformers modeling_rope_utils.py), so the context is `factor` times it.

    Returns:
        The config and sentences a user should read about what was assumed.

    Raises:
        LlamaError: an attribute that changes the mathematics and is not handled, by name; or a missing size.
    """
    for name, neutral in _HF_MUST_BE.items():
        if (
            name in config
            and config[name] not in neutral
            and not (name == "layer_types" and set(config[name]) == {"full_attention"})
        ):
            raise LlamaError(
                ExitCode.BAD_CONFIG,
                f"config.json says {name}={config[name]!r}, which changes the mathematics and which llama_jax does not compute "
                f"(it handles {name} = {' or '.join(map(repr, neutral))})",
            )
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
    missing = [k for k in required if not isinstance(config.get(k), (int, float))]
    if missing:
        raise LlamaError(
            ExitCode.BAD_CONFIG, f"config.json lacks {', '.join(missing)}: it should be that of a LlamaForCausalLM"
        )
    embed_dim, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim")
    if head_dim is None:
        if not num_heads or embed_dim % num_heads:
            raise LlamaError(
                ExitCode.BAD_CONFIG, f"config.json: hidden_size {embed_dim} is not a multiple of {num_heads} heads"
            )
        head_dim = embed_dim // num_heads
    stated = config.get("max_position_embeddings", 2048)
    rope = _rope_from_huggingface(config, stated)
    length = max(stated, config.get("max_sequence_length") or 0)
    if rope.get("rope_type") == "dynamic":
        length = max(length, int(rope["rope_factor"] * stated))
    notes = []
    if "max_position_embeddings" not in config and max_length is None:
        notes.append("warning: config.json has no max_position_embeddings: context set to 2048; --max-length N changes it")
    return ModelConfig(
        vocab_size=config["vocab_size"],
        embed_dim=embed_dim,
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        mlp_dim=config["intermediate_size"],
        max_length=max_length or length,
        norm_eps=float(config["rms_norm_eps"]),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        **rope,
    ), notes


_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate", "finetuned"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip


def _rope_from_huggingface(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The rope fields of ModelConfig from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise LlamaError(ExitCode.BAD_CONFIG, f"config.json: rope_scaling is {scaling!r}, expected an object")
    theta = scaling.get("rope_theta", config.get("rope_theta", 1e4))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise LlamaError(
            ExitCode.BAD_CONFIG, f"config.json says rope type {kind!r}, which is unknown; known: {', '.join(_ROPE_KEYS)}"
        )
    unknown = sorted(
        k for k, v in scaling.items()
        if k not in _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta"} and v is not None
        and not (k == "partial_rotary_factor" and v == 1)
    )  # fmt: skip
    if unknown:
        raise LlamaError(
            ExitCode.BAD_CONFIG, f"config.json: rope type {kind!r} with {unknown}, which llama_jax does not compute"
        )

    def number(name: str, default: float | None = None) -> float:
        value = scaling.get(name) if scaling.get(name) is not None else default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LlamaError(ExitCode.BAD_CONFIG, f"config.json: rope type {kind!r} needs a number for {name}, got {value!r}")
        return float(value)

    rope: dict[str, Any] = dict(rope_theta=float(theta), rope_type=kind)
    if kind == "default":
        return rope
    original = int(number("original_max_position_embeddings", length)) if kind != "linear" else 0
    if kind == "yarn":
        rope["rope_factor"] = number("factor", length / original)
        rope["rope_beta_fast"], rope["rope_beta_slow"] = number("beta_fast", 32.0), number("beta_slow", 1.0)
        rope["rope_truncate"] = bool(scaling.get("truncate", True))
        rope["rope_attention_factor"] = _yarn_attention_factor(scaling, rope["rope_factor"])
    else:
        rope["rope_factor"] = number("factor")
    if kind == "dynamic" and original != length:
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"config.json: dynamic scaling from {original} with max_position_embeddings {length}: transformers scales from the "
            "second, others from the first; make them equal",
        )
    if kind == "llama3":
        rope["rope_low_freq_factor"], rope["rope_high_freq_factor"] = number("low_freq_factor"), number("high_freq_factor")
    return rope | dict(rope_original_length=original)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """Temperature of YaRN as a factor on cos and sin (Peng et al. 2023, arXiv:2309.00071, equation 22; mscale: DeepSeek)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM, in the key names that every release of transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.embed_dim,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.rope_original_length if config.rope_type == "dynamic" else config.max_length,
        "mlp_bias": False,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _rope_to_huggingface(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _rope_to_huggingface(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": config.rope_type, "factor": config.rope_factor}
    if config.rope_type in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = config.rope_original_length
    if config.rope_type == "llama3":
        scaling |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    if config.rope_type == "yarn":
        scaling |= {
            "attention_factor": config.rope_attention_factor,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "truncate": config.rope_truncate,
        }
    return scaling
