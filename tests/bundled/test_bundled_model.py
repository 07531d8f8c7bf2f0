"""The model that ships with the repository does what bundled/README.md says of it."""

import math
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from bundled.data import HELD_OUT_SEED
from bundled.stories import stories
from configs.sample import BUNDLED

FIVE_GRAM = 1.848  # perplexity per token of held-out stories, printed by bundled/train.py


@pytest.fixture(scope="module")
def llama():
    return llama_jax.load(Path(__file__).resolve().parents[2] / BUNDLED)


def test_it_predicts_unseen_stories_better_than_a_5_gram_model(llama):
    total, count = 0.0, 0
    for story in stories(20, HELD_OUT_SEED):
        scored = llama.score(llama.tokenizer.encode(story, bos=True, eos=True))
        total, count = total + float(np.sum(scored.logprobs, dtype=np.float64)), count + len(scored.logprobs)
    assert math.exp(-total / count) < FIVE_GRAM


def test_its_stories_come_to_an_end(llama):
    answers = llama.generate(["Once upon a time,", "One sunny morning,", "Long ago,"], temperature=0.6, max_new_tokens=0)
    assert all(answer.finish_reason == "stop" and answer.text[-1] in '.!"' for answer in answers)
