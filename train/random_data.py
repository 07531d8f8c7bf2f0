"""Random documents in the form that training reads: for measuring."""

from pathlib import Path

import numpy as np

from llama_jax.data.dataset import PackedDataset, Part
from llama_jax.data.documents import Document
from llama_jax.data.packing import pack
from llama_jax.data.store import Documents, TokenStore, shard_file, write_shard


def random_dataset(folder: Path, *, vocab_size: int, length: int, rows: int, documents: int) -> PackedDataset:
    """Rows of so many documents of equal length, written into a folder and read from there.

    Args:
        folder: an empty one.
        length: T.
        rows: of the dataset.
        documents: in each row; as many tokens as are left over are padding.
    """
    each = length // documents
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows * documents, each)).tolist()
    learnt = [False] + [True] * (each - 1)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    written = write_shard(shard_file(folder, 0), [Document(ids, learnt, "text") for ids in tokens], range(len(tokens)), dtype)
    shard = dict(path="random", first=0, records=len(tokens), skipped=0, first_skipped="", **written)
    found = Documents([TokenStore(folder, {"shards": [shard]})])
    index = pack(found.lengths(), length, seed=0, packing="best_fit", window=documents)
    counts = dict.fromkeys(("skipped", "split", "truncated", "dropped"), 0)
    counts |= {"documents": len(found), "tokens": written["tokens"], "learnt_tokens": written["learnt_tokens"]}
    return PackedDataset([Part("random", found, index, counts, "random")], None, length)
