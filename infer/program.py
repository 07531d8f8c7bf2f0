"""What the programs of this room share: flags to a loaded model."""

from typing import Any

import ml_collections

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.program import define_config, run

__all__ = ["define_config", "load", "prepare", "run", "settings"]


def load(config: ml_collections.ConfigDict) -> Any:
    """The model that a program's config names."""
    return prepare(config).load()


def prepare(config: ml_collections.ConfigDict) -> Any:
    """What `load` reads, opened and checked (llama_jax.generation.load.Prepared)."""
    from llama_jax.generation.load import prepare

    if not config.checkpoint:
        raise LlamaError(ExitCode.BAD_REQUEST, "no checkpoint: --config.checkpoint=DIR names one that llama_jax.convert made")
    more = {name: config[name] for name in ("batch_size", "draft", "draft_tokens") if name in config}
    return prepare(
        config.checkpoint,
        mesh=config.mesh.to_dict(),
        dtype=config.dtype,
        quantize=config.quantize,
        cache_dtype=config.cache_dtype,
        max_length=config.max_length,
        tokenizer=config.tokenizer,
        adapter=config.adapter,
        **more,
    )


def settings(config: ml_collections.ConfigDict, max_new_tokens: int | None = None) -> Any:
    """The Settings of a program's config, which says max_new_tokens where it is not given."""
    import llama_jax

    values = config.sampling.to_dict()
    values["logit_bias"] = _parse_bias(values.get("logit_bias", ""))
    new = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    return llama_jax.Settings(max_new_tokens=new, **values)


def _parse_bias(text: str) -> dict[int, float]:
    try:
        pairs = (pair.split(":") for pair in text.split(",") if pair.strip())
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise LlamaError(ExitCode.BAD_REQUEST, f"logit_bias is {text!r}, expected ID:BIAS,ID:BIAS") from None
