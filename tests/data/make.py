"""A small tokenizer, and sources written on the spot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.dataset import PackedDataset
from llama_jax.data.opening import DataConfig, open_dataset
from llama_jax.text.tokenizer import Tokenizer


def write_jsonl(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def texts(count: int, seed: int = 0, longest: int = 40) -> list[dict[str, str]]:
    """Records with texts of 1 to `longest` words, many short ones among them."""
    rng = np.random.default_rng(seed)
    words = np.array("the child found a red house and looked at old river 1234 café".split())
    sizes = 1 + (rng.random(count) ** 2 * longest).astype(int)
    return [{"text": " ".join(rng.choice(words, size)) + f" {i}"} for i, size in enumerate(sizes)]


def dataset_of(
    sources: Path | str, tokenizer: Tokenizer, cache: Path, *, length: int = 32, seed: int = 0, **config: Any
) -> PackedDataset:
    return open_dataset(str(sources), DataConfig(**config), tokenizer, length=length, seed=seed, cache=cache)


def documents_in(dataset: PackedDataset) -> list[list[int]]:
    """The segments of all rows, as lists of ids."""
    segments = []
    for i in range(len(dataset)):
        row = dataset.row(i)
        segments += [row.tokens[row.segment_ids == s].tolist() for s in range(1, int(row.segment_ids.max()) + 1)]
    return segments
