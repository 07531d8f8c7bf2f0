"""Rows of a dataset against the records they were made of, and what is said about data that cannot be trained on."""

import concurrent.futures
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.config import PRESETS
from llama_jax.data.documents import to_document
from llama_jax.data.opening import DataConfig, open_dataset
from llama_jax.data.packing import LONG_DOCUMENTS, PACKINGS
from llama_jax.data.prepare import prepare
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import logits, param_shapes, train_states
from tests.data.make import dataset_of, documents_in, texts, write_jsonl

some_text = st.text(st.sampled_from("ab c\n"), min_size=1, max_size=60).filter(str.strip)
records = st.one_of(
    st.fixed_dictionaries({"text": some_text}),
    st.fixed_dictionaries({"prompt": some_text, "completion": some_text}),
    st.tuples(some_text, some_text).map(
        lambda said: {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]}
    ),
)


@pytest.mark.parametrize("long_documents", LONG_DOCUMENTS)
@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(records, min_size=1, max_size=12), length=st.sampled_from([2, 7, 16, 40]), seed=st.integers(0, 3))
def test_rows_hold_the_documents_and_learn_what_is_to_be_learnt(
    tmp_path_factory, tokenizer, packing, long_documents, records, length, seed
):
    folder = tmp_path_factory.mktemp("rows")
    source = write_jsonl(folder / "a.jsonl", records)
    documents = [to_document(tokenizer, record, "llama2") for record in records]
    config = dict(packing=packing, long_documents=long_documents, chat_format="llama2", workers=1)
    kept = {"split": 10**6, "truncate": length, "drop": length}[long_documents]
    whole = [len(d.ids) <= kept or (long_documents == "truncate" and any(d.learnt[1 : length + 1])) for d in documents]
    if not any(whole):
        with pytest.raises(LlamaError, match=f"none of the {len(records)} documents can be learnt from in rows of {length}"):
            dataset_of(source, tokenizer, folder / "cache", length=length, seed=seed, **config)
        return
    dataset = dataset_of(source, tokenizer, folder / "cache", length=length, seed=seed, **config)

    seen = {i: [] for i, keep in enumerate(whole) if keep}
    learnt = 0
    for r in range(len(dataset)):
        row = dataset.row(r)
        names = dataset.documents_of(r)
        assert {array.shape for array in row} == {(length,)}
        assert row.segment_ids.max() == len(names)
        ends = np.searchsorted(np.where(row.segment_ids == 0, 10**6, row.segment_ids), np.arange(1, len(names) + 2))
        for s, name in enumerate(names):
            span = slice(ends[s], ends[s + 1])
            n = ends[s + 1] - ends[s]
            assert (row.segment_ids[span] == s + 1).all() and row.positions[span].tolist() == list(range(n))
            file, line = name.rsplit(":", 1)
            assert file == str(source)
            document = documents[int(line) - 1]
            start = next(at for at in range(0, len(document.ids)) if starts_at(document.ids, row.tokens[span], at, seen, line))
            seen[int(line) - 1].append((start, start + n))
            follows = document.ids[start + 1 : start + 1 + n]
            assert row.targets[span][: len(follows)].tolist() == follows
            wanted = [*document.learnt[start + 1 : start + 1 + n], False][:n]
            assert row.weights[span].astype(bool).tolist() == wanted
            learnt += sum(wanted)
        for array in row:
            assert not array[ends[-1] :].any()
    for i, spans in seen.items():
        expected = min(len(documents[i].ids), kept)
        assert sorted(spans)[0][0] == 0 and sum(b - a for a, b in spans) == expected
        assert all(a == b for (_, a), (b, _) in zip(sorted(spans), sorted(spans)[1:], strict=False))

    found = dataset.statistics
    longer = sum(len(d.ids) > length for d in documents)
    assert found.documents == len(records) and found.tokens == sum(len(d.ids) for d in documents)
    assert found.learnt_tokens == learnt and found.rows == len(dataset)
    assert (found.split, found.truncated + found.dropped) == ((longer, 0) if long_documents == "split" else (0, longer))
    assert found.dropped == len(records) - sum(whole)
    held = sum(b - a for spans in seen.values() for a, b in spans)
    assert found.padding_share == pytest.approx(1 - held / (len(dataset) * length))


def starts_at(ids: list[int], piece: np.ndarray, at: int, seen: dict, line: str) -> bool:
    """Whether a piece of a document may begin there: the ids agree, and no other piece has the place."""
    taken = any(a < at + len(piece) and at < b for a, b in seen[int(line) - 1])
    return not taken and ids[at : at + len(piece)] == piece.tolist()


def test_a_packed_row_s_logits_are_those_of_each_document_alone(tmp_path, tokenizer):
    cfg = dataclasses.replace(PRESETS["tiny"], num_layers=2, vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), param_shapes(cfg, scan=True))
    B, T = 12, 48
    dataset = dataset_of(write_jsonl(tmp_path / "a.jsonl", texts(B, longest=8)), tokenizer, tmp_path / "cache", length=T)

    @jax.jit
    def run(tokens, positions, segments):
        x = train_states(cfg, params, tokens, positions, segments, dtype=jnp.float32, remat="none")
        return logits(cfg, params, x)

    packed = dataset.rows([*range(len(dataset)), *[-1] * (B - len(dataset))])
    together = np.asarray(run(packed.tokens, packed.positions, packed.segment_ids))
    places = [np.nonzero((packed.segment_ids == s) & (np.arange(B)[:, None] == r)) for r in range(B) for s in range(1, 9)]
    places = [place for place in places if len(place[0])]
    assert len(places) == B and len(dataset) < B / 2
    tokens, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b, place in enumerate(places):
        tokens[b, : len(place[0])], segments[b, : len(place[0])] = packed.tokens[place], 1
    alone = np.asarray(run(tokens, np.tile(np.arange(T, dtype=np.int32), (B, 1)), segments))
    for b, place in enumerate(places):
        np.testing.assert_allclose(together[place], alone[b, : len(place[0])], rtol=0, atol=1e-4)
    unaware = np.asarray(run(packed.tokens, packed.positions, np.ones_like(packed.segment_ids)))
    assert np.abs(unaware - together)[packed.segment_ids > 1].max() > 0.1  # what would come of attention across segments


def test_a_second_opening_reads_the_cache(tmp_path, tokenizer, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", texts(30))
    first = dataset_of(source, tokenizer, tmp_path / "cache")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    for name in ("opening.pack", "prepare.tokenize_unit"):
        monkeypatch.setattr(f"llama_jax.data.{name}", None)
    second = dataset_of(source, tokenizer, tmp_path / "cache")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")} == files
    assert second.fingerprint == first.fingerprint and second.statistics == first.statistics
    assert documents_in(second) == documents_in(first)


def test_what_decides_the_rows_is_in_the_fingerprint(tmp_path, tokenizer, ranks):
    source = write_jsonl(tmp_path / "a.jsonl", texts(20))
    cache = tmp_path / "cache"
    first = dataset_of(source, tokenizer, cache).fingerprint
    changed = [
        dataset_of(source, tokenizer, cache, seed=1),
        dataset_of(source, tokenizer, cache, length=33),
        dataset_of(source, tokenizer, cache, packing="concat"),
        dataset_of(source, tokenizer, cache, window=7),
        dataset_of(source, tokenizer, cache, long_documents="drop"),
        dataset_of(source, ranks, cache),
        dataset_of(f"{source}@1,{source}@2", tokenizer, cache),
        dataset_of(f"{source}@1,{source}@1", tokenizer, cache),
    ]
    assert len({first, *(dataset.fingerprint for dataset in changed)}) == 9
    same = [
        dataset_of(source, tokenizer, tmp_path / "another"),
        dataset_of(source, tokenizer, cache, prefetch=0, workers=1, on_bad_record="skip"),
    ]
    os.utime(source, (1, 1))  # tokenised anew, and the same
    assert {dataset.fingerprint for dataset in [*same, dataset_of(source, tokenizer, cache)]} == {first}
    write_jsonl(source, texts(20, seed=1))
    assert dataset_of(source, tokenizer, cache).fingerprint != first


def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", texts(30))
    wanted = documents_in(dataset_of(source, tokenizer, tmp_path / "cache"))
    for file in sorted((tmp_path / "cache").rglob("*.*")):
        if file.is_file() and file.name != "request.json":
            file.write_bytes(file.read_bytes()[:-3])
            assert documents_in(dataset_of(source, tokenizer, tmp_path / "cache")) == wanted, file.name


def test_several_may_fill_one_cache_at_a_time(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", texts(200))
    wanted = dataset_of(source, tokenizer, tmp_path / "alone").fingerprint
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [pool.submit(dataset_of, source, tokenizer, tmp_path / "cache") for _ in range(4)]
    assert {future.result().fingerprint for future in found} == {wanted}
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == sorted(
        file.name for file in (tmp_path / "alone").iterdir()
    )


def test_a_prepared_folder_gives_the_rows_of_its_source(tmp_path, tokenizer, ranks):
    source = write_jsonl(tmp_path / "a.jsonl", [*texts(20), {"messages": [dict(role="user", content="a")] * 0}])
    arguments = dict(chat_format="llama2", on_bad_record="skip")
    direct = dataset_of(source, tokenizer, tmp_path / "cache", **arguments)
    folder = prepare([str(source)], tokenizer, tmp_path / "tokens", workers=1, **arguments).folder
    prepared = dataset_of(folder, tokenizer, tmp_path / "cache2")
    assert documents_in(prepared) == documents_in(direct) and prepared.fingerprint == direct.fingerprint
    assert prepared.statistics == direct.statistics and direct.statistics.skipped == 1
    both = dataset_of(f"{folder},{source}", tokenizer, tmp_path / "cache", **arguments)
    assert both.statistics.documents == 2 * direct.statistics.documents
    with pytest.raises(LlamaError, match=r"prepared with another tokenizer \(420 tokens, this one has 536\)") as error:
        dataset_of(folder, ranks, tmp_path / "cache")
    assert error.value.code == ExitCode.VOCAB_MISMATCH
    (folder / "manifest.json").unlink()
    with pytest.raises(LlamaError, match=r"has no complete manifest\.json: run the same prepare command again"):
        dataset_of(folder, tokenizer, tmp_path / "cache")


def test_a_prepared_folder_of_conversations_keeps_its_chat_format(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the house"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    folder = prepare([str(source)], tokenizer, tmp_path / "tokens", workers=1, chat_format="llama2").folder
    assert dataset_of(folder, tokenizer, tmp_path / "cache").statistics.documents == 1
    with pytest.raises(LlamaError, match=r"prepared with chat format llama2, config\.data\.chat_format is codellama"):
        dataset_of(folder, tokenizer, tmp_path / "cache", chat_format="codellama")


def test_the_parts_of_a_mixture_have_their_own_rows(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", texts(20, seed)) for seed, name in enumerate("ab")]
    mixed = dataset_of(f"{files[0]}@3,{files[1]}@1", tokenizer, tmp_path / "cache")
    alone = [dataset_of(file, tokenizer, tmp_path / "cache") for file in files]
    assert len(mixed) == len(alone[0]) + len(alone[1])
    for i in range(len(mixed)):
        part, r = (0, i) if i < len(alone[0]) else (1, i - len(alone[0]))
        assert mixed.documents_of(i) == alone[part].documents_of(r)
        np.testing.assert_array_equal(mixed.row(i).tokens, alone[part].row(r).tokens)
    assert mixed.statistics.tokens == sum(dataset.statistics.tokens for dataset in alone)
    assert [source["source"] for source in mixed.statistics.sources] == [str(file) for file in files]


def test_a_bucket_s_prepared_folder_is_copied_once(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", texts(10))
    folder = prepare([str(source)], tokenizer, tmp_path / "tokens", workers=1).folder

    def local(path):
        return str(path).replace("gs://bucket/tokens", str(folder))

    with epath.testing.mock_epath(
        exists=lambda real, path: real(local(path)),
        isdir=lambda real, path: real(local(path)),
        listdir=lambda real, path: real(local(path)),
        open=lambda real, path, mode: real(local(path), mode),
    ):
        bucket = dataset_of("gs://bucket/tokens", tokenizer, tmp_path / "cache")
    assert documents_in(bucket) == documents_in(dataset_of(folder, tokenizer, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("content", "config", "what", "code"),
    [
        ("", {}, "holds no documents: give data with at least one", ExitCode.NO_DATA),
        ("\n\n", {}, "holds no documents", ExitCode.NO_DATA),
        ('{"text": ""}\n', dict(on_bad_record="skip"), "1 bad records were skipped, the first: .*line 1", ExitCode.NO_DATA),
        ('{"text": ""}\n', {}, "line 1 has an empty 'text'; repair it", ExitCode.BAD_RECORD),
        (
            json.dumps({"text": "the house " * 50}) + "\n",
            dict(long_documents="drop"),
            r"none of the 1 documents can be learnt from in rows of 32 tokens \(1 are longer\): raise config.train.length",
            ExitCode.NO_DATA,
        ),
    ],
)
def test_data_that_cannot_be_trained_on_says_why(tmp_path, tokenizer, content, config, what, code):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(LlamaError, match=what) as error:
        dataset_of(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache", **config)
    assert error.value.code == code


def test_a_token_outside_the_vocabulary_is_named_with_its_document(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "the house"}, {"text": "b"}])
    largest = [max(to_document(tokenizer, {"text": text}, "").ids) for text in ("a", "the house", "b")]
    limit = max(largest)
    line = largest.index(limit) + 1
    options = dict(length=32, seed=0, cache=tmp_path / "cache")
    assert len(open_dataset(str(source), DataConfig(), tokenizer, vocab_size=tokenizer.vocab_size, **options))
    with pytest.raises(LlamaError, match=rf"a\.jsonl:{line} has token {limit}, the model's vocabulary {limit}: ") as error:
        open_dataset(str(source), DataConfig(), tokenizer, vocab_size=limit, **options)
    assert error.value.code == ExitCode.VOCAB_MISMATCH


def test_what_happened_to_long_documents_is_said(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the house " * 50}, *texts(5, longest=3)])
    said = {policy: str(dataset_of(source, tokenizer, tmp_path, long_documents=policy).statistics) for policy in LONG_DOCUMENTS}
    assert "1 documents longer than a row cut into several" in said["split"]
    assert "1 documents longer than a row truncated" in said["truncate"]
    assert "1 documents dropped" in said["drop"]
    assert all("6 documents" in text and "padding" in text for text in said.values())


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        (dict(packing="first_fit"), "data.packing is 'first_fit', expected one of best_fit, concat"),
        (dict(long_documents="cut"), "data.long_documents is 'cut', expected one of split, truncate, drop"),
        (dict(on_bad_record="ignore"), "data.on_bad_record is 'ignore', expected one of error, skip"),
        (dict(chat_format="chatml"), "data.chat_format is 'chatml', expected one of \"\", llama2"),
        (dict(window=0), "data.window is 0, expected a whole number from 1"),
        (dict(prefetch=-1), "data.prefetch is -1, expected a whole number from 0"),
        (dict(workers=1.5), "data.workers is 1.5, expected a whole number from 0"),
    ],
)
def test_settings_are_checked(setting, what):
    with pytest.raises(LlamaError, match=what) as error:
        DataConfig(**setting)
    assert error.value.code == ExitCode.BAD_CONFIG


def test_caches_in_buckets_and_rows_of_one_token_are_refused(tmp_path, tokenizer):
    with pytest.raises(LlamaError, match=r"the data cache gs://b is in a bucket.*set config\.data\.cache"):
        open_dataset("a.jsonl", DataConfig(), tokenizer, length=32, seed=0, cache="gs://b")
    with pytest.raises(LlamaError, match="length is 1, expected at least 2 tokens a row"):
        open_dataset("a.jsonl", DataConfig(), tokenizer, length=1, seed=0, cache=tmp_path)
