"""`ModelConfig` from Meta's params.json and Hugging Face's config.json, and back to the latter."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llama_jax.config import PRESETS, ModelConfig, mlp_dim_rule
from llama_jax.errors import ExitCode, LlamaError

MAX_NUMBER = 2**40  # larger is no Llama; keeps products and messages short

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
    missing = [k for k in ("dim", "n_layers", "n_heads") if params.get(k) is None]
    if missing:
        raise LlamaError(ExitCode.BAD_CONFIG, f"params.json lacks {', '.join(missing)}: it should be the file Meta ships")
    embed_dim, layers, num_heads = (_size("params.json", params, k) for k in ("dim", "n_layers", "n_heads"))
    stated = params.get("vocab_size", -1)
    if stated not in (-1, None, vocab_size):
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"params.json says {stated} tokens, the embedding has {vocab_size} rows: wrong params.json?",
        )
    if embed_dim % num_heads:
        raise LlamaError(ExitCode.BAD_CONFIG, f"params.json: dim {embed_dim} is not a multiple of n_heads {num_heads}")
    multiplier = None
    if params.get("ffn_dim_multiplier") is not None:
        multiplier = _number("params.json", params, "ffn_dim_multiplier")
    config = ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=_size("params.json", params, "n_kv_heads", num_heads),
        head_dim=embed_dim // num_heads,
        mlp_dim=mlp_dim_rule(embed_dim, _size("params.json", params, "multiple_of", 256), multiplier),
        max_length=1,
        norm_eps=_number("params.json", params, "norm_eps", 1e-5),
        rope_theta=_number("params.json", params, "rope_theta", 1e4),
        tied_head=tied_head,
    )
    if params.get("use_scaled_rope"):
        small = (embed_dim, layers) in ((2048, 16), (3072, 28))
        factor = _number("params.json", params, "rope_scaling_factor", 32.0 if small else 8.0)
        config = dataclasses.replace(config, rope_type="llama3", rope_factor=factor, rope_original_length=8192)
    return _with_context(config, max_length)


def _with_context(config: ModelConfig, max_length: int | None) -> tuple[ModelConfig, list[str]]:
    """The config with the given context, that of the published model it is, or 2048, and a note on which."""

    def like(preset: ModelConfig) -> bool:
        return dataclasses.replace(config, max_length=preset.max_length, tied_head=preset.tied_head) == preset

    names = [name for name, preset in PRESETS.items() if like(preset)]
    if max_length is not None:
        length, notes = max_length, []
    elif names:
        length = PRESETS[names[0]].max_length
        notes = [f"context {length}, as {names[0]} has the same shape, theta and epsilon (--max-length changes it)"]
    else:
        length = 2048
        notes = [
            "warning: no published model has this shape, theta and epsilon: context set to 2048; --max-length N changes it"
        ]
    return dataclasses.replace(config, max_length=length), notes


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
        if name in config and not _is_neutral(config[name], neutral):
            raise LlamaError(
                ExitCode.BAD_CONFIG,
                f"config.json says {name}={config[name]!r:.200}, which changes the mathematics and which llama_jax does not "
                f"compute (it handles {name} = {' or '.join(map(repr, neutral))})",
            )
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
    missing = [k for k in required if config.get(k) is None]
    if missing:
        raise LlamaError(
            ExitCode.BAD_CONFIG, f"config.json lacks {', '.join(missing)}: it should be that of a LlamaForCausalLM"
        )
    embed_dim, num_heads = (_size("config.json", config, k) for k in ("hidden_size", "num_attention_heads"))
    if config.get("head_dim") is None and embed_dim % num_heads:
        raise LlamaError(ExitCode.BAD_CONFIG, f"config.json: hidden_size {embed_dim} is not a multiple of {num_heads} heads")
    stated = _size("config.json", config, "max_position_embeddings", 2048)
    rope = _rope_from_huggingface(config, stated)
    length = max(stated, _size("config.json", config, "max_sequence_length", 1))
    if rope["rope_type"] == "dynamic":
        length = max(length, int(rope["rope_factor"] * stated))
    notes = []
    if config.get("max_position_embeddings") is None and max_length is None:
        notes.append("warning: config.json has no max_position_embeddings: context set to 2048; --max-length N changes it")
    config = ModelConfig(
        vocab_size=_size("config.json", config, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=_size("config.json", config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_size("config.json", config, "num_key_value_heads", num_heads),
        head_dim=_size("config.json", config, "head_dim", embed_dim // num_heads),
        mlp_dim=_size("config.json", config, "intermediate_size"),
        max_length=length if max_length is None else max_length,
        norm_eps=_number("config.json", config, "rms_norm_eps"),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        **rope,
    )
    return config, notes


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether an attribute has one of the values under which it changes nothing (0 is not False here)."""
    if isinstance(value, list):  # layer_types
        return bool(value) and all(kind == "full_attention" for kind in value)
    return any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral)


def _number(file: str, values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number of a config file; the default where it is absent or null."""
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
        raise LlamaError(ExitCode.BAD_CONFIG, f"{file}: {name} is {value!r:.80}, expected a number: correct the file")
    return float(value)


def _size(file: str, values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of a config file; the default where it is absent or null."""
    number = _number(file, values, name, default)
    if number != int(number) or number < 1:
        raise LlamaError(ExitCode.BAD_CONFIG, f"{file}: {name} is {number:g}, expected a positive integer: correct the file")
    return int(number)


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
    theta = _number("config.json", scaling if scaling.get("rope_theta") is not None else config, "rope_theta", 1e4)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise LlamaError(
            ExitCode.BAD_CONFIG, f"config.json says rope type {kind!r:.80}, which is unknown; known: {', '.join(_ROPE_KEYS)}"
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

    where = f"config.json, rope type {kind}"
    rope: dict[str, Any] = dict(rope_theta=theta, rope_type=kind)
    if kind == "default":
        return rope
    original = 0 if kind == "linear" else _size(where, scaling, "original_max_position_embeddings", length)
    if kind == "yarn":
        rope["rope_factor"] = _number(where, scaling, "factor", length / original)
        rope["rope_beta_fast"] = _number(where, scaling, "beta_fast", 32.0)
        rope["rope_beta_slow"] = _number(where, scaling, "beta_slow", 1.0)
        rope["rope_truncate"] = bool(scaling.get("truncate", True))
        rope["rope_attention_factor"] = _yarn_attention_factor(where, scaling, rope["rope_factor"])
    else:
        rope["rope_factor"] = _number(where, scaling, "factor")
    if kind == "dynamic" and original != length:
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"config.json: dynamic scaling from {original} with max_position_embeddings {length}: transformers scales from the "
            "second, others from the first; make them equal",
        )
    if kind == "llama3":
        rope["rope_low_freq_factor"] = _number(where, scaling, "low_freq_factor")
        rope["rope_high_freq_factor"] = _number(where, scaling, "high_freq_factor")
    return rope | dict(rope_original_length=original)


def _yarn_attention_factor(where: str, scaling: Mapping[str, Any], factor: float) -> float:
    """Temperature of YaRN as a factor on cos and sin (Peng et al. 2023, arXiv:2309.00071, equation 22; mscale: DeepSeek)."""
    if scaling.get("attention_factor") is not None:
        return _number(where, scaling, "attention_factor")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(_number(where, scaling, "mscale")) / mscale(_number(where, scaling, "mscale_all_dim"))
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
