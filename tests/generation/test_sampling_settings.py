"""Each sampling setting, seen from the outside: what `generate` returns against the formula."""

import math

import numpy as np
import pytest

from llama_jax.generation.request import Settings, make_row
from tests.generation.make import CFG, full_logits, full_logprobs, ids, llama_of

PROMPTS = [ids(9), ids(5, seed=1), ids(16, seed=2), ids(2, seed=3)]
N = 2048  # draws of a first token, one batch


def penalised(logits: np.ndarray, prompt: list[int], answer: list[int], s: Settings) -> np.ndarray:
    """Penalties and bias, token by token (Keskar et al. 2019; OpenAI API)."""
    out = np.array(logits, np.float64)
    for token in {*prompt, *answer}:
        out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
    for token in set(answer):
        out[token] -= s.frequency_penalty * answer.count(token) + s.presence_penalty
    for token, bias in s.logit_bias.items():
        out[token] += bias
    return out


def distribution(logits: np.ndarray, s: Settings) -> np.ndarray:
    """Probability of each token after temperature, top-k, top-p and min-p."""
    probs = np.exp((logits - logits.max()) / s.temperature)
    order = np.argsort(-probs, kind="stable")
    order = order[: s.top_k or None]
    ranked = probs[order] / probs[order].sum()
    before = np.cumsum(ranked) - ranked
    kept = (before <= s.top_p) & (ranked >= s.min_p * ranked[0])
    out = np.zeros_like(probs)
    out[order[kept]] = ranked[kept] / ranked[kept].sum()
    return out


def greedy_by_hand(prompt: list[int], new: int, s: Settings) -> list[int]:
    answer: list[int] = []
    for _ in range(new):
        answer.append(int(penalised(full_logits([*prompt, *answer])[-1], prompt, answer, s).argmax()))
    return answer


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0), dict(temperature=1e-5)], ids=str)
def test_what_leaves_one_token_is_greedy(llama, settings):
    greedy = llama.generate(PROMPTS, temperature=0, max_new_tokens=30, ignore_eos=True)
    drawn = llama.generate(PROMPTS, Settings(temperature=1.7), max_new_tokens=30, ignore_eos=True, **settings)
    assert [c.tokens for c in drawn] == [c.tokens for c in greedy]


@pytest.mark.parametrize("settings", [dict(top_k=4), dict(top_p=0.3), dict(min_p=0.3), dict(top_k=30, top_p=0.5)], ids=str)
def test_no_token_outside_the_truncation_is_ever_drawn(llama, settings):
    settings = Settings(**dict(temperature=1.5, top_p=1.0, max_new_tokens=40, ignore_eos=True, seed=2) | settings)
    seen = 0
    for prompt, completion in zip(PROMPTS, llama.generate(PROMPTS, settings), strict=True):
        rows = full_logits([*prompt, *completion.tokens])[len(prompt) - 1 : -1]
        likely = [distribution(row, settings)[token] for row, token in zip(rows, completion.tokens, strict=True)]
        assert min(likely) > 0
        seen += sum(token != row.argmax() for row, token in zip(rows, completion.tokens, strict=True))
    assert seen > 20  # it does draw others than the likeliest


PENALTIES = [
    dict(repetition_penalty=1.8),
    dict(frequency_penalty=1.5),
    dict(presence_penalty=2.0),
    dict(logit_bias={7: 3.0, 50: -4.0, 300: 6.0}),
    dict(repetition_penalty=0.7, frequency_penalty=0.4, presence_penalty=-0.5, logit_bias={9: 2.0}),
]


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
def test_penalties_and_bias_follow_the_formula_at_every_step(llama, settings):
    settings = Settings(temperature=0, max_new_tokens=16, ignore_eos=True, **settings)
    for prompt, completion in zip(PROMPTS, llama.generate(PROMPTS, settings), strict=True):
        assert completion.tokens == greedy_by_hand(prompt, 16, settings)


def test_rows_of_one_batch_keep_their_own_settings(llama):
    settings = [Settings(temperature=0, max_new_tokens=16, **s) for s in ({}, *PENALTIES[1:4])]
    limits = dict(vocab_size=CFG.vocab_size, max_length=CFG.max_length)
    rows = [make_row(prompt, s, (), **limits) for prompt, s in zip(PROMPTS, settings, strict=True)]
    outputs = [output.tokens for output in llama.engine.run(rows, np.zeros(4, bool))]
    for row, tokens in zip(rows, np.concatenate(outputs, axis=1).tolist(), strict=True):
        assert tokens == greedy_by_hand(row.tokens, 16, row.settings)


def test_a_large_bias_forces_a_token_and_a_very_negative_one_bans_it(llama):
    forced = llama.generate(PROMPTS, logit_bias={77: 100.0}, temperature=1.0, max_new_tokens=10)
    assert [c.tokens for c in forced] == [[77] * 10] * 4
    favourites = {token for c in llama.generate(PROMPTS, temperature=0, max_new_tokens=10) for token in c.tokens}
    banned = llama.generate(PROMPTS, logit_bias=dict.fromkeys(favourites, -100.0), temperature=1.0, max_new_tokens=10)
    assert not favourites & {token for c in banned for token in c.tokens}


def test_a_large_presence_penalty_never_repeats(llama):
    for name in ("presence_penalty", "frequency_penalty"):
        for completion in llama.generate(PROMPTS, temperature=0, max_new_tokens=40, ignore_eos=True, **{name: 100.0}):
            assert len(set(completion.tokens)) == 40


def test_reported_log_probabilities_are_the_models_own(llama):
    for completion in llama.generate(PROMPTS, temperature=2.0, logit_bias={77: 100.0}, max_new_tokens=5, logprobs=0):
        tokens = [*completion.prompt_tokens, *completion.tokens]
        expected = full_logprobs(tokens)[len(completion.prompt_tokens) - 1 : -1, 77]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_every_position_of_every_sample_draws_anew(llama):
    """400 nearly uniform draws of 420 tokens: 258 different ones, give or take 8, and no two places alike."""
    rows = llama.generate([PROMPTS[0]], n=4, temperature=1e4, top_p=1.0, max_new_tokens=100, ignore_eos=True)
    tokens = np.array([row.tokens for row in rows])
    assert abs(len(np.unique(tokens)) - CFG.vocab_size * (1 - math.exp(-400 / CFG.vocab_size))) < 40
    assert all((tokens[a] == tokens[b]).sum() < 6 for a in range(4) for b in range(a))
    assert (tokens[:, 1:] == tokens[:, :-1]).sum() < 10


@pytest.fixture(scope="module")
def wide():
    return llama_of(batch_size=N)


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_p=1.0),
        dict(temperature=0.6),
        dict(temperature=2.0, top_k=20, top_p=1.0),
        dict(temperature=1.3, top_p=0.5),
        dict(top_p=1.0, min_p=0.05),
        dict(temperature=1.2, top_k=60, top_p=0.8, min_p=0.02),
        dict(top_p=0.95, repetition_penalty=1.5, logit_bias={11: 4.0, 12: -3.0}, presence_penalty=3.0),
    ],
    ids=str,
)
def test_first_tokens_are_drawn_as_often_as_the_formula_says(wide, settings):
    """Pearson's statistic within five standard deviations of what chance gives."""
    settings = Settings(**dict(temperature=1.0, max_new_tokens=1, ignore_eos=True, seed=1234, n=N) | settings)
    prompt = PROMPTS[0]
    counts = np.bincount([c.tokens[0] for c in wide.generate([prompt], settings)], minlength=CFG.vocab_size)
    expected = N * distribution(penalised(full_logits(prompt)[-1], prompt, [], settings), settings)
    assert counts.sum() == N and not counts[expected == 0].any()
    often = expected >= 5
    cells = [(counts[often], expected[often]), (counts[~often].sum(keepdims=True), expected[~often].sum(keepdims=True))]
    statistic = sum(((o - e) ** 2 / np.maximum(e, 1.0)).sum() for o, e in cells)
    freedom = int(often.sum())
    assert freedom >= 3
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
