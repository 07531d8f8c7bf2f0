"""Tokenised once: the same folder whatever the number of processes and interruptions, and what is said when it cannot be."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llama_jax.data import prepare as module
from llama_jax.data.documents import to_document
from llama_jax.data.prepare import prepare
from llama_jax.data.store import Documents, TokenStore, shard_file, write_whole
from llama_jax.errors import ExitCode, LlamaError
from tests.data.make import texts, write_jsonl

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the house"}]
MIXED = [
    {"text": "the house"},
    {"prompt": "the child", "completion": " found the house"},
    {"messages": CHAT},
]


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def document(documents: Documents, i: int) -> tuple[list[int], list[bool]]:
    shard, first, last = documents.place(i)
    return shard.tokens[first:last].tolist(), shard.learnt(first, last).astype(bool).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "a.jsonl", texts(200))


@pytest.fixture(scope="module")
def whole(source, tokenizer, tmp_path_factory):
    """The folder that one process makes in one go."""
    folder = tmp_path_factory.mktemp("whole") / "tokens"
    return prepare([str(source)], tokenizer, folder, workers=1, unit_bytes=2000)


@pytest.mark.parametrize("unit_bytes", [10, 100, 2**20])
def test_documents_are_those_of_their_records(tmp_path, tokenizer, unit_bytes):
    source = write_jsonl(tmp_path / "a.jsonl", MIXED)
    source.write_text("\n\n" + source.read_text() + "\n")
    (tmp_path / "b.txt").write_text("A text.\n<|endoftext|>\nAnother\n\none.\n<|endoftext|>\n")
    store = prepare(
        [f"{tmp_path}/*.jsonl", f"{tmp_path}/b.txt"],
        tokenizer,
        tmp_path / "tokens",
        chat_format="llama2",
        workers=1,
        unit_bytes=unit_bytes,
    )
    documents = Documents([store])
    records = [*MIXED, {"text": "A text."}, {"text": "Another\n\none."}]
    assert len(documents) == len(records)
    for i, record in enumerate(records):
        wanted = to_document(tokenizer, record, "llama2")
        assert document(documents, i) == (wanted.ids, wanted.learnt)
    lines = [f"{source}:{line}" for line in (3, 4, 5)] + [f"{tmp_path}/b.txt:{i}" for i in (1, 2)]
    assert [documents.name(i) for i in range(5)] == lines
    lengths = documents.lengths().tolist()
    assert lengths == [len(document(documents, i)[0]) for i in range(5)]
    statistics = store.manifest["statistics"]
    assert statistics["documents"] == 5 and statistics["tokens"] == sum(lengths)
    assert statistics["learnt_tokens"] == sum(sum(document(documents, i)[1]) for i in range(5))
    assert statistics["kinds"] == {"text": 3, "completion": 1, "messages": 1}
    assert statistics["lengths"]["shortest"] == min(lengths) and statistics["lengths"]["longest"] == max(lengths)


def test_several_processes_write_what_one_writes(source, tokenizer, whole, tmp_path):
    store = prepare([str(source)], tokenizer, tmp_path / "tokens", workers=2, unit_bytes=2000)
    assert contents(store.folder) == contents(whole.folder)
    assert len(whole.shards) > 5


def test_a_run_that_stopped_goes_on_where_it_was(source, tokenizer, whole, tmp_path, monkeypatch):
    real, written = module.tokenize_unit, []

    def stopping(job, i, unit):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(i)
        return real(job, i, unit)

    monkeypatch.setattr(module, "tokenize_unit", stopping)
    folder = tmp_path / "tokens"
    with pytest.raises(KeyboardInterrupt):
        prepare([str(source)], tokenizer, folder, workers=1, unit_bytes=2000)
    with pytest.raises(LlamaError, match=r"has no complete manifest\.json: run the same prepare command again") as error:
        TokenStore.open(folder)
    assert error.value.code == ExitCode.NO_DATA
    written.clear()
    monkeypatch.setattr(module, "tokenize_unit", lambda job, i, unit: (written.append(i), real(job, i, unit))[1])
    prepare([str(source)], tokenizer, folder, workers=1, unit_bytes=2000)
    assert written == list(range(3, len(whole.shards)))
    assert contents(folder) == contents(whole.folder)


def test_a_killed_run_goes_on_where_it_was(source, tokenizer, tokenizer_file, whole, tmp_path):
    folder = tmp_path / "tokens"
    program = (
        "import sys, time\n"
        "from llama_jax.data import prepare as module\n"
        "from llama_jax.text.tokenizer import load_tokenizer\n"
        "real = module.tokenize_unit\n"
        "module.tokenize_unit = lambda *job: (time.sleep(0.1), real(*job))[1]\n"
        "module.prepare([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3], workers=1, unit_bytes=2000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(tokenizer_file), str(folder)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (folder / "shard-00002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= len(list(folder.glob("shard-*.json"))) < len(whole.shards)
    prepare([str(source)], tokenizer, folder, workers=1, unit_bytes=2000)
    assert {name: data for name, data in contents(folder).items() if not name.endswith(".tmp")} == contents(whole.folder)


@pytest.mark.parametrize("damage", ["shorter", "gone", "no json", "manifest"])
def test_a_damaged_folder_is_not_used_and_is_repaired(source, tokenizer, whole, tmp_path, damage):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name, data in contents(whole.folder).items():
        (folder / name).write_bytes(data)
    file = shard_file(folder, 1)
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "gone":
        file.unlink()
    elif damage == "no json":
        file.with_suffix(".json").write_text("{")
    else:
        (folder / "manifest.json").write_text('{"format": ')
    if damage != "no json":
        with pytest.raises(LlamaError, match="again"):
            TokenStore.open(folder)
    prepare([str(source)], tokenizer, folder, workers=1, unit_bytes=2000)
    assert contents(folder) == contents(whole.folder)


def test_a_folder_of_something_else_stays(source, tokenizer, ranks, whole, tmp_path):
    before = contents(whole.folder)
    with pytest.raises(LlamaError, match="was made from other files or with other settings") as error:
        prepare([str(source)], ranks, whole.folder, workers=1, unit_bytes=2000)
    assert error.value.code == ExitCode.OUTPUT_EXISTS and contents(whole.folder) == before
    (tmp_path / "mine").write_text("my file")
    with pytest.raises(LlamaError, match="holds something else"):
        prepare([str(source)], tokenizer, tmp_path, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_is_named_or_counted(tmp_path, tokenizer, workers):
    lines = [json.dumps({"text": f"the house {i}"}) for i in range(100)]
    lines[40] = '{"text": "the'
    lines[70] = '{"txt": "the house"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ([str(tmp_path / "a.jsonl")], tokenizer)
    options = dict(workers=workers, unit_bytes=500)
    with pytest.raises(LlamaError, match=r"a\.jsonl: line 41 is not valid JSON .*on_bad_record=skip") as error:
        prepare(*arguments, tmp_path / "tokens", **options)
    assert error.value.code == ExitCode.BAD_RECORD
    store = prepare(*arguments, tmp_path / "skipped", on_bad_record="skip", **options)
    assert store.manifest["statistics"]["documents"] == 98 and store.manifest["statistics"]["skipped"] == 2
    assert "line 41 is not valid JSON" in store.manifest["statistics"]["first_skipped"]
    assert Documents([store]).name(97) == f"{tmp_path}/a.jsonl:100"


class Deadly:
    """Stands for a tokenizer; the process that is sent it ends."""

    fingerprint, vocab_size, chat_template = "f00d", 100, None

    def __reduce__(self):
        return os._exit, (9,)


def test_a_process_that_is_ended_from_outside_is_an_error_and_not_a_hang(source, tmp_path):
    with pytest.raises(LlamaError, match=r"ended from outside \(no memory left\?\): run again with fewer workers") as error:
        prepare([str(source)], Deadly(), tmp_path / "tokens", workers=2, unit_bytes=2000)
    assert error.value.code == ExitCode.PEER_DIED


def test_a_damaged_source_is_named(tmp_path, tokenizer):
    import gzip

    data = gzip.compress(json.dumps({"text": "the house " * 1000}).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(LlamaError, match=r"a\.jsonl\.gz cannot be read \(EOFError.*is the file whole"):
        prepare([str(tmp_path / "a.jsonl.gz")], tokenizer, tmp_path / "tokens", workers=1)


def test_a_full_disk_says_so_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LlamaError, match=r"the disk of .* is full: make room and run the same command again") as error:
        write_whole(tmp_path / "file", b"abc")
    assert error.value.code == ExitCode.DISK_FULL and not list(tmp_path.iterdir())


def test_settings_that_no_record_can_use_are_refused_at_once(tmp_path, tokenizer, ranks):
    source = write_jsonl(tmp_path / "a.jsonl", MIXED)
    cases = [
        (tokenizer, dict(chat_format="chatml"), "chat format 'chatml' is unknown; known: llama2"),
        (tokenizer, dict(chat_format="template"), "the tokenizer has no chat template"),
        (tokenizer, dict(on_bad_record="ignore"), "on_bad_record is 'ignore', expected error or skip"),
        (tokenizer, dict(on_bad_record="skip"), r"no chat format: set config\.data\.chat_format"),
    ]
    for i, (text, options, what) in enumerate(cases):
        with pytest.raises(LlamaError, match=what) as error:
            prepare([str(source)], text, tmp_path / f"tokens{i}", workers=1, **options)
        assert error.value.code == ExitCode.BAD_CONFIG


def test_a_bucket_is_no_output(tokenizer):
    with pytest.raises(LlamaError, match="gs://bucket/tokens is in a bucket: give a folder on a disk"):
        prepare(["a.jsonl"], tokenizer, "gs://bucket/tokens")


def test_tokens_of_large_vocabularies_are_kept(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(ranks, "vocab_size", 2**17)
    store = prepare([str(write_jsonl(tmp_path / "a.jsonl", texts(3)))], ranks, tmp_path / "tokens", workers=1)
    assert store.shard(0).tokens.dtype == np.uint32 and store.shards[0].max_token == int(store.shard(0).tokens.max())


def test_an_empty_source_makes_an_empty_folder(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "b.jsonl").write_text("")
    store = prepare([f"{tmp_path}/*.jsonl"], tokenizer, tmp_path / "tokens", workers=1)
    assert len(Documents([store])) == 0 and [dataclasses.asdict(shard)["records"] for shard in store.shards] == [1]


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llama_jax.data.prepare", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_prepares_prints_statistics_and_imports_no_jax(tmp_path, tokenizer_file):
    write_jsonl(tmp_path / "a.jsonl", [*MIXED, {"text": ""}])
    arguments = ("--source", f"{tmp_path}/a.jsonl", "--tokenizer", str(tokenizer_file), "--output", f"{tmp_path}/tokens")
    failed = run_command(*arguments, "--chat-format", "llama2")
    assert failed.returncode == ExitCode.BAD_RECORD
    assert f"error: {tmp_path}/a.jsonl: line 4 has an empty 'text'" in failed.stderr
    done = run_command(*arguments[:-1], f"{tmp_path}/skipped", "--chat-format", "llama2", "--on-bad-record", "skip")
    assert done.returncode == 0 and done.stdout == ""
    for line in ("documents: 3", "skipped: 1", "kinds: completion 1, messages 1, text 1"):
        assert line in done.stderr
    assert "tokenising: 100%" in done.stderr
    assert TokenStore.open(tmp_path / "skipped").manifest["command"].startswith("python -m llama_jax.data.prepare --source")
    weighted = run_command(*("--source", "a.jsonl@0.5"), *arguments[2:])
    assert weighted.returncode == 2 and "weigh the folders in config.data.train" in weighted.stderr
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, llama_jax.data.prepare; print('jax' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert loaded.stdout == "False\n"
