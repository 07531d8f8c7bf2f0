"""Where records come from: every record once, however a file is cut; and what is said about sources that cannot be used."""

import gzip
import io
import json
import sys
import types
from pathlib import Path

import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.data.sources import (
    LINES,
    SEPARATORS,
    TEXT,
    Entry,
    find_files,
    parse_record,
    parse_sources,
    plan_units,
    read_records,
    records_before,
)
from llama_jax.errors import ExitCode, LlamaError

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_lists_of_sources():
    assert parse_sources("a.jsonl") == [Entry("a.jsonl")]
    assert parse_sources(" a.jsonl , dir/*.txt,") == [Entry("a.jsonl"), Entry("dir/*.txt")]
    assert parse_sources("a.jsonl@0.7,chat/*.jsonl@3") == [Entry("a.jsonl", 0.7), Entry("chat/*.jsonl", 3.0)]
    assert parse_sources("/home/me@work/a.txt") == [Entry("/home/me@work/a.txt")]
    assert parse_sources("gs://bucket/a.jsonl@2,hf:owner/name:train@1") == [
        Entry("gs://bucket/a.jsonl", 2.0),
        Entry("hf:owner/name:train", 1.0),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no source was named"),
        (" , ", "no source was named"),
        ("a.jsonl@much", "ends in @much, expected a weight"),
        ("a.jsonl@0", "weight 0, expected a positive number"),
        ("a.jsonl@-1", "weight -1, expected a positive number"),
        ("a.jsonl@inf", "expected a positive number"),
        ("a.jsonl@0.5,b.jsonl", "source b.jsonl has no weight and others have"),
    ],
)
def test_lists_that_cannot_be_read(text, what):
    with pytest.raises(LlamaError, match=what) as error:
        parse_sources(text)
    assert error.value.code == ExitCode.BAD_CONFIG


def test_patterns_name_files_in_order(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl", "a.jsonl", "b/c/3.jsonl", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files(f"{tmp_path}/{pattern}")]

    assert found("a.jsonl") == ["a.jsonl"]
    assert found("b/*.jsonl") == ["b/1.jsonl", "b/2.jsonl"]
    assert found("b/**/*.jsonl") == ["b/1.jsonl", "b/2.jsonl", "b/c/3.jsonl"]
    assert found("[x].jsonl") == ["[x].jsonl"]
    assert found("b/[12].jsonl") == ["b/1.jsonl", "b/2.jsonl"]


@pytest.mark.parametrize("pattern", ["none.jsonl", "none/*.jsonl", "*.parquet"])
def test_a_missing_file_says_what_was_looked_for(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    where = f"no training data at {pattern} (looked in {tmp_path})".replace("*", r"\*").replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(LlamaError, match=where) as error:
        find_files(pattern)
    assert error.value.code == ExitCode.NO_DATA


def test_what_is_no_source_is_refused_with_what_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(LlamaError, match=r"is of no known kind; known: \.jsonl, \.ndjson"):
        plan_units(str(tmp_path / "a.csv"))
    with pytest.raises(LlamaError, match="is a folder and not one that"):
        plan_units(str(tmp_path / "folder"))


@fuzz
@given(
    kind=st.sampled_from([LINES, TEXT]),
    pieces=st.lists(st.sampled_from([b"", b"a", b"<|", b"some text\r", b"\n", b"<|endoftext|>", b"x" * 30]), max_size=30),
    size=st.integers(1, 60),
)
def test_every_record_is_in_one_unit(tmp_path, kind, pieces, size):
    content, separator = b"".join(pieces), SEPARATORS[kind]
    file = tmp_path / ("a.jsonl" if kind == LINES else "a.txt")
    file.write_bytes(content)
    expected = content.split(separator)
    expected = expected[:-1] if not expected[-1] else expected
    units = plan_units(str(file), unit_bytes=size)
    found = []
    for unit in units:
        assert records_before(unit) == len(found)
        found += read_records(unit)
    assert found == expected


def test_records_longer_than_a_block_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.data.sources.BLOCK_BYTES", 7)
    lines = [b"a" * 50, b"b", b"c" * 20]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    units = plan_units(str(tmp_path / "a.jsonl"), unit_bytes=10)
    assert [record for unit in units for record in read_records(unit)] == lines
    texts = [b"a" * 50, b"b" * 8]
    (tmp_path / "a.txt").write_bytes(b"<|endoftext|>".join(texts))
    assert [record for unit in plan_units(str(tmp_path / "a.txt")) for record in read_records(unit)] == texts


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    (unit,) = plan_units(str(tmp_path / "a.jsonl.gz"), unit_bytes=5)
    assert [parse_record(unit.kind, raw) for raw in read_records(unit)] == [{"text": "a"}, {"text": "b"}]


def test_text_is_one_document_unless_separated():
    assert parse_record(TEXT, b"\n A line.\n\nAnother.\n") == {"text": " A line.\n\nAnother."}
    assert parse_record(TEXT, b" \n") is None and parse_record(LINES, b"\r") is None


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b'{"text": ', "is not valid JSON"),
        (b"[", "is not valid JSON .*one JSON array: write one object a line"),
        (b"[1, 2]", "holds list, expected a JSON object"),
        (b'"text"', "holds str, expected a JSON object"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_bad_lines(raw, what):
    with pytest.raises(LlamaError, match=what) as error:
        parse_record(LINES, raw)
    assert error.value.code == ExitCode.BAD_RECORD


def test_a_changed_file_has_another_identity(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    before = plan_units(str(file))
    assert plan_units(str(file)) == before
    file.write_text('{"text": "b"}\n')
    assert plan_units(str(file)) != before


def test_buckets_are_read_by_epath():
    """No bucket is reached here: epath's own stand-in for one."""
    files = {"gs://bucket/x/a.jsonl": b'{"text": "a"}\n', "gs://bucket/x/b.jsonl": b'{"text": "b"}\n'}

    with epath.testing.mock_epath(
        exists=lambda real, path: str(path) in files,
        isdir=lambda real, path: False,
        glob=lambda real, pattern: sorted(files) if str(pattern) == "gs://bucket/x/*.jsonl" else [],
        stat=lambda real, path: types.SimpleNamespace(length=len(files[str(path)]), mtime=1),
        open=lambda real, path, mode: io.BytesIO(files[str(path)]),
    ):
        units = plan_units("gs://bucket/x/*.jsonl")
        assert [unit.path for unit in units] == sorted(files)
        assert [json.loads(raw) for unit in units for raw in read_records(unit)] == [{"text": "a"}, {"text": "b"}]
        with pytest.raises(LlamaError, match="no training data at gs://bucket/none: there is no such file"):
            plan_units("gs://bucket/none")


class FakeTable:
    """Stands for pyarrow.parquet.ParquetFile: two row groups."""

    groups = ([{"text": "a", "other": 1}, {"text": None, "other": 2}], [{"text": "c", "other": 3}])
    num_row_groups = 2
    schema_arrow = types.SimpleNamespace(names=["text", "other"])
    metadata = types.SimpleNamespace(row_group=lambda i: types.SimpleNamespace(num_rows=len(FakeTable.groups[i])))

    def __init__(self, file):
        if file.read(4) != b"PAR1":
            raise ValueError("no magic bytes")

    def read_row_group(self, i, columns):
        rows = [{name: row[name] for name in columns or row} for row in self.groups[i]]
        return types.SimpleNamespace(to_pylist=lambda: rows)


def test_parquet_is_read_by_row_group(tmp_path, monkeypatch):
    module = types.ModuleType("pyarrow.parquet")
    module.ParquetFile = FakeTable
    package = types.ModuleType("pyarrow")
    package.parquet = module
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    units = plan_units(str(tmp_path / "a.parquet"))
    assert [records_before(unit) for unit in units] == [0, 2]
    records = [parse_record(unit.kind, raw) for unit in units for raw in read_records(unit)]
    assert records == [{"text": "a"}, {}, {"text": "c"}]
    (tmp_path / "b.parquet").write_bytes(b"none")
    with pytest.raises(LlamaError, match=r"b\.parquet cannot be read \(no magic bytes\): is the file whole\?"):
        plan_units(str(tmp_path / "b.parquet"))


class FakeDataset:
    """Stands for datasets.Dataset."""

    info = types.SimpleNamespace(dataset_name="stories")
    _fingerprint = "f00d"

    def __init__(self, rows):
        self.rows = rows
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def select_columns(self, columns):
        return FakeDataset([{name: row[name] for name in columns} for row in self.rows])

    def select(self, places):
        return FakeDataset([self.rows[i] for i in places])


def test_hugging_face_datasets_are_read_in_parts(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return FakeDataset([{"text": str(i), "label": i} for i in range(5)])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    units = plan_units("hf:owner/stories:train", unit_records=2)
    assert [records_before(unit) for unit in units] == [0, 2, 4]
    assert [record for unit in units for record in read_records(unit)] == [{"text": str(i)} for i in range(5)]
    plan_units("hf:owner/stories:en:train[:10%]")
    assert asked[0] == ("owner/stories", None, "train") and asked[-1] == ("owner/stories", "en", "train[:10%]")
    with pytest.raises(LlamaError, match="is no dataset, expected hf:NAME:SPLIT"):
        plan_units("hf:owner/stories")
    module.load_dataset = lambda *_, **__: 1 / 0
    with pytest.raises(LlamaError, match="hf:a:b cannot be loaded: ZeroDivisionError") as error:
        plan_units("hf:a:b")
    assert error.value.code == ExitCode.NO_DATA


def test_extras_that_are_not_installed_say_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LlamaError, match=r"needs the package datasets: pip install 'llama_jax\[data\]'"):
        plan_units("hf:owner/stories:train")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(LlamaError, match=r"needs the package pyarrow: pip install 'llama_jax\[data\]'"):
        plan_units(str(tmp_path / "a.parquet"))


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert find_files("~/a.jsonl") == find_files("~/*.jsonl") == [epath.Path(tmp_path / "a.jsonl")]
    assert Path(plan_units("~/a.jsonl")[0].path) == tmp_path / "a.jsonl"
