"""Checkpoints on disk: `DIR/{checkpoint.json, tokenizer files, params/}`; of a LoRA run, adapter/ in the place of params/.

`params/` is an Orbax checkpoint with one array per layer per weight, zarr3, uncompressed, in chunks cut along the axes that
meshes shard (llama_jax.sharding): any Orbax restores it, and a device that holds an eighth of an array reads little more than
that. `checkpoint.json` says what the arrays are and is written last: a directory without it is not a checkpoint. Arrays are
read one at a time through TensorStore, the layer below Orbax, which starts faster and holds one array at a time.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.choices import METHODS, STORED_DTYPES
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.sharding import RULES

FORMAT, VERSION = "llama_jax checkpoint", 1
QUANTIZED_VERSION = 2  # of quantised weights only, which those who read version 1 would look for in vain
MANIFEST = "checkpoint.json"
STEPS = "checkpoints"
ADAPTER = "adapter"
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in STORED_DTYPES}
MIN_CHUNK_BYTES = 256 * 2**10
PIECES = 8


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: what `checkpoint.json` says, and where it lies.

    Attributes:
        path: the directory.
        config: the model.
        dtype: of every parameter; of quantised weights, of those that are not.
        chat_format: "" for a base model, or a name of llama_jax.text.chat.FORMATS.
        tokenizer: names of the tokenizer files in the directory; empty when the source had none.
        source: kind, path and files (name, bytes, sha256) of what it was converted from.
        command: what made it.
        adapter: of a checkpoint that holds an adapter and no model: its LoraConfig, and `base` (path) and `base_fingerprint` of
            the weights it belongs to (llama_jax.checkpoint.adapter).
        quantize: the method (llama_jax.ops.qarray) of projections and head, which are stored rounded
            (llama_jax.checkpoint.quantized); "" for floats.
    """

    path: epath.Path
    config: ModelConfig
    dtype: np.dtype
    chat_format: str
    tokenizer: tuple[str, ...]
    source: Mapping[str, Any]
    command: str
    adapter: Mapping[str, Any] | None = None
    quantize: str = ""

    @classmethod
    def open(cls, path: epath.PathLike) -> "Checkpoint":
        """Opens DIR, or the newest complete `checkpoints/STEP` of a training run's WORKDIR.

        Raises:
            LlamaError: there is no complete checkpoint, or it is of another version.
        """
        folder = _complete(epath.Path(path))
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            assert manifest["format"] == FORMAT
            version = manifest["version"]
        except (ValueError, KeyError, TypeError, AssertionError):
            raise LlamaError(
                ExitCode.NOT_A_CHECKPOINT, f"{folder / MANIFEST} is not one that llama_jax wrote: convert the source again"
            ) from None
        if version not in (VERSION, QUANTIZED_VERSION):
            raise LlamaError(
                ExitCode.NOT_A_CHECKPOINT,
                f"{folder} has format version {version}, this llama_jax reads versions {VERSION} and {QUANTIZED_VERSION}: "
                "update it, or convert again",
            )
        quantize = manifest.get("quantize", "")
        if quantize not in ("", *METHODS):
            raise LlamaError(
                ExitCode.NOT_A_CHECKPOINT,
                f"{folder} holds weights quantised by {quantize!r}, this llama_jax knows {', '.join(METHODS)}: update it, or "
                "quantise the float checkpoint again",
            )
        return cls(
            path=folder,
            config=ModelConfig(**manifest["config"]),
            dtype=DTYPES[manifest["dtype"]],
            chat_format=manifest["chat_format"],
            tokenizer=tuple(manifest["tokenizer"]),
            source=manifest["source"],
            command=manifest["command"],
            adapter=manifest.get("adapter"),
            quantize=quantize,
        )

    def manifest(self) -> dict[str, Any]:
        """What is written to checkpoint.json."""
        return {
            "format": FORMAT,
            "version": QUANTIZED_VERSION if self.quantize else VERSION,
            "config": dataclasses.asdict(self.config),
            "dtype": self.dtype.name,
            "chat_format": self.chat_format,
            "tokenizer": list(self.tokenizer),
            "source": dict(self.source),
            "command": self.command,
            **({} if self.adapter is None else {"adapter": dict(self.adapter)}),
            **({"quantize": self.quantize} if self.quantize else {}),
        }

    def arrays(self) -> "ArrayReader":
        """The model's, all floats.

        Raises:
            LlamaError: there is none, only an adapter; or the weights are quantised.
        """
        if self.adapter is not None:
            raise LlamaError(
                ExitCode.NOT_A_CHECKPOINT,
                f"{self.path} holds an adapter and no model (its base is {self.adapter['base']}): "
                "python -m llama_jax.export --merge makes one of them",
            )
        if self.quantize:
            raise LlamaError(
                ExitCode.BAD_REQUEST,
                f"{self.path} holds {self.quantize} weights, and this needs floats: give the checkpoint that it was made from "
                f"({self.command})",
            )
        return ArrayReader(self.path / "params")


class ArrayReader:
    """The arrays of `params/`, read when asked for; safe to use from several threads."""

    def __init__(self, folder: epath.Path, remedy: str = "convert the source again"):
        """remedy: what to do about an array that cannot be read."""
        import tensorstore as ts

        self._ts = ts
        self._folder = folder
        self._remedy = remedy
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        base = str(folder) if "://" in str(folder) else f"file://{folder.absolute()}"
        self._kvstore = {"driver": "ocdbt", "base": f"{base}/"}

    def open(self, name: str) -> Any:
        """The TensorStore of an array by its dotted name, e.g. "layers.0.q_proj"."""
        spec = {"driver": "zarr3", "kvstore": {**self._kvstore, "path": f"{name}/"}, "recheck_cached_data": False}
        try:
            return self._ts.open(spec, open=True, read=True, context=self._context).result()
        except (ValueError, OSError) as error:
            raise LlamaError(
                ExitCode.TRUNCATED, f"{self._folder} has no readable array {name!r} ({error}): {self._remedy}"
            ) from None

    def array(self, name: str) -> "StoredArray":
        """An array by its name; nothing of it is read yet."""
        return StoredArray(self.open(name), f"{self._folder}: array {name!r}", self._remedy)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """An array, or a part of it, in memory."""
        return self.array(name).read(index)


class StoredArray:
    """An array on disk, with the face of a source's LazyArray.

    Attributes:
        shape, dtype: on disk.
    """

    def __init__(self, store: Any, where: str, remedy: str):
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self._store = store
        self._where = where
        self._remedy = remedy

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, or the part at `index`; chunks that the part touches are read whole."""
        try:
            return (self._store if index is None else self._store[index]).read().result()
        except (ValueError, OSError) as error:
            raise LlamaError(ExitCode.TRUNCATED, f"{self._where} cannot be read ({error}): {self._remedy}") from None

    def release(self) -> None:
        """Nothing is kept."""


def to_tree(flat: Mapping[str, Any]) -> Any:
    """{"layers.0.q_proj": x} -> {"layers": [{"q_proj": x}]}; numbers from 0 without a gap are places in a list."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return _with_lists(tree)


def to_flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The inverse of `to_tree`: everything but dicts and lists is a leaf."""
    if not isinstance(tree, Mapping | list):
        return {prefix: tree}
    children = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    flat = {}
    for name, child in children:
        flat |= to_flat(child, f"{prefix}.{name}" if prefix else str(name))
    return flat


def stored_names(name: str, shape: Sequence[int]) -> list[str]:
    """Names on disk of an array in memory: a stack of layers, "layers.q_proj" [L, ...], has one for each of them."""
    head, layers, leaf = name.rpartition("layers.")
    if not layers or leaf[0].isdigit():
        return [name]
    return [f"{head}layers.{i}.{leaf}" for i in range(shape[0])]


def chunk_shape(shape: Sequence[int], axes: Sequence[str], itemsize: int) -> tuple[int, ...]:
    """How an array is cut on disk: gcd(size, 8) pieces along its tensor-sharded axis and along embed.

    Arrays too small for chunks of 256 KiB are cut less: along whichever axis has more pieces, embed first.
    """
    pieces = [
        math.gcd(size, PIECES) if RULES[axis] in ("tensor", "fsdp") else 1 for size, axis in zip(shape, axes, strict=True)
    ]
    while math.prod(shape) * itemsize < MIN_CHUNK_BYTES * math.prod(pieces) and max(pieces, default=1) > 1:
        most = max(range(len(pieces)), key=lambda i: (pieces[i], axes[i] == "embed"))
        pieces[most] //= 2
    return tuple(size // n for size, n in zip(shape, pieces, strict=True))


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and node.keys() == set(map(str, range(len(node)))):
        return [_with_lists(node[key]) for key in sorted(node, key=int)]
    return {key: _with_lists(child) for key, child in node.items()}


def complete_steps(workdir: epath.Path) -> list[int]:
    """The steps of a training run that have a complete checkpoint, `WORKDIR/checkpoints/STEP`, in order."""
    folder = workdir / STEPS
    steps = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(step.name) for step in steps if step.name.isdecimal() and (step / MANIFEST).exists())


def _complete(path: epath.Path) -> epath.Path:
    """The directory with a checkpoint.json at or under path."""
    if not path.exists():
        raise LlamaError(ExitCode.NOT_A_CHECKPOINT, f"{path} does not exist; python -m llama_jax.convert makes a checkpoint")
    if (path / MANIFEST).exists():
        return path
    if done := complete_steps(path):
        return path / STEPS / str(done[-1])
    raise LlamaError(
        ExitCode.NOT_A_CHECKPOINT,
        f"{path} holds no complete llama_jax checkpoint ({MANIFEST} is missing: a conversion that was stopped, or weights that "
        f"were not converted): run python -m llama_jax.convert --source WEIGHTS --output DIR",
    )
