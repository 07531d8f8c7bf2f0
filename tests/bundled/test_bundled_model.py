"""The model that ships with the repository does what docs/bundled_model.md says of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from bundled.dialogues import question_messages
from bundled.measure import held_out_questions, held_out_stories, reply_all
from configs.sample import BUNDLED

FOLDER = Path(__file__).resolve().parents[2] / BUNDLED
JUDGEMENT = FOLDER.parent / "judgement.json"  # what `python -m bundled.judge --json` found


@pytest.fixture(scope="module")
def llama():
    return llama_jax.load(FOLDER)


@pytest.fixture(scope="module")
def judged() -> dict:
    return json.loads(JUDGEMENT.read_text())


def test_its_stories_come_to_an_end(llama):
    answers = llama.generate(["Once upon a time,", "One sunny morning,", "Long ago,"], temperature=0.6, max_new_tokens=0)
    assert all(answer.finish_reason == "stop" and answer.text[-1] in '.!"' for answer in answers)


def test_it_predicts_unseen_stories_as_judged_and_better_than_n_grams(llama, judged):
    loss, count = 0.0, 0
    for told in held_out_stories(20):
        scored = llama.score(llama.tokenizer.encode(told.text, bos=True, eos=True))
        loss, count = loss - float(np.sum(scored.logprobs, dtype=np.float64)), count + len(scored.logprobs)
    found = judged["perplexities"]["perplexity"]
    assert math.exp(loss / count) == pytest.approx(found["model"], rel=0.05)
    assert math.exp(loss / count) < found["5-gram"] < found["3-gram"]


def test_it_answers_as_judged(llama, judged):
    for kind in ("owner", "opposite", "comparison"):
        asked = held_out_questions(kind, 16)
        replies = reply_all(llama, [question_messages(one) for one in asked], temperature=0.0, max_new_tokens=24)
        right = sum(one.is_right(reply) for one, reply in zip(asked, replies, strict=True)) / len(asked)
        assert right == pytest.approx(judged["answers"][kind]["right"] / judged["answers"][kind]["asked"], abs=0.25)


def test_its_tokenizer_is_the_one_that_the_generator_makes(llama, judged, tokenizer_file):
    assert (FOLDER / "tokenizer.model").read_bytes() == tokenizer_file


def test_it_has_3_to_4_5_million_parameters_in_10_mb(llama, judged):
    assert 3e6 <= llama.config.num_params <= 4.5e6 and llama.config.num_kv_heads < llama.config.num_heads
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 10e6


def test_its_mark_of_orbax_is_without_the_path_of_a_machine():
    assert (FOLDER / "params/commit_success.txt").read_text() == "Checkpoint commit was successful"
