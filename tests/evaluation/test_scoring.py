"""Log-likelihoods of continuations: equal to those of whole sequences, however requests are batched and shared."""

import dataclasses

import numpy as np
import pytest

from llama_jax.errors import LlamaError
from llama_jax.evaluation.scoring import batches, log_likelihoods, plan
from tests.generation.make import CFG, ONE_LAYER, counting_compilations, full_logprobs, ids, llama_of, log_softmax
from tests.model.make import params_of, reference_of

CONTEXT = ids(24, 1)
REQUESTS = [
    *[(CONTEXT, ids(n, 10 + n)) for n in (2, 3, 4)],  # choices of one question
    *[(CONTEXT, [token]) for token in ids(3, 2)],  # letters
    (ids(9, 3), ids(1, 4)),
    ([1], ids(14, 5)),  # a text without context
]


def expected(context: list[int], continuation: list[int]) -> float:
    """By one forward pass over both."""
    rows = full_logprobs([*context, *continuation], ONE_LAYER)[len(context) - 1 : -1]
    return rows[np.arange(len(continuation)), continuation].sum()


def test_log_likelihoods_are_those_of_the_reference():
    found = log_likelihoods(llama_of(), REQUESTS, 4)
    for (context, continuation), (logprob, _) in zip(REQUESTS, found, strict=True):
        rows = log_softmax(reference_of(CFG, params_of(CFG), [*context, *continuation]))[len(context) - 1 : -1]
        assert logprob == pytest.approx(rows[np.arange(len(continuation)), continuation].sum(), abs=1e-4)


def test_greedy_says_whether_every_token_is_the_likeliest():
    llama = llama_of(ONE_LAYER)
    written = llama.generate([CONTEXT], max_new_tokens=4, temperature=0, ignore_eos=True)[0].tokens
    other = [written[0], written[1] + 1, *written[2:]]
    found = log_likelihoods(llama, [(CONTEXT, tokens) for tokens in (written, other, written[:1], other[1:2])], 4)
    assert [greedy for _, greedy in found] == [True, False, True, False]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_results_do_not_depend_on_the_batch_or_the_order(batch_size):
    llama = llama_of(ONE_LAYER)
    found = log_likelihoods(llama, REQUESTS[::-1], batch_size)[::-1]
    for (context, continuation), (logprob, _) in zip(REQUESTS, found, strict=True):
        assert logprob == pytest.approx(expected(context, continuation), abs=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning():
    llama = llama_of(ONE_LAYER, max_length=32)
    context, continuation = ids(60, 6), ids(5, 7)
    found = log_likelihoods(llama, [(context, continuation)], 4)[0][0]
    assert found == pytest.approx(expected(context[-28:], continuation), abs=1e-4)


def test_a_context_of_long_choices_is_read_once_and_letters_share_a_row():
    readings = plan(REQUESTS, CFG.max_length, 16)
    shared = next(reading for reading in readings if reading.tokens == tuple(CONTEXT))
    assert sorted(len(tail.tokens) for tail in shared.tails) == [1, 2, 3]
    assert len(shared.questions) == 6  # the first token of every choice and every letter
    assert len(readings) == 3
    letters = plan([(CONTEXT, [token]) for token in range(5, 9)], CFG.max_length, 16)
    assert [(len(reading.questions), reading.tails) for reading in letters] == [(4, [])]


def test_every_token_of_every_request_is_asked_once():
    for shareable in (True, False):
        readings = plan(REQUESTS, CFG.max_length, 2, shareable)
        questions = [q for reading in readings for q in reading.questions]
        questions += [q for reading in readings for tail in reading.tails for q in tail.questions]
        assert shareable == any(reading.tails for reading in readings)
        for number, (_, continuation) in enumerate(REQUESTS):
            assert sorted(q.target for q in questions if q.request == number) == sorted(continuation)


def test_a_batch_has_at_most_batch_size_rows():
    readings = plan(REQUESTS, CFG.max_length, 2)
    found = list(batches(readings, 2))
    assert sum(map(len, found)) == len(readings)
    assert all(sum(max(1, len(reading.tails)) for reading in batch) <= 2 for batch in found)


def test_keys_that_depend_on_the_whole_are_not_shared():
    cfg = dataclasses.replace(ONE_LAYER, rope_type="dynamic", rope_factor=2.0, rope_original_length=16)
    llama = llama_of(cfg)
    found = log_likelihoods(llama, REQUESTS[:3], 4)
    for (context, continuation), (logprob, _) in zip(REQUESTS, found, strict=False):
        whole = log_softmax(llama.logits([[*context, *continuation[:-1]]])[0])[len(context) - 1 :]
        assert logprob == pytest.approx(whole[np.arange(len(whole)), continuation].sum(), abs=1e-4)


def test_nothing_is_compiled_for_more_of_the_same():
    llama = llama_of(ONE_LAYER)

    def requests(seed: int) -> list:
        return [(ids(20 + n % 7, seed + n), ids(3, seed + k)) for n in range(4) for k in range(2)]

    log_likelihoods(llama, requests(100), 4)
    with counting_compilations() as compiled:
        log_likelihoods(llama, requests(200), 4)
    assert not compiled


@pytest.mark.parametrize("pair", [([], [5]), ([5], []), ([5], [5] * (CFG.max_length + 1))])
def test_what_cannot_be_scored_is_refused(pair):
    with pytest.raises(LlamaError, match="expected at least 1 each"):
        log_likelihoods(llama_of(ONE_LAYER), [pair], 4)
