"""Guessing changes how many steps a text takes, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.generation.reading import Reader
from llama_jax.generation.request import Settings
from llama_jax.generation.speculation import NGRAM, SLACK, Speculation, look_up
from tests.generation.make import CFG, ONE_LAYER, ids, llama_of
from tests.model.make import params_of

DRAWN = Settings(temperature=0.8, top_p=0.95, seed=3, max_new_tokens=40, ignore_eos=True, logprobs=2)
PROMPTS = [ids(1), ids(7, seed=1) * 2, ids(16, seed=2), ids(11, seed=3)]


def params_like(cfg, noise: float):
    """The target's parameters, a little wrong: a draft that is often right."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x * (1 + noise * jnp.asarray(rng.normal(size=x.shape), x.dtype)), params_of(cfg))


def speculative(num_draft: int = 3, draft: str = "lookup", cfg=CFG, **options):
    guess = None
    if draft != "lookup":
        params = params_like(cfg, 0.05) if draft == "similar" else params_of(ONE_LAYER)
        draft_cfg = cfg if draft == "similar" else ONE_LAYER
        guess = Reader(draft_cfg, params, cfg.max_length, slack=SLACK)
    return llama_of(cfg, guesses=Speculation(num_draft, guess), **options)


def same(a, b):
    for one, other in zip(a, b, strict=True):
        assert (one.tokens, one.finish_reason, one.text) == (other.tokens, other.finish_reason, other.text)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        for top, expected in zip(one.top_logprobs, other.top_logprobs, strict=True):
            assert list(top) == list(expected)


def steps_and_tokens(llama, prompt, **changes):
    """Of one answer."""
    answers = llama._answers([prompt], Settings(ignore_eos=True, logprobs=0), changes)
    run = llama._run(answers)
    while True:
        try:
            next(run)
        except StopIteration as end:
            return int(end.value.steps[0]), answers[0].completion().tokens


@pytest.fixture(
    scope="module",
    params=["lookup", pytest.param("similar", marks=pytest.mark.slow), pytest.param("one layer", marks=pytest.mark.slow)],
)
def guessing(request):
    return speculative(draft=request.param)


@pytest.mark.parametrize("changes", [dict(), dict(temperature=0), dict(max_new_tokens=1), dict(max_new_tokens=112)])
def test_tokens_are_those_of_plain_decoding(llama, guessing, changes):
    same(guessing.generate(PROMPTS, DRAWN, **changes), llama.generate(PROMPTS, DRAWN, **changes))


def test_rows_keep_their_own_settings_and_ends(llama, guessing):
    plain = llama.generate(PROMPTS, DRAWN)
    mixed = [
        dataclasses.replace(DRAWN, temperature=0, max_new_tokens=5),
        dataclasses.replace(DRAWN, stop_ids=[plain[1].tokens[9]]),
        dataclasses.replace(DRAWN, stop=[plain[2].text[6:8]]),
        dataclasses.replace(DRAWN, top_k=3, seed=2**40),
    ]
    same(guessing.generate(PROMPTS, mixed), llama.generate(PROMPTS, mixed))


def test_a_text_to_the_last_token_of_the_context(llama, guessing):
    same(
        guessing.generate([ids(120, seed=4)], DRAWN, max_new_tokens=8),
        llama.generate([ids(120, seed=4)], DRAWN, max_new_tokens=8),
    )


def test_a_stream_is_the_text(llama, guessing):
    expected = llama.generate([PROMPTS[1]], DRAWN)[0].text
    assert "".join(guessing.stream(PROMPTS[1], DRAWN)) == expected


def test_penalties_are_decoded_without_guesses(llama, guessing):
    changes = dict(repetition_penalty=1.3, logit_bias={7: 2.0})
    same(guessing.generate(PROMPTS, DRAWN, **changes), llama.generate(PROMPTS, DRAWN, **changes))


def test_a_prefix_and_guesses_together(llama, guessing):
    shared = ids(40, seed=9)
    prompts = [[*shared, *prompt] for prompt in PROMPTS]
    same(guessing.generate(prompts, DRAWN, prefix=guessing.prefill(shared)), llama.generate(prompts, DRAWN))


def test_an_int8_cache_and_guesses_together():
    options = dict(cache_dtype="int8", cfg=ONE_LAYER)
    plain = llama_of(ONE_LAYER, cache_dtype="int8")
    for ours, wanted in zip(speculative(**options).generate(PROMPTS, DRAWN), plain.generate(PROMPTS, DRAWN), strict=True):
        assert ours.tokens == wanted.tokens
        np.testing.assert_allclose(ours.logprobs, wanted.logprobs, rtol=0, atol=1e-3)


def test_the_target_as_its_own_draft_is_never_wrong(llama):
    perfect = llama_of(guesses=Speculation(3, Reader(CFG, params_of(CFG), CFG.max_length, slack=SLACK)))
    for changes in (dict(temperature=0), dict(temperature=1.0, seed=5)):
        steps, tokens = steps_and_tokens(perfect, ids(7), max_new_tokens=41, **changes)
        assert (steps, len(tokens)) == (10, 41)  # the first token is prefill's


def test_a_similar_draft_and_a_repetitive_text_take_fewer_steps(llama):
    steps, tokens = steps_and_tokens(speculative(draft="similar"), ids(7), max_new_tokens=41, temperature=0)
    assert len(tokens) == 41 and steps < 25
    loop = [*ids(5, seed=1)] * 6  # greedy text of this model soon repeats itself
    steps, tokens = steps_and_tokens(speculative(7), loop, max_new_tokens=90, temperature=0)
    assert tokens == llama.generate([loop], temperature=0, max_new_tokens=90, ignore_eos=True)[0].tokens
    assert steps < 60


@pytest.mark.slow
def test_the_distribution_is_the_target_s_whatever_the_draft_says():
    """Chi-squared over the third token of 4,000 answers: drawn after guesses of a model that is often wrong, against plain."""
    cfg = dataclasses.replace(ONE_LAYER, vocab_size=16, max_length=16)
    asked = Settings(temperature=1.3, top_p=1.0, max_new_tokens=3, ignore_eos=True)
    wrong = Reader(cfg, params_like(cfg, 0.6), cfg.max_length, slack=SLACK)
    options = dict(tokenizer=None, batch_size=500)
    counts = []
    for llama, seed in ((llama_of(cfg, guesses=Speculation(2, wrong), **options), 1), (llama_of(cfg, **options), 2)):
        answers = llama.generate([[1, 5]], dataclasses.replace(asked, n=4000, seed=seed))
        counts.append(np.bincount([answer.tokens[2] for answer in answers], minlength=16))
    a, b = counts
    used = a + b > 20
    statistic = np.sum((a - b)[used] ** 2 / (a + b)[used])
    assert statistic < 45  # 15 degrees of freedom: exceeded once in 14,000 times


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=24), st.randoms())
def test_what_is_looked_up_followed_the_longest_and_latest_match(tokens, random):
    row = np.full((1, 32), 9, np.int32)  # what lies behind the text must not be looked at
    row[0, : len(tokens)] = tokens
    row[0, len(tokens) :] = [random.randint(0, 2) for _ in range(32 - len(tokens))]
    last = len(tokens) - 1

    def agreement(j):
        return next((n for n in range(NGRAM) if min(j, last) - n < 0 or tokens[j - n] != tokens[last - n]), NGRAM)

    found = max(range(last), key=lambda j: (agreement(j), j), default=None)
    guesses = np.asarray(look_up(jnp.asarray(row), jnp.asarray([last]), 4))[0].tolist()
    if found is not None:
        following = tokens[found + 1 :]
        assert guesses == [following[i % len(following)] for i in range(4)]
