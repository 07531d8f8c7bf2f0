"""What is generated is what one full forward pass says, alone or in any company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generation import programs
from llama_jax.generation.engine import Engine
from llama_jax.generation.request import Row, Settings, make_row
from llama_jax.model import hidden_states, logits
from tests.generation.make import CFG, ONE_LAYER, full_logits, full_logprobs, ids, llama_of, log_softmax, logprobs_of
from tests.model.make import params_of

PROMPTS = [ids(1), ids(7, seed=1), ids(16, seed=2), ids(11, seed=3)]
GREEDY = dict(temperature=0, ignore_eos=True)


def rows_of(prompts: list[list[int]], settings: list[Settings]) -> list[Row]:
    limits = dict(vocab_size=CFG.vocab_size, max_length=CFG.max_length)
    return [make_row(prompt, s, (), **limits) for prompt, s in zip(prompts, settings, strict=True)]


def run(engine: Engine, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities [len(rows), n]."""
    outputs = list(engine.run(rows, np.zeros(len(rows), bool)))
    return tuple(np.concatenate([output[i] for output in outputs], axis=1) for i in (0, 1))


def test_prefill_and_decode_are_the_full_forward_at_every_position(llama):
    completions = llama.generate(PROMPTS, max_new_tokens=45, logprobs=20, **GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = full_logprobs([*prompt, *completion.tokens])[len(prompt) - 1 : -1]
        assert len(completion.tokens) == 45
        np.testing.assert_array_equal(completion.tokens, expected.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, expected.max(-1), rtol=0, atol=1e-5)
        for position, reported in zip(expected, completion.top_logprobs, strict=True):
            np.testing.assert_allclose(list(reported.values()), position[list(reported)], rtol=1e-5, atol=1e-5)
            assert next(iter(reported)) == position.argmax() and np.all(np.diff(list(reported.values())) <= 0)


def test_a_row_of_a_ragged_batch_is_what_it_is_alone(llama):
    together = llama.generate(PROMPTS, max_new_tokens=45, logprobs=0, **GREEDY)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = llama.generate([prompt], max_new_tokens=45, logprobs=0, **GREEDY)
        assert row.tokens == alone.tokens
        np.testing.assert_allclose(row.logprobs, alone.logprobs, rtol=0, atol=1e-5)


def test_a_sampled_row_is_what_it_is_alone(llama):
    settings = dict(max_new_tokens=30, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True, logprobs=0)
    together = llama.generate(PROMPTS, **settings)
    alone = [llama.generate([prompt], **settings)[0] for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone]


def test_same_seed_same_text_whatever_else_is_in_the_batch(llama):
    kept = [
        Settings(max_new_tokens=40, temperature=1.3, top_p=0.97, seed=11),
        Settings(max_new_tokens=40, temperature=0),
        Settings(max_new_tokens=40, temperature=0.8, top_k=50, min_p=0.01, seed=2**63 + 1),
    ]
    companions = [
        (ids(16, seed=8), Settings(max_new_tokens=2, temperature=0)),
        (ids(2, seed=9), Settings(max_new_tokens=60, temperature=2.0, seed=11)),
        (ids(9, seed=10), Settings(max_new_tokens=100, temperature=0.1, top_p=0.1, seed=4)),
    ]
    tokens, logprobs = run(llama.engine, rows_of(PROMPTS[1:], kept))  # three rows, the fourth of the bucket empty
    assert np.all(tokens >= 0)
    for prompt, other in companions:
        beside, their_logprobs = run(llama.engine, rows_of([*PROMPTS[1:], prompt], [*kept, other]))
        np.testing.assert_array_equal(beside[:3, :40], tokens)
        if len(prompt) + other.max_new_tokens <= 64:  # the cache of all of them has the same length
            np.testing.assert_array_equal(their_logprobs[:3, :40], logprobs)
        else:  # a longer cache: sums of as many numbers, in another order
            np.testing.assert_allclose(their_logprobs[:3, :40], logprobs, atol=1e-5, rtol=0)


def test_the_order_of_rows_changes_nothing(llama):
    settings = [Settings(max_new_tokens=30, temperature=1.0, seed=seed) for seed in range(4)]
    tokens, _ = run(llama.engine, rows_of(PROMPTS, settings))
    backwards, _ = run(llama.engine, rows_of(PROMPTS[::-1], settings[::-1]))
    np.testing.assert_array_equal(backwards[::-1], tokens)


def test_rows_after_their_end_are_minus_one(llama):
    lengths = [1, 33, 5, 64]
    settings = [Settings(max_new_tokens=n, temperature=0) for n in lengths]
    tokens, _ = run(llama.engine, rows_of(PROMPTS, settings))
    assert tokens.shape == (4, 64)
    for row, length in zip(tokens, lengths, strict=True):
        assert np.all(row[:length] >= 0) and np.all(row[length:] == -1)


def test_samples_of_a_prompt_differ_and_come_again(llama):
    settings = dict(temperature=1.0, max_new_tokens=20, seed=3, n=4)
    first = llama.generate([PROMPTS[1]], **settings)
    assert [completion.sample for completion in first] == [0, 1, 2, 3]
    assert len({completion.text for completion in first}) == 4
    assert first == llama.generate([PROMPTS[1]], **settings)
    assert first[0].tokens == llama.generate([PROMPTS[1]], **settings | dict(n=1))[0].tokens


def test_all_64_bits_of_a_seed_count(llama):
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1, 2**31]
    texts = [
        llama.generate([PROMPTS[1]], temperature=1.5, top_p=1.0, max_new_tokens=12, ignore_eos=True, seed=s)[0].tokens
        for s in seeds
    ]
    assert len({tuple(tokens) for tokens in texts}) == len(seeds)


def test_a_cache_that_grows_gives_what_one_large_from_the_start_gives(llama):
    settings = Settings(max_new_tokens=100, temperature=0.7, seed=1)
    rows = rows_of([PROMPTS[1]], [settings])
    tokens, logprobs = run(llama.engine, rows)
    engine = Engine(CFG, llama.params, CFG.max_length)
    state, output = engine.prefill(rows, 1, 0)
    state = engine._with_room(state, CFG.max_length)
    large = [[np.asarray(output.tokens), np.asarray(output.logprobs)]]
    for n in (32, 32, 32, 3):
        state, output = programs.decode(CFG, llama.params, state, np.zeros(1, bool), np.int32(n), num_top=0)
        large.append([np.asarray(output.tokens)[:, :n], np.asarray(output.logprobs)[:, :n]])
    np.testing.assert_array_equal(tokens, np.concatenate([part[0] for part in large], axis=1))
    np.testing.assert_allclose(logprobs, np.concatenate([part[1] for part in large], axis=1), rtol=0, atol=1e-5)
    assert tokens.shape == (1, 100)


def test_a_reader_in_a_hurry_gets_the_same_tokens(llama):
    rows = rows_of(PROMPTS, [Settings(max_new_tokens=60, temperature=1.0, seed=seed) for seed in range(4)])
    tokens, _ = run(llama.engine, rows)
    for pace in (0.0, 0.003, 10.0):
        parts = [output.tokens for output in llama.engine.run(rows, np.zeros(4, bool), pace)]
        assert parts[0].shape == (4, 1)
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), tokens)


def test_generation_to_the_last_token_of_the_context(llama):
    (completion,) = llama.generate([PROMPTS[1]], max_new_tokens=0, logprobs=0, **GREEDY)
    assert len(completion.tokens) == CFG.max_length - len(PROMPTS[1])
    np.testing.assert_allclose(completion.logprobs, logprobs_of(PROMPTS[1], completion.tokens), rtol=0, atol=1e-5)


def test_dynamic_rope_is_scaled_by_prompt_and_answer_together():
    """Keys are never rotated anew: the scale is that of the length asked for, from the first token on."""
    cfg = dataclasses.replace(ONE_LAYER, rope_type="dynamic", rope_factor=4.0, rope_original_length=8, max_length=64)
    params, prompts, new = params_of(cfg), PROMPTS[1:3], 30
    llama = llama_of(cfg)

    @jax.jit
    def scored(tokens, length):
        x, _ = hidden_states(cfg, params, tokens, jnp.arange(tokens.shape[1])[None], rope_length=length)
        return logits(cfg, params, x)

    for prompt, completion in zip(prompts, llama.generate(prompts, max_new_tokens=new, logprobs=0, **GREEDY), strict=True):
        length = len(prompt) + new
        padded = np.zeros((1, 64), np.int32)
        padded[0, :length] = [*prompt, *completion.tokens]
        expected = log_softmax(scored(padded, length))[0, len(prompt) - 1 : length - 1]
        np.testing.assert_array_equal(completion.tokens, expected.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, expected.max(-1), rtol=0, atol=1e-5)
        other = log_softmax(scored(padded, 64))[0, len(prompt) - 1 : length - 1]
        assert np.abs(other - expected).max() > 0.01  # the length matters


@pytest.mark.parametrize("length", [2, 16, 17, 50])
def test_score_is_the_forward_pass(llama, length):
    tokens = ids(length, seed=length)
    output = llama.score(tokens, num_top=3)
    expected = full_logprobs(tokens)[:-1]
    np.testing.assert_array_equal(output.tokens, tokens[1:])
    np.testing.assert_allclose(output.logprobs, expected[np.arange(length - 1), tokens[1:]], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(output.top_ids, np.argsort(-expected, axis=-1)[:, :3])
    np.testing.assert_allclose(output.top_logprobs, -np.sort(-expected, axis=-1)[:, :3], rtol=0, atol=1e-5)


def test_score_without_alternatives_reports_none(llama):
    output = llama.score(ids(100))
    assert output.top_ids.shape == output.top_logprobs.shape == (99, 0)
    np.testing.assert_allclose(output.logprobs, logprobs_of(ids(1), ids(100)[1:]), rtol=0, atol=1e-5)


def test_logits_are_the_forward_pass(llama):
    tokens = np.array([ids(13, seed=seed) for seed in range(3)])
    found = llama.logits(tokens)
    assert found.shape == (3, 13, CFG.vocab_size) and found.dtype == np.float32
    for row, row_tokens in zip(found, tokens, strict=True):
        np.testing.assert_allclose(row, full_logits(row_tokens), rtol=0, atol=1e-5)
