"""Text and conversations -> token documents on disk, once, in parallel.

    python -m llama_jax.data.prepare --source "books/*.txt" --source chat.jsonl --tokenizer CHECKPOINT --output tokens

Training takes the folder as a source (and does the same by itself, into its cache, for sources that are not prepared). A run
that was stopped goes on where it was when the same command is given again: shards that are complete stay.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.documents import Document, to_document
from llama_jax.data.sources import (
    HUB,
    LINES,
    PARQUET,
    TEXT,
    UNIT_BYTES,
    Unit,
    parse_record,
    parse_sources,
    plan_units,
    read_records,
    records_before,
)
from llama_jax.data.store import (
    FORMAT,
    MANIFEST,
    REQUEST,
    VERSION,
    Documents,
    ShardInfo,
    TokenStore,
    read_json,
    shard_file,
    write_json,
    write_shard,
)
from llama_jax.distributed import is_main
from llama_jax.errors import ExitCode, LlamaError, run_command
from llama_jax.progress import progress_bar
from llama_jax.text.chat import FORMATS
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

ON_BAD_RECORD = ("error", "skip")
PLACES = {LINES: "line", TEXT: "document", PARQUET: "row", HUB: "row"}


@dataclasses.dataclass(frozen=True)
class Job:
    """How records become documents, and where they go; what a worker process is given."""

    tokenizer: Tokenizer
    chat_format: str
    on_bad_record: str
    folder: Path


def prepare(
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    chat_format: str = "",
    on_bad_record: str = "error",
    workers: int = 0,
    unit_bytes: int = UNIT_BYTES,
    command: str = "llama_jax.data.prepare.prepare",
) -> TokenStore:
    """Tokenises sources into a folder, or what of it is not done yet.

    Args:
        patterns: sources as in llama_jax.data.sources, without weights.
        tokenizer: from `load_tokenizer`.
        output: a folder on a disk; several processes may be given the same one, each then does the work.
        chat_format: a name of llama_jax.text.chat.FORMATS, for records with messages.
        on_bad_record: error (the first ends it, with its place) | skip (they are counted).
        workers: processes; 0 for as many as there are CPUs, if there is work for them.
        unit_bytes: of a file that one process reads at a time, and one shard holds.

    Raises:
        LlamaError: a source is not there, a record is bad, the output holds something else, the disk is full.
    """
    check_request(tokenizer, chat_format, on_bad_record)
    if "://" in str(output):
        raise LlamaError(ExitCode.BAD_REQUEST, f"{output} is in a bucket: give a folder on a disk, and copy that afterwards")
    units = [unit for pattern in patterns for unit in plan_units(pattern, unit_bytes=unit_bytes)]
    job = Job(tokenizer, chat_format, on_bad_record, Path(output))
    return prepare_units(units, job, workers, command)


def prepare_units(units: Sequence[Unit], job: Job, workers: int, command: str) -> TokenStore:
    """`prepare`, of units that are known already."""
    folder, digest = job.folder, request_digest(units, job)
    _claim(folder, digest)
    todo = [i for i in range(len(units)) if _finished(folder, i) is None]
    if todo or read_json(folder / MANIFEST) is None:
        _run(job, units, todo, workers or _enough_workers([units[i] for i in todo]))
        shards = _numbered(units, [_finished(folder, i) for i in range(len(units))])
        manifest = _manifest(shards, job, digest, command)
        write_json(folder / MANIFEST, {**manifest, "statistics": statistics_of(TokenStore(folder, manifest))})
    return TokenStore.open(folder)


def check_request(tokenizer: Tokenizer, chat_format: str, on_bad_record: str) -> None:
    if chat_format and chat_format not in FORMATS:
        raise LlamaError(ExitCode.BAD_CONFIG, f"chat format {chat_format!r} is unknown; known: {', '.join(FORMATS)}")
    if chat_format == "template" and not tokenizer.chat_template:
        raise LlamaError(ExitCode.BAD_CONFIG, "chat format is template and the tokenizer has no chat template: name another")
    if on_bad_record not in ON_BAD_RECORD:
        raise LlamaError(ExitCode.BAD_CONFIG, f"on_bad_record is {on_bad_record!r}, expected {' or '.join(ON_BAD_RECORD)}")
    assert tokenizer.fingerprint, "a tokenizer from load_tokenizer"


def request_digest(units: Sequence[Unit], job: Job) -> str:
    """Hash of all that decides what is written."""
    settings = [VERSION, job.tokenizer.fingerprint, job.chat_format, job.on_bad_record]
    return hashlib.sha256(json.dumps([settings, [dataclasses.astuple(unit) for unit in units]]).encode()).hexdigest()


def statistics_of(store: TokenStore) -> dict[str, Any]:
    """Counts over all shards, and the lengths of documents in tokens."""
    shards = store.shards
    counts = {name: sum(getattr(s, name) for s in shards) for name in ("documents", "tokens", "learnt_tokens", "skipped")}
    kinds: dict[str, int] = {}
    for shard in shards:
        kinds |= {kind: kinds.get(kind, 0) + n for kind, n in shard.kinds.items()}
    lengths = Documents([store]).lengths()
    if lengths.size:
        shares = {"shortest": 0, "median": 50, "90%": 90, "99%": 99, "longest": 100}
        counts["lengths"] = {name: int(np.percentile(lengths, share, method="lower")) for name, share in shares.items()}
    first_skipped = next((shard.first_skipped for shard in shards if shard.first_skipped), "")
    return {**counts, "kinds": kinds, "first_skipped": first_skipped}


def tokenize_unit(job: Job, i: int, unit: Unit) -> dict[str, Any]:
    """Writes shard i; returns what its .json holds."""
    documents: list[Document] = []
    records: list[int] = []
    skipped, first_skipped, count = 0, "", 0
    for raw in _readable(unit):
        try:
            record = parse_record(unit.kind, raw)
            if record is not None:
                documents.append(to_document(job.tokenizer, record, job.chat_format))
                records.append(count)
        except LlamaError as error:
            if error.code != ExitCode.BAD_RECORD:
                raise
            if not skipped:
                first_skipped = f"{unit.path}: {PLACES[unit.kind]} {records_before(unit) + count + 1} {error}"
            if job.on_bad_record == "error":
                raise LlamaError(
                    ExitCode.BAD_RECORD,
                    f"{first_skipped}; repair it, or leave such records out with on_bad_record=skip (--on-bad-record skip)",
                ) from error
            skipped += 1
        count += 1
    dtype = "uint16" if job.tokenizer.vocab_size <= 2**16 else "uint32"
    file = shard_file(job.folder, i)
    written = write_shard(file, documents, records, dtype)
    shard = {"path": unit.path, "records": count, "skipped": skipped, "first_skipped": first_skipped, **written}
    write_json(file.with_suffix(".json"), shard)
    return shard


def _readable(unit: Unit) -> Iterator[bytes | Mapping[str, Any]]:
    try:
        yield from read_records(unit)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: also pyarrow's
        raise LlamaError(
            ExitCode.NO_DATA, f"{unit.path} cannot be read ({type(error).__name__}: {str(error)[:200]}): is the file whole?"
        ) from error


def _claim(folder: Path, digest: str) -> None:
    """The folder is new, or holds this same request's shards."""
    request = {"format": FORMAT, "digest": digest}
    if folder.exists() and (not folder.is_dir() or any(file.suffix != ".tmp" for file in folder.iterdir())):
        found = read_json(folder / REQUEST) if folder.is_dir() else None
        if found != request:
            why = "holds something else" if found is None else "was made from other files or with other settings"
            raise LlamaError(ExitCode.OUTPUT_EXISTS, f"{folder} {why}: give another --output, or delete it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, request)


def _finished(folder: Path, i: int) -> dict[str, Any] | None:
    """A shard's .json, when the shard is whole."""
    file = shard_file(folder, i)
    shard = read_json(file.with_suffix(".json"))
    return shard if shard is not None and file.exists() and file.stat().st_size == shard["nbytes"] else None


_job: Job  # of a worker process


def _start_worker(job: Job) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    _job = job


def _work(i: int, unit: Unit) -> dict[str, Any]:
    return tokenize_unit(_job, i, unit)


def _enough_workers(units: Sequence[Unit]) -> int:
    """One for each CPU, and for each 8 MiB: a process takes seconds to start."""
    nbytes = sum(min(u.end - u.start, UNIT_BYTES) if u.kind in (LINES, TEXT) else UNIT_BYTES for u in units)
    return max(1, min(os.cpu_count() or 1, nbytes // 2**23))


def _run(job: Job, units: Sequence[Unit], todo: Sequence[int], workers: int) -> None:
    """Writes the shards that are left to do; of several errors, the one of the first unit is raised."""
    done = len(units) - len(todo)
    with progress_bar(len(units), "tokenising", initial=done, unit="shard", disable=not is_main()) as bar:
        if workers == 1 or len(todo) < 2:
            for i in todo:
                tokenize_unit(job, i, units[i])
                bar.update()
            return
        others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(todo)), context, initializer=_start_worker, initargs=(job,)
        ) as pool:
            try:
                for future in [pool.submit(_work, i, units[i]) for i in todo]:
                    future.result()
                    bar.update()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                if isinstance(error, concurrent.futures.BrokenExecutor):
                    message = "a tokenising process was ended from outside (no memory left?): run again with fewer workers"
                    raise LlamaError(ExitCode.PEER_DIED, message) from error
                raise


def _numbered(units: Sequence[Unit], shards: Sequence[dict[str, Any]]) -> list[ShardInfo]:
    """The shards, each knowing how many records its source has before it."""
    infos, first = [], 0
    for unit, shard in zip(units, shards, strict=True):
        first = 0 if unit.start == 0 else first
        infos.append(ShardInfo(first=first, **shard))
        first += shard["records"]
    return infos


def _manifest(shards: Sequence[ShardInfo], job: Job, digest: str, command: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": job.tokenizer.fingerprint,
        "vocab_size": job.tokenizer.vocab_size,
        "chat_format": job.chat_format,
        "request": digest,
        "content": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
        "command": command,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", required=True, action="append", help="file, pattern or hf:NAME:SPLIT; may be given more than once"
    )
    parser.add_argument("--tokenizer", required=True, help="a checkpoint, or a tokenizer's file or folder")
    parser.add_argument("--output", required=True, help="folder to make, or to go on with")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: as many as CPUs)")
    parser.add_argument("--chat-format", choices=("", *FORMATS), default="", help="how records with messages are written")
    parser.add_argument("--on-bad-record", choices=ON_BAD_RECORD, default="error")
    args = parser.parse_args()
    if args.workers < 0:
        parser.error(f"--workers is {args.workers}, expected 0 or more")
    entries = [entry for source in args.source for entry in parse_sources(source)]
    if weighted := [entry.pattern for entry in entries if entry.weight is not None]:
        parser.error(f"{weighted[0]} has a weight: prepare each source by itself and weigh the folders in config.data.train")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    store = prepare(
        [entry.pattern for entry in entries],
        load_tokenizer(args.tokenizer),
        args.output,
        chat_format=args.chat_format,
        on_bad_record=args.on_bad_record,
        workers=args.workers,
        command=shlex.join(["python", "-m", "llama_jax.data.prepare", *sys.argv[1:]]),
    )
    for name, value in store.manifest["statistics"].items():
        shown = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {shown:,}" if isinstance(shown, int) else f"{name}: {shown}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
