"""After the warm-up nothing is compiled, whatever is asked."""

import dataclasses
import itertools

import jax
import pytest

from llama_jax.generation import programs
from llama_jax.generation.llama import Llama
from tests.generation.make import ONE_LAYER, counting_compilations, ids, llama_of

REPORTS, PENALTIES = dict(logprobs=3), dict(presence_penalty=0.5)


@pytest.fixture
def fresh(monkeypatch):
    """Makes a model that shares no program with others; chunks of 4 tokens, so that short caches have several buckets."""
    monkeypatch.setattr(programs, "CHUNK", 4)

    def make(max_length: int) -> Llama:
        return llama_of(dataclasses.replace(ONE_LAYER, max_length=max_length))

    return make


def test_the_counter_counts():
    with counting_compilations() as compiled:
        double = jax.jit(lambda x: x * 2 + 0.123)
        double(1.0), double(2.0)
    assert len(compiled) == 1


@pytest.mark.slow
def test_plain_requests_compile_nothing_after_the_warm_up(fresh):
    llama = fresh(40)
    llama.engine.warm_up(batch_size=4)
    with counting_compilations() as compiled:
        for length, count in itertools.product((1, 16, 17, 32, 33, 39), (1, 2, 3, 4)):
            llama.generate([ids(length)] * count, max_new_tokens=1, seed=count)
        llama.generate([ids(3), ids(20), ids(33)], max_new_tokens=7, temperature=0)
        llama.generate([ids(2)], max_new_tokens=38, ignore_eos=True)  # through every bucket of the cache
        llama.generate([ids(2), ids(1), ids(9)], max_new_tokens=0, ignore_eos=True, temperature=2.0, top_k=9)
        llama.generate([ids(4)], n=7, max_new_tokens=9, top_p=0.5, min_p=0.1, seed=2**40)
        llama.generate(["The child", "She found"], stop=["e", "the"], stop_ids=[5, 6, 7], max_new_tokens=20)
        llama.generate([""], max_new_tokens=5, echo=True, logprobs=-1)
        for _ in llama.stream("The child", max_new_tokens=20, ignore_eos=True):
            pass
        for _ in llama.stream_all(["The", "child", "found"], max_new_tokens=30, n=2, stop=["a"]):
            pass
        llama.chat([{"role": "user", "content": "a"}], max_new_tokens=3)
    assert not compiled


def requests(llama: Llama, settings: dict) -> None:
    for length, new in ((1, 3), (5, 10), (11, 4)):
        llama.generate([ids(length)], max_new_tokens=new, **settings)


@pytest.mark.slow
def test_one_warm_up_serves_reports_and_penalties_and_requests_without(fresh):
    llama = fresh(16)
    llama.engine.warm_up(logprobs=True, history=True)
    with counting_compilations() as compiled:
        for reports, penalties in itertools.product(({}, REPORTS), ({}, PENALTIES)):
            requests(llama, reports | penalties)
        requests(llama, dict(logprobs=0))
        requests(llama, dict(logprobs=2, echo=True))
        requests(llama, dict(logit_bias={5: 1.0}, repetition_penalty=1.2))
        llama.score(ids(16))
    assert not compiled


def test_settings_are_no_constants_of_a_program(llama):
    llama.generate([ids(5)], max_new_tokens=12)
    with counting_compilations() as compiled:
        for settings in (dict(temperature=0), dict(temperature=0.3, seed=9), dict(top_k=4), dict(top_p=1.0, min_p=0.2)):
            llama.generate([ids(5)], max_new_tokens=9, **settings)
    assert not compiled
