"""What settings may be called. Imports no jax: flags are read, and a mistake in them found, before it is loaded."""

import difflib
from collections.abc import Collection

from llama_jax.errors import ExitCode, LlamaError

STORED_DTYPES = ("bfloat16", "float16", "float32", "float64")  # of a checkpoint
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")  # of inference
CACHE_DTYPES = ("auto", "int8")  # of keys and values; auto: the compute dtype
# How weights are rounded: the dtype of their values, and the largest.
METHODS = {"int8": ("int8", 127.0), "w8a8": ("int8", 127.0), "int4": ("int4", 7.0), "fp8": ("float8_e4m3fn", 448.0)}


def check_preset(preset: str, known: Collection[str], remark: str = "") -> None:
    """Raises LlamaError where a config file has no such preset; the message names the nearest and all it has."""
    if preset not in known:
        near = difflib.get_close_matches(preset, known, 1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        said = f"no preset {preset!r}" if preset else "a preset is missing"
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"{said}: {meant}--config=FILE.py:PRESET takes one of {', '.join(known)}{remark and f'; {remark}'}",
        )
