"""Where training data comes from: files and datasets, cut into units that one process reads at a time.

| source | records |
|---|---|
| `*.jsonl`, `*.ndjson`, `*.json` | one JSON object a line |
| `*.txt`, `*.text`, `*.md` | one document a file, or several with `<|endoftext|>` between them |
| `*.parquet` | one a row (extra `[data]`) |
| `hf:NAME:SPLIT`, `hf:NAME:CONFIG:SPLIT` | one a row of a Hugging Face dataset (extra `[data]`) |
| a folder | documents that `python -m llama_jax.data.prepare` has made |

Lines and texts may be compressed (`.gz`); paths may be patterns (`chat/*.jsonl`, `**`) and lie in a bucket (`gs://`).
"""

import contextlib
import dataclasses
import glob
import gzip
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from etils import epath

from llama_jax.errors import ExitCode, LlamaError

LINES, TEXT, PARQUET, HUB = "lines", "text", "parquet", "hub"
KINDS = {".jsonl": LINES, ".ndjson": LINES, ".json": LINES, ".txt": TEXT, ".text": TEXT, ".md": TEXT, ".parquet": PARQUET}
SEPARATORS = {LINES: b"\n", TEXT: b"<|endoftext|>"}
HUB_NAME = re.compile(r"hf:(?P<name>[^:]+)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[.*\])?)")
UNIT_BYTES = 32 * 2**20  # of a file that one process reads at a time
UNIT_RECORDS = 50_000  # of a dataset
BLOCK_BYTES = 2**20
COLUMNS = ("messages", "prompt", "completion", "text")  # what a record may hold


@dataclasses.dataclass(frozen=True)
class Entry:
    """One source of a list: a pattern and its share of the tokens, relative to the others'; None where nobody gave one."""

    pattern: str
    weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source.

    Attributes:
        kind: LINES, TEXT, PARQUET or HUB.
        path: the file, or the dataset's `hf:` name.
        start, end: bytes of a file (records that begin there), a row group, or rows of a dataset.
        identity: what changes when the source does: size and time of a file, fingerprint of a dataset.
    """

    kind: str
    path: str
    start: int
    end: int
    identity: str


def parse_sources(text: str) -> list[Entry]:
    """`"a.jsonl@0.7,chat/*.jsonl@0.3"` -> its sources.

    A weight is a source's share of the tokens, relative to the other weights. Without weights every document has its turn
    once in an epoch. All have one, or none.
    """
    entries = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(.+)@([^@/]*)", part)
        pattern, weight = found.groups() if found else (part, None)
        try:
            entry = Entry(pattern, None if weight is None else float(weight))
        except ValueError:
            raise _bad(f"source {part!r} ends in @{weight}, expected a weight there, e.g. {pattern}@0.5") from None
        if entry.weight is not None and not 0 < entry.weight < math.inf:
            raise _bad(f"source {pattern} has weight {weight}, expected a positive number")
        entries.append(entry)
    if not entries:
        raise _bad("no source was named: give a file, a pattern, a prepared folder or hf:NAME:SPLIT")
    if len({entry.weight is None for entry in entries}) > 1:
        without = next(entry.pattern for entry in entries if entry.weight is None)
        raise _bad(f"source {without} has no weight and others have: give all of them one (PATH@WEIGHT), or none")
    return entries


def find_files(pattern: str) -> list[epath.Path]:
    """The files (or the one folder) that a pattern names, in order of their names."""
    path = epath.Path(pattern).expanduser()
    wild = re.search(r"[*?\[]", pattern)
    if wild is None or ("://" not in pattern and path.exists()):
        found = [path] if path.exists() else []
    elif "://" in pattern:
        base = pattern[: wild.start()].rpartition("/")[0]
        found = sorted(epath.Path(base).glob(pattern[len(base) + 1 :]))
    else:
        found = [epath.Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not os.path.isdir(name)]
    if not found:
        where = "" if "://" in pattern or pattern.startswith("/") else f" (looked in {epath.Path().absolute()})"
        raise LlamaError(ExitCode.NO_DATA, f"no training data at {pattern}{where}: there is no such file; check config.data")
    return found


def plan_units(pattern: str, *, unit_bytes: int = UNIT_BYTES, unit_records: int = UNIT_RECORDS) -> list[Unit]:
    """All of a source (but not a prepared folder) in units; the same source gives the same units."""
    if pattern.startswith("hf:"):
        dataset = _load_hub(pattern)
        identity = f"{dataset.info.dataset_name} {dataset._fingerprint} {len(dataset)}"
        starts = range(0, len(dataset), unit_records)
        return [Unit(HUB, pattern, start, min(start + unit_records, len(dataset)), identity) for start in starts]
    units = []
    for path in find_files(pattern):
        kind = kind_of(path)
        size, step = path.stat().length, unit_bytes
        modified = path.stat().mtime if "://" in str(path) else os.stat(path).st_mtime_ns
        identity = f"{size} bytes, modified {modified}"
        if kind == PARQUET:
            with _parquet(path) as table:
                size, step = table.num_row_groups, 1
        elif path.suffix == ".gz":
            size = step = 2**62  # one unit: nothing but reading tells where a record begins
        units += [Unit(kind, str(path), start, min(start + step, size), identity) for start in range(0, size, step)]
    return units


def kind_of(path: epath.Path) -> str:
    if path.is_dir():
        raise _bad(f"{path} is a folder and not one that llama_jax.data.prepare made: name its files, e.g. {path}/*.jsonl")
    name = path.name.removesuffix(".gz")
    kind = KINDS.get(name[name.rfind(".") :].lower()) if "." in name else None
    if kind is None or (kind == PARQUET and name != path.name):
        raise _bad(
            f"{path} is of no known kind; known: {', '.join(KINDS)} (the first six also with .gz), hf:NAME:SPLIT, a folder"
        )
    return kind


def read_records(unit: Unit) -> Iterator[bytes | Mapping[str, Any]]:
    """The unit's records as they stand in the source, blank ones included, so that they can be counted."""
    if unit.kind == HUB:
        dataset = _load_hub(unit.path)
        columns = [name for name in COLUMNS if name in dataset.column_names]
        yield from dataset.select_columns(columns or dataset.column_names).select(range(unit.start, unit.end))
    elif unit.kind == PARQUET:
        with _parquet(epath.Path(unit.path)) as table:
            columns = [name for name in COLUMNS if name in table.schema_arrow.names]
            yield from table.read_row_group(unit.start, columns or None).to_pylist()
    else:
        with _opened(unit) as file:
            yield from split_records(file, SEPARATORS[unit.kind], unit.start, unit.end)


def split_records(file: BinaryIO, separator: bytes, start: int, end: int) -> Iterator[bytes]:
    """What stands between separators, of which the first byte lies in [start, end)."""
    position = max(start - len(separator), 0)  # of the first byte of `held`
    file.seek(position)
    held, searched, inside = bytearray(), 0, start == 0
    while True:
        at = held.find(separator, searched)
        if at < 0:
            searched = max(len(held) - len(separator) + 1, 0)
            block = file.read(BLOCK_BYTES)
            if not block:
                break
            held += block
            continue
        if inside:
            yield bytes(held[:at])
        del held[: at + len(separator)]
        position, searched, inside = position + at + len(separator), 0, True
        if position >= end:
            return
    if inside and held:
        yield bytes(held)


def records_before(unit: Unit) -> int:
    """How many records its source has before the unit (blank ones counted): the number of its first, from 0."""
    if unit.kind == HUB:
        return unit.start
    if unit.kind == PARQUET:
        with _parquet(epath.Path(unit.path)) as table:
            return sum(table.metadata.row_group(i).num_rows for i in range(unit.start))
    if unit.start == 0:
        return 0
    with _opened(unit) as file:
        return sum(1 for _ in split_records(file, SEPARATORS[unit.kind], 0, unit.start))


def parse_record(kind: str, raw: bytes | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A record as an object, None for a blank line or text; LlamaError BAD_RECORD says what is wrong, not where."""
    if isinstance(raw, Mapping):
        return {name: value for name, value in raw.items() if value is not None}
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_record(f"is not UTF-8 (byte {error.start + 1:,}): save it as UTF-8") from None
    if not text.strip():
        return None
    if kind == TEXT:
        return {"text": text.strip("\r\n")}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; the file looks like one JSON array: write one object a line" if text.lstrip().startswith("[") else ""
        raise bad_record(f"is not valid JSON ({str(error)[:120]}){hint}") from None
    if not isinstance(record, dict):
        raise bad_record(f"holds {type(record).__name__}, expected a JSON object with one of {', '.join(COLUMNS)}")
    return {name: value for name, value in record.items() if value is not None}


def bad_record(what: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_RECORD, what)


@contextlib.contextmanager
def _opened(unit: Unit) -> Iterator[BinaryIO]:
    with epath.Path(unit.path).open("rb") as file:
        yield gzip.GzipFile(fileobj=file, mode="rb") if unit.path.endswith(".gz") else file


def _load_hub(pattern: str) -> Any:
    found = HUB_NAME.fullmatch(pattern)
    if found is None:
        raise _bad(
            f"{pattern} is no dataset, expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, e.g. hf:roneneldan/TinyStories:train"
        )
    try:
        import datasets
    except ImportError:
        raise _bad(f"{pattern} needs the package datasets: pip install 'llama_jax[data]'") from None
    try:
        return datasets.load_dataset(found["name"], found["config"], split=found["split"])
    except Exception as error:  # whatever a download and a foreign reader can raise
        raise LlamaError(ExitCode.NO_DATA, f"{pattern} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error


@contextlib.contextmanager
def _parquet(path: epath.Path) -> Iterator[Any]:
    """The ParquetFile of a path."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise _bad(f"{path} needs the package pyarrow: pip install 'llama_jax[data]'") from None
    with path.open("rb") as file:
        try:
            yield pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # ValueError: pyarrow's ArrowInvalid
            raise LlamaError(ExitCode.NO_DATA, f"{path} cannot be read ({str(error)[:200]}): is the file whole?") from error


def _bad(message: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_CONFIG, message)
