"""Writes weights as Hugging Face's safetensors, one tensor in memory at a time.

The `safetensors` package writes a file from all of its tensors at once, which for a 5 GB shard is 5 GB of memory.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.layout import HUGGING_FACE, flat_shape, leaf_of, names
from llama_jax.checkpoint.memory import ALIGNMENT
from llama_jax.checkpoint.safetensors_file import DTYPES
from llama_jax.config import ModelConfig

SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit for a file
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_huggingface(
    folder: Path,
    cfg: ModelConfig,
    dtype: np.dtype,
    read: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """model.safetensors, or model-00001-of-0000n.safetensors and so on with their index.

    Args:
        dtype: of every tensor.
        read: our dotted name -> the array in our shape.
        shard_bytes: how much one file may hold; a larger tensor has a file of its own.
    """
    files: list[dict[str, str]] = [{}]  # of each file: their name -> ours
    room = shard_bytes
    for ours, theirs in names(cfg, HUGGING_FACE):
        size = math.prod(flat_shape(cfg, leaf_of(ours))) * dtype.itemsize
        if size > room and files[-1]:
            files.append({})
            room = shard_bytes
        files[-1][theirs] = ours
        room -= size
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        shapes = {theirs: flat_shape(cfg, leaf_of(ours)) for theirs, ours in tensors.items()}
        write_safetensors(folder / file, dtype, shapes, lambda theirs, tensors=tensors: read(tensors[theirs]))
        weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": cfg.num_params * dtype.itemsize}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path, dtype: np.dtype, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> None:
    """A file of tensors of one dtype, sorted by name; `read` is called once for each, in that order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format asks for 8; such a file needs no copy to be loaded
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            array = np.ascontiguousarray(read(name), dtype)
            assert array.size == math.prod(shapes[name]), (name, array.shape, shapes[name])
            file.write(array.view(np.uint8).reshape(-1).data)
