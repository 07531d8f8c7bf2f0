import hashlib
import json

import pytest

from bundled.choices import Choices
from bundled.make_data import make_data
from bundled.measure import held_out_questions, held_out_stories
from bundled.questions import KINDS

SIZES = dict(stories=600, exercises=100, dialogues=160, held_out=50)
FILES = ("pretrain.jsonl", "sft.jsonl", "held_out/stories.jsonl", "held_out/dialogues.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bundled.make_data.train_tokenizer", lambda texts: tokenizer_file)
        make_data(path, **SIZES)
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_bytes_do_not_depend_on_the_processes(folder, tmp_path, monkeypatch, tokenizer_file):
    monkeypatch.setattr("bundled.make_data.train_tokenizer", lambda texts: tokenizer_file)
    make_data(tmp_path, **SIZES, processes=2)
    for name in (*FILES, "data.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_data_json_says_what_there_is(folder):
    about = json.loads((folder / "data.json").read_text())
    assert list(about) == list(FILES)
    for name, said in about.items():
        data = (folder / name).read_bytes()
        assert said == dict(records=data.count(b"\n"), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert about["pretrain.jsonl"]["records"] == 700 and about["sft.jsonl"]["records"] == 160 + 20


def test_records_are_texts_and_messages(folder):
    assert all(record.keys() == {"text"} for record in lines(folder / "pretrain.jsonl"))
    assert [sorted(record) for record in lines(folder / "sft.jsonl")] == [["messages"]] * 160 + [["text"]] * 20


def test_more_of_it_begins_the_same(folder, tmp_path, monkeypatch, tokenizer_file):
    monkeypatch.setattr("bundled.make_data.train_tokenizer", lambda texts: tokenizer_file)
    make_data(tmp_path, stories=10, exercises=0, dialogues=0, held_out=5)
    assert lines(tmp_path / "pretrain.jsonl") == lines(folder / "pretrain.jsonl")[:10]


def test_nothing_held_out_is_in_training(folder):
    trained = [*lines(folder / "pretrain.jsonl"), *lines(folder / "sft.jsonl")]
    text = "\n".join(json.dumps(record) for record in trained)
    held_out = [record["text"] for record in lines(folder / "held_out/stories.jsonl")]
    assert held_out == [told.text for told in held_out_stories(50)]
    assert not any(json.dumps(told)[1:-1] in text for told in held_out)
    for kind in set(KINDS) - {"own name"}:  # where the user's words are the same for every name
        for one in held_out_questions(kind, 20):
            assert json.dumps(f"{one.text}\nAnswer:")[1:-1] not in text and f'"{json.dumps(one.text)[1:-1]}"' not in text, one


def test_training_and_held_out_seeds_differ():
    drawn = {
        Choices(split, kind, n).pick(range(2**60)) for split in ("train", "held_out") for kind in "abc" for n in range(300)
    }
    assert len(drawn) == 2 * 3 * 300
