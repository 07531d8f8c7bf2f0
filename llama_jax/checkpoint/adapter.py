"""Adapters on disk, and weights with an adapter added as they are read.

A LoRA run's checkpoint is `STEP = {checkpoint.json, tokenizer files, adapter/, state/}`: adapter/ has a float32 array for each
part of an adapted weight, "layers.0.q_proj.a", and checkpoint.json says under "adapter" its LoraConfig and which base it is of.
`adapted` puts the two together: every reader of weights then reads their sum, part by part, and no sum is stored.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from llama_jax.checkpoint.layout import LAYER_NAMES, Source
from llama_jax.checkpoint.quantized import QuantizedReader
from llama_jax.checkpoint.store import ADAPTER, ArrayReader, Checkpoint, to_flat
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import LoraConfig, adapter_shapes

FIELDS = tuple(field.name for field in dataclasses.fields(LoraConfig))


class Stored(Protocol):
    """An array on disk: a LazyArray of somebody else's file, a StoredArray of ours."""

    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray: ...

    def release(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class AdapterWeights:
    """An adapter in this process's memory (7B at rank 16: 160 MB).

    Attributes:
        arrays: float32, by dotted name: "layers.0.q_proj.a".
    """

    lora: LoraConfig
    arrays: Mapping[str, np.ndarray]

    def on(self, name: str, weight: Stored) -> Stored:
        """A weight by its name, with what the adapter adds to it."""
        if f"{name}.a" not in self.arrays:
            return weight
        a, b, magnitude = (self.arrays.get(f"{name}.{part}") for part in ("a", "b", "magnitude"))
        return MergedArray(weight, a, b, magnitude, self.lora.scale)


class MergedArray:
    """W + scale * B A, rows brought to DoRA's magnitudes, in float32; with the face of the weight's own array."""

    def __init__(self, weight: Stored, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None, scale: float):
        self.shape = weight.shape
        self._weight, self._a, self._b, self._magnitude, self._scale = weight, a, b, magnitude, scale

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, or the part at `index`, for which DoRA reads whole rows: their norms are needed."""
        index = index or tuple(slice(0, size) for size in self.shape)
        outputs = self._b.ndim - 1
        rows, columns = index[:outputs], index[outputs:]
        if self._magnitude is None:
            return self._sum(rows, columns)
        total = self._sum(rows, tuple(slice(0, size) for size in self.shape[outputs:]))
        norms = np.sqrt(np.sum(np.square(total), axis=tuple(range(outputs, total.ndim))))
        total *= (self._magnitude[rows] / norms).reshape(*norms.shape, *[1] * len(columns))
        return total[(..., *columns)]

    def _sum(self, rows: tuple[slice, ...], columns: tuple[slice, ...]) -> np.ndarray:
        product = np.tensordot(self._b[rows], self._a[(slice(None), *columns)], axes=1)
        return self._weight.read((*rows, *columns)).astype(np.float32) + np.float32(self._scale) * product

    def release(self) -> None:
        self._weight.release()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter, with the face of the checkpoint that their sum would be.

    Attributes:
        base: the weights; path, tokenizer, chat format and what made it are the adapter's where it has a checkpoint.
        weights: the adapter.
    """

    base: Checkpoint | Source
    weights: AdapterWeights

    def arrays(self) -> "MergedReader":
        return MergedReader(self)


class MergedReader:
    """`ArrayReader` of an AdaptedCheckpoint."""

    def __init__(self, checkpoint: AdaptedCheckpoint):
        self._weights = checkpoint.weights
        self._base = reader(checkpoint.base)

    def array(self, name: str) -> Stored:
        return self._weights.on(name, self._base(name))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.array(name).read(index)


def reader(opened: Checkpoint | Source) -> Callable[[str], Stored]:
    """A function from our dotted names to arrays on disk; quantised ones become float32 as they are read."""
    if isinstance(opened, Source):
        return opened.params.__getitem__
    return (QuantizedReader(opened) if opened.quantize else opened.arrays()).array


def adapted(base: Checkpoint | Source, weights: AdapterWeights, own: Checkpoint | None = None) -> Checkpoint | Source:
    """The base's weights with an adapter on them, as `load_params` and `export` take them.

    Args:
        own: the adapter's checkpoint, whose config, tokenizer and chat format are the sum's; the base's when not given.
    """
    if own is None and isinstance(base, Source):
        return dataclasses.replace(base, params={name: weights.on(name, array) for name, array in base.params.items()})
    fields = {field.name: getattr(own or base, field.name) for field in dataclasses.fields(Checkpoint)}
    fields |= {"dtype": base.dtype, "quantize": ""}  # sums are floats
    return AdaptedCheckpoint(**fields, base=base, weights=weights)


def stored_adapter(checkpoint: Checkpoint) -> AdapterWeights:
    """The adapter of a LoRA run's checkpoint."""
    lora = lora_config(checkpoint)
    arrays = ArrayReader(checkpoint.path / ADAPTER, "take another checkpoint of the run")
    names = to_flat(adapter_shapes(checkpoint.config, lora, scan=False))
    return AdapterWeights(lora, {name: arrays.read(name) for name in names})


def lora_config(checkpoint: Checkpoint) -> LoraConfig:
    """What checkpoint.json says about an adapter.

    Raises:
        LlamaError: it holds a model.
    """
    if checkpoint.adapter is None:
        raise LlamaError(ExitCode.NOT_A_CHECKPOINT, f"{checkpoint.path} holds a whole model: give it as the checkpoint instead")
    given = {name: checkpoint.adapter[name] for name in FIELDS}
    return LoraConfig(**given | {"targets": tuple(given["targets"])})


def adapter_record(lora: LoraConfig, base: Checkpoint | Source) -> dict[str, Any]:
    """What checkpoint.json says of an adapter that was trained on a base: `Checkpoint.adapter`."""
    path = str(base.path) if "://" in str(base.path) else str(epath.Path(base.path).absolute())
    return dataclasses.asdict(lora) | {"targets": list(lora.targets), "base": path, "base_fingerprint": fingerprint(base)}


def check_base(checkpoint: Checkpoint, base: Checkpoint | Source) -> str:
    """What is wrong with a base for an adapter's checkpoint: "" when it is the one that the adapter was trained on.

    Raises:
        LlamaError: it has other shapes.
    """
    check_shapes(checkpoint.config, base.config, f"{checkpoint.path} is an adapter", str(base.path))
    if fingerprint(base) == checkpoint.adapter["base_fingerprint"]:
        return ""
    return f"{base.path} has other weights than the base that {checkpoint.path} was trained on, {checkpoint.adapter['base']}"


def check_shapes(theirs: ModelConfig, base: ModelConfig, adapter: str, where: str) -> None:
    """Refuses a base whose projections have other shapes than an adapter's."""
    for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
        if getattr(theirs, name) != getattr(base, name):
            raise LlamaError(
                ExitCode.WRONG_SHAPE,
                f"{adapter} for {name} {getattr(theirs, name)}, and {where} has {getattr(base, name)}: give its own base",
            )


def fingerprint(opened: Checkpoint | Source) -> str:
    """A hash of values by which one model is known from another, the same in every format: sha256, in float32, of the first row
    of each weight of the first and the last layer, and of their norms and the final one."""
    digest = hashlib.sha256()
    if isinstance(opened, AdaptedCheckpoint):  # sums differ in the last bits from machine to machine; what is added does not
        digest.update(fingerprint(opened.base).encode())
        for name, array in sorted(opened.weights.arrays.items()):
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()
    read = reader(opened)
    layers = sorted({0, opened.config.num_layers - 1})
    for name in ("final_norm", *(f"layers.{i}.{leaf}" for i in layers for leaf in LAYER_NAMES)):
        array = read(name)
        row = array.read(tuple(slice(0, 1 if axis == 0 and len(array.shape) > 1 else n) for axis, n in enumerate(array.shape)))
        array.release()
        digest.update(f"{name} {array.shape} ".encode() + np.ascontiguousarray(row, np.float32).tobytes())
    return digest.hexdigest()
