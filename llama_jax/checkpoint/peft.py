"""Adapters as Hugging Face's PEFT keeps them: a folder of adapter_config.json and adapter_model.safetensors.

A and B of a weight are matrices [R, inputs] and [outputs, R] under the name of its module, DoRA's magnitude a vector [outputs].
Rows of q and k are in Hugging Face's order, halves, which is ours: nothing is permuted. (Checked against peft 0.21.2.)
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.adapter import AdapterWeights
from llama_jax.checkpoint.files import fail, read_json, shown
from llama_jax.checkpoint.huggingface_writer import write_safetensors
from llama_jax.checkpoint.layout import FLOATS, HUGGING_FACE, LAYER, LAYER_NAMES
from llama_jax.checkpoint.lazy import LazyArray
from llama_jax.checkpoint.safetensors_file import open_safetensors
from llama_jax.checkpoint.store import to_flat
from llama_jax.checkpoint.torch_zip import open_torch
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import LoraConfig, adapter_shapes
from llama_jax.model.lora import TARGETS

CONFIG = "adapter_config.json"
WEIGHTS = (("adapter_model.safetensors", open_safetensors), ("adapter_model.bin", open_torch))
PREFIX = "base_model.model."
PARTS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
# What changes the mathematics, with the values under which it changes nothing. Some `init_lora_weights` (pissa, olora, corda,
# loftq) change the base as well.
_METHODS = ("arrow_config", "corda_config", "kasa_config", "lora_ga_config", "monteclora_config", "velora_config")
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "fan_in_fan_out": (False,), "bias": ("none",), "lora_bias": (False,), "modules_to_save": (None, []),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "layer_replication": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None, []), "alora_invocation_tokens": (None,), "use_qalora": (False,),
    "use_bdlora": (None, False), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(_METHODS, (None,)),
}  # fmt: skip


def is_peft(path: Any) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return "://" not in str(path) and (Path(path) / CONFIG).is_file()


def read_peft(folder: Path, cfg: ModelConfig) -> AdapterWeights:
    """Reads an adapter for a model; all layers have the same targets.

    Raises:
        LlamaError: the config asks for something else than LoRA of projections, or tensors are missing, unknown, or of other
            shapes than the model's.
    """
    config = read_json(folder / CONFIG)
    raw = _open(folder)
    present = [name for name in TARGETS if _theirs(0, name, "a") in raw]
    lora = _lora(folder, config, present)
    shapes, arrays = to_flat(adapter_shapes(cfg, lora, scan=False)), {}
    for ours, theirs in _names(cfg, lora):
        arrays[ours] = _array(folder, raw.pop(theirs, None), theirs, ours, shapes[ours].shape)
    if raw:
        fail(
            ExitCode.UNKNOWN_TENSOR,
            f"{folder} has {shown(next(iter(raw)))}{' and others' if len(raw) > 1 else ''}, expected LoRA of "
            f"{', '.join(TARGETS)} in all of {cfg.num_layers} layers: it belongs to another model, or adapts more",
        )
    return AdapterWeights(lora, arrays)


def write_peft(folder: Path, cfg: ModelConfig, weights: AdapterWeights, base_model: str = "") -> None:
    """Writes an adapter as `PeftModel.from_pretrained` reads it.

    Args:
        base_model: name or folder of the base, which AutoPeftModel loads by it.
    """
    lora = weights.lora
    arrays = {
        theirs: weights.arrays[ours].reshape(_flat(weights.arrays[ours].shape, ours)) for ours, theirs in _names(cfg, lora)
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    write_safetensors(folder / WEIGHTS[0][0], np.dtype(np.float32), shapes, arrays.__getitem__)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path) -> dict[str, LazyArray]:
    for name, open_file in WEIGHTS:
        if (folder / name).is_file():
            return dict(open_file(folder / name))
    fail(ExitCode.NO_WEIGHTS, f"{folder} has {CONFIG} and no {WEIGHTS[0][0]}: download it")


def _lora(folder: Path, config: Mapping[str, Any], targets: list[str]) -> LoraConfig:
    where = folder / CONFIG
    for name, neutral in _MUST_BE.items():
        if name in config and not any(type(config[name]) is type(value) and config[name] == value for value in neutral):
            fail(
                ExitCode.BAD_CONFIG,
                f"{where} says {name}={shown(config[name])}, which llama_jax does not compute (it handles {name} = "
                f"{' or '.join(map(repr, neutral))})",
            )
    if not targets:
        fail(ExitCode.MISSING_TENSOR, f"{folder} has no tensor like {_theirs(0, 'q_proj', 'a')}: it adapts no Llama")
    values = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout", 0.0)}
    for name, value in values.items():
        if type(value) not in (int, float):
            fail(ExitCode.BAD_CONFIG, f"{where}: {name} is {shown(value)}, expected a number")
    flags = {"rslora": config.get("use_rslora") is True, "dora": config.get("use_dora") is True}
    try:
        return LoraConfig(**values, **flags, targets=tuple(targets))
    except LlamaError as error:
        raise LlamaError(error.code, f"{where}: {error}") from None


def _names(cfg: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, str]]:
    """Our name and PEFT's, of every array."""
    for i in range(cfg.num_layers):
        for target in lora.targets:
            for part in PARTS if lora.dora else ("a", "b"):
                yield f"layers.{i}.{target}.{part}", _theirs(i, target, part)


def _theirs(layer: int, target: str, part: str) -> str:
    module = LAYER_NAMES[target][HUGGING_FACE].removesuffix(".weight")
    return f"{PREFIX}{LAYER[HUGGING_FACE].format(layer)}{module}{PARTS[part]}"


def _flat(shape: tuple[int, ...], ours: str) -> tuple[int, ...]:
    """PEFT's shape of an array: heads and head width are one axis."""
    part = ours.rpartition(".")[2]
    if part == "magnitude":
        return (math.prod(shape),)
    return (shape[0], math.prod(shape[1:])) if part == "a" else (math.prod(shape[:-1]), shape[-1])


def _array(folder: Path, array: LazyArray | None, theirs: str, ours: str, shape: tuple[int, ...]) -> np.ndarray:
    if array is None:
        fail(
            ExitCode.MISSING_TENSOR,
            f"{folder} lacks {theirs}, expected the same targets in every layer: it belongs to another model, or adapts less",
        )
    expected = _flat(shape, ours)
    if array.shape != expected or array.dtype not in FLOATS:
        fail(
            ExitCode.WRONG_SHAPE,
            f"{folder}: {theirs} is {array.dtype} {shown(array.shape)}, the model asks for numbers of shape {shown(expected)}",
        )
    return array.read().astype(np.float32).reshape(shape)
