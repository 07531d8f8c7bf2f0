"""From the names of sources to a dataset: tokenised and packed once, and kept in a cache.

    dataset = open_dataset("books/*.txt", DataConfig(), tokenizer, length=4096, seed=0, cache=WORKDIR / "data")

What the cache holds lies under hashes of all that decided it: the files' sizes and times, tokenizer, chat format, length, seed,
packing. A later run finds it again, another setting makes another.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from llama_jax.data.dataset import PackedDataset, Part
from llama_jax.data.packing import LONG_DOCUMENTS, PACKINGS, load_index, pack, save_index
from llama_jax.data.prepare import ON_BAD_RECORD, Job, check_request, prepare_units, request_digest
from llama_jax.data.sources import Entry, parse_sources, plan_units
from llama_jax.data.store import MANIFEST, Documents, TokenStore, is_token_folder, write_whole
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.chat import FORMATS
from llama_jax.text.tokenizer import Tokenizer

INDEX_VERSION = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it becomes rows.

    Attributes:
        train, eval: sources, separated by commas: files, patterns, `hf:NAME:SPLIT`, prepared folders (llama_jax.data.sources);
            with `@WEIGHT` after each, the shares of the tokens that they have.
        packing: best_fit (whole documents share rows) | concat (all are joined and cut at the rows' ends).
        window: documents that best_fit packs together.
        long_documents: split (into rows) | truncate (what is beyond a row is lost; for conversations, whose later part means
            little without the earlier) | drop.
        on_bad_record: error | skip (and count).
        chat_format: of records with messages, a name of llama_jax.text.chat.FORMATS.
        cache: directory on a disk; programs choose one when it is "".
        prefetch: batches made ahead; 0 to make each when it is asked for.
        workers: processes that tokenise; 0 for as many as there are CPUs.
    """

    train: str = ""
    eval: str = ""
    packing: str = "best_fit"
    window: int = 10_000
    long_documents: str = "split"
    on_bad_record: str = "error"
    chat_format: str = ""
    cache: str = ""
    prefetch: int = 4
    workers: int = 0

    def __post_init__(self):
        known = {"packing": PACKINGS, "long_documents": LONG_DOCUMENTS, "on_bad_record": ON_BAD_RECORD}
        for name, values in (known | {"chat_format": ("", *FORMATS)}).items():
            if getattr(self, name) not in values:
                wanted = ", ".join(value or '""' for value in values)
                raise LlamaError(ExitCode.BAD_CONFIG, f"data.{name} is {getattr(self, name)!r}, expected one of {wanted}")
        for name, least in (("window", 1), ("prefetch", 0), ("workers", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise LlamaError(ExitCode.BAD_CONFIG, f"data.{name} is {value!r}, expected a whole number from {least}")


def open_dataset(
    sources: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int,
    cache: epath.PathLike,
    vocab_size: int | None = None,
) -> PackedDataset:
    """Tokenises and packs what the cache does not hold yet.

    Args:
        sources: as in DataConfig.train.
        tokenizer: from `load_tokenizer`.
        length: T.
        seed: of the documents' order.
        cache: directory on a disk. Several processes may share it: what they write is the same.
        vocab_size: of the model, which no token may lie outside of.

    Raises:
        LlamaError: a source is missing, empty, bad, or prepared with another tokenizer; the message says what to do.
    """
    if "://" in str(cache):
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"the data cache {cache} is in a bucket, but it is read by mapping: set config.data.cache to a disk",
        )
    if length < 2:
        raise LlamaError(ExitCode.BAD_CONFIG, f"length is {length}, expected at least 2 tokens a row")
    folder = Path(os.path.expanduser(cache))
    check_request(tokenizer, config.chat_format, config.on_bad_record)
    entries = parse_sources(sources)
    stores = [_open_tokens(entry, config, tokenizer, folder) for entry in entries]
    weighted = entries[0].weight is not None
    groups = [[store] for store in stores] if weighted else [stores]
    names = [entry.pattern for entry in entries] if weighted else [sources]
    parts = [
        _open_part(name, group, config, length=length, seed=seed, cache=folder, vocab_size=vocab_size)
        for name, group in zip(names, groups, strict=True)
    ]
    return PackedDataset(parts, [entry.weight for entry in entries] if weighted else None, length)


def _open_tokens(entry: Entry, config: DataConfig, tokenizer: Tokenizer, cache: Path) -> TokenStore:
    """A prepared folder, or the cache's of a source."""
    folder = None if entry.pattern.startswith("hf:") else epath.Path(entry.pattern).expanduser()
    if folder is not None and folder.is_dir() and is_token_folder(folder):
        store = TokenStore.open(Path(folder) if "://" not in str(folder) else _copy(folder, cache))
        if store.manifest["tokenizer"] != tokenizer.fingerprint:
            raise LlamaError(
                ExitCode.VOCAB_MISMATCH,
                f"{folder} was prepared with another tokenizer ({store.manifest['vocab_size']:,} tokens, this one has "
                f"{tokenizer.vocab_size:,}): prepare it again with --tokenizer of the model that is trained",
            )
        made = store.manifest["chat_format"]
        if config.chat_format not in ("", made) and store.manifest["statistics"]["kinds"].get("messages"):
            raise LlamaError(
                ExitCode.BAD_CONFIG,
                f"{folder} was prepared with chat format {made}, config.data.chat_format is {config.chat_format}: use the same",
            )
        return store
    units = plan_units(entry.pattern)
    job = Job(tokenizer, config.chat_format, config.on_bad_record, cache)
    job = dataclasses.replace(job, folder=cache / f"tokens-{request_digest(units, job)[:24]}")
    return prepare_units(units, job, config.workers, "cache of " + entry.pattern)


def _copy(folder: epath.Path, cache: Path) -> Path:
    """A prepared folder of a bucket on this machine's disk."""
    content = json.loads((folder / MANIFEST).read_bytes())["content"]
    copy = cache / f"copy-{content[:24]}"
    copy.mkdir(parents=True, exist_ok=True)
    names = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".json")]
    for name in sorted(names, key=lambda name: name == MANIFEST):
        if not (copy / name).exists():
            write_whole(copy / name, (folder / name).read_bytes())
    return copy


def _open_part(
    name: str,
    stores: Sequence[TokenStore],
    config: DataConfig,
    *,
    length: int,
    seed: int,
    cache: Path,
    vocab_size: int | None,
) -> Part:
    documents = Documents(stores)
    skipped = sum(shard.skipped for store in stores for shard in store.shards)
    if not len(documents):
        first = next((shard.first_skipped for store in stores for shard in store.shards if shard.first_skipped), "")
        why = f"; {skipped:,} bad records were skipped, the first: {first}" if skipped else ""
        raise LlamaError(ExitCode.NO_DATA, f"{name} holds no documents{why}: give data with at least one")
    if vocab_size is not None and documents.max_token >= vocab_size:
        document, token = documents.first_above(vocab_size)
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"{documents.name(document)} has token {token:,}, the model's vocabulary {vocab_size:,}: the tokenizer is another "
            "model's",
        )
    window = config.window if config.packing == "best_fit" else 0
    settings = [INDEX_VERSION, length, seed, config.packing, window, config.long_documents]
    digest = hashlib.sha256(json.dumps([settings, [store.fingerprint for store in stores]]).encode()).hexdigest()
    folder = cache / f"index-{digest[:24]}"
    if (found := load_index(folder)) is None:
        lengths, counts = limit(documents, length, config.long_documents)
        counts["learnt_tokens"] += sum(shard.learnt_tokens for store in stores for shard in store.shards)
        if not lengths.any() or counts["learnt_tokens"] <= 0:
            raise LlamaError(
                ExitCode.NO_DATA,
                f"{name}: none of the {len(documents):,} documents can be learnt from in rows of {length:,} tokens "
                f"({counts['dropped']:,} are longer): raise config.train.length, or set config.data.long_documents=split",
            )
        save_index(folder, pack(lengths, length, seed=seed, packing=config.packing, window=window), counts)
        found = load_index(folder)
    assert found is not None, f"{folder} was written and cannot be read"
    index, counts = found
    return Part(name, documents, index, {"documents": len(documents), "skipped": skipped, **counts}, digest)


def limit(documents: Documents, length: int, policy: str) -> tuple[np.ndarray, dict[str, int]]:
    """How many tokens of each document are packed, and what happened to those longer than a row.

    Returns:
        lengths [documents] int64, 0 for one that is dropped; counts, in which `learnt_tokens` is 0, less what was lost.
    """
    lengths = documents.lengths()
    counts = dict(tokens=int(lengths.sum()), learnt_tokens=0, split=0, truncated=0, dropped=0)
    long = np.flatnonzero(lengths > length).tolist()
    if policy == "split":
        return lengths, counts | {"split": len(long)}
    for document in long:
        shard, first, last = documents.place(document)
        kept = int(shard.learnt(first + 1, first + 1 + length).sum()) if policy == "truncate" else 0
        counts["learnt_tokens"] -= int(shard.learnt(first, last).sum()) - kept
        counts["truncated" if kept else "dropped"] += 1
        lengths[document] = length if kept else 0
    return lengths, counts
