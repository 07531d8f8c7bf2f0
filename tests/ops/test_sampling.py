"""Sampling against NumPy: which tokens stay, how often each is drawn, what penalties do, which are the likeliest."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops.sampling import History, Sampling, keep, penalise, sample, top_k
from tests.make_mesh import mesh_of, without_rematerialisation

kept = jax.jit(keep)
sampled = jax.jit(sample)
penalised = jax.jit(penalise)

V = 24
OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition=1.0, frequency=0.0, presence=0.0)


def settings(*rows: dict[str, float]) -> Sampling:
    """A row per argument: what it changes of OFF."""
    columns = {name: np.asarray([(OFF | row)[name] for row in rows]) for name in OFF}
    return Sampling(**{k: jnp.asarray(v, jnp.int32 if k == "top_k" else jnp.float32) for k, v in columns.items()})


def keys(seed: int, B: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), B)


# The rules, written again: one row of float64 probabilities, in no order.


def rule_top_k(probs: np.ndarray, k: int) -> np.ndarray:
    """The k likeliest, renormalised; of equals the first."""
    if k == 0:
        return probs
    stays = np.zeros(len(probs), bool)
    stays[sorted(range(len(probs)), key=lambda i: (-probs[i], i))[:k]] = True
    return np.where(stays, probs, 0) / probs[stays].sum()


def rule_top_p(probs: np.ndarray, p: float) -> np.ndarray:
    """Meta's loop: going down from the likeliest, a token goes when those before it sum to more than p."""
    before, stays = 0.0, np.zeros(len(probs), bool)
    for i in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        stays[i] = before <= p
        before += probs[i]
    return np.where(stays, probs, 0)


def rule(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution that the next token has."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    probs = np.exp((logits - logits.max()) / temperature)
    probs = rule_top_k(probs / probs.sum(), top_k)
    probs = np.where(probs >= min_p * probs.max(), rule_top_p(probs, top_p), 0)
    return probs / probs.sum()


# keep


def ranked_probabilities(seed: int, B: int = 4, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Ranked float32 logits [B, V] and their float64 probabilities."""
    logits = -np.sort(-spread * np.random.default_rng(seed).normal(size=(B, V))).astype(np.float32)
    probs = np.exp(logits.astype(np.float64))
    return logits, probs / probs.sum(axis=-1, keepdims=True)


@given(st.integers(0, 2**32), st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 4))
def test_top_p_is_metas_rule(seed, ps, spread):
    logits, probs = ranked_probabilities(seed, spread=spread)
    ours = np.asarray(kept(logits, settings(*(dict(top_p=p) for p in ps))))
    for row, row_probs, p in zip(ours, probs, ps, strict=True):
        before = np.cumsum(row_probs) - row_probs
        decided = np.abs(before - np.float32(p)) > 1e-5  # nearer than float32 sums are, either answer is right
        np.testing.assert_array_equal(row[decided], (rule_top_p(row_probs, p) > 0)[decided])


@given(st.integers(0, 2**32), st.lists(st.integers(0, V + 3), min_size=4, max_size=4))
def test_top_k_keeps_k_and_0_keeps_all(seed, ks):
    ours = kept(ranked_probabilities(seed)[0], settings(*(dict(top_k=k) for k in ks)))
    np.testing.assert_array_equal(np.sum(ours, axis=-1), [min(k, V) or V for k in ks])
    assert (np.diff(np.asarray(ours).astype(int)) <= 0).all()  # the first k


@given(st.integers(0, 2**32), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_min_p_keeps_what_has_that_share_of_the_likeliest(seed, shares):
    logits, probs = ranked_probabilities(seed)
    ours = np.asarray(kept(logits, settings(*(dict(min_p=share) for share in shares))))
    for row, row_probs, share in zip(ours, probs, shares, strict=True):
        decided = np.abs(row_probs - share * row_probs[0]) > 1e-6
        np.testing.assert_array_equal(row[decided], (row_probs >= share * row_probs[0])[decided])


@pytest.mark.parametrize(
    "p, stay",
    [
        (0.0, [1, 0, 0, 0]),
        (0.3, [1, 0, 0, 0]),
        (0.6, [1, 1, 0, 0]),  # the second crosses 0.6
        (0.76, [1, 1, 1, 0]),
        (0.88, [1, 1, 1, 1]),
        (1.0, [1, 1, 1, 1]),
        (1.5, [1, 1, 1, 1]),
    ],
)
def test_the_token_that_crosses_p_stays(p, stay):
    ranked = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    np.testing.assert_array_equal(kept(ranked, settings(dict(top_p=p)))[0], stay)


@pytest.mark.parametrize("p, stay", [(0.25, 2), (0.5, 3), (0.75, 4)])
def test_a_sum_before_it_of_exactly_p_lets_a_token_stay(p, stay):
    assert np.sum(kept(jnp.zeros((1, 4)), settings(dict(top_p=p)))) == stay


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_top_p_of_1_keeps_all_of_a_large_vocabulary(spread):
    """Though a float32 sum of 128,256 probabilities need not be 1."""
    logits = -np.sort(-spread * np.random.default_rng(1).normal(size=(3, 128256))).astype(np.float32)
    assert np.all(kept(logits, settings({}, {}, dict(top_p=1.5))))


def test_the_likeliest_stays_whatever_the_settings():
    rows = [dict(top_p=0.0), dict(min_p=1.0), dict(top_k=1), dict(top_k=1, top_p=0.0, min_p=1.0)]
    ours = np.asarray(kept(ranked_probabilities(1)[0], settings(*rows)))
    np.testing.assert_array_equal(ours.sum(axis=-1), 1)
    assert ours[:, 0].all()


def test_top_p_counts_over_what_top_k_left():
    """0.4, 0.3 and 0.3: of the two that top-k leaves the first has 4/7, more than 0.5."""
    ranked = jnp.log(jnp.asarray([[0.4, 0.3, 0.3]] * 2))
    ours = kept(ranked, settings(dict(top_k=2, top_p=0.5), dict(top_p=0.5)))
    np.testing.assert_array_equal(ours, [[True, False, False], [True, True, False]])


# sample


@given(st.integers(0, 2**32))
def test_temperature_0_takes_the_largest_and_the_first_of_equals(seed):
    logits = np.random.default_rng(seed).integers(0, 4, size=(4, V)).astype(np.float32)  # many ties
    for rows in ([dict(temperature=0.0)] * 4, [dict(temperature=0.0, top_p=0.9)] * 3 + [dict(temperature=1.0)]):
        ours = np.asarray(sampled(logits, keys(0, 4), settings(*rows)))
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours[:3], logits.argmax(axis=-1)[:3])


@given(st.integers(0, 2**32), st.sampled_from([1e-6, 1e-20, 1e-38]))
def test_a_tiny_temperature_is_greedy(seed, temperature):
    logits = 30 * np.random.default_rng(seed).normal(size=(4, V)).astype(np.float32)
    ours = sampled(logits, keys(seed, 4), settings(*[dict(temperature=temperature)] * 4))
    np.testing.assert_array_equal(ours, logits.argmax(axis=-1))


def test_top_p_of_0_top_k_of_1_and_min_p_of_1_are_greedy():
    logits = np.random.default_rng(2).normal(size=(6, V)).astype(np.float32)
    rows = [dict(top_p=0.0), dict(top_k=1), dict(min_p=1.0)]
    for seed in range(5):
        np.testing.assert_array_equal(sampled(logits, keys(seed, 6), settings(*rows, *rows)), logits.argmax(axis=-1))


def test_a_token_of_minus_infinity_is_never_drawn():
    logits = np.where(np.arange(V) % 3 == 1, 0.0, -np.inf).astype(np.float32)
    ours = np.asarray(sampled(np.tile(logits, (500, 1)), keys(3, 500), settings(*[dict(temperature=5.0)] * 500)))
    assert set(ours) == set(range(1, V, 3))


@given(st.integers(0, 2**32))
def test_a_key_draws_the_same_token_from_nearly_the_same_logits(seed):
    """Whatever changes places in their order: half of the tokens are as likely as another one, to the last bits."""
    rng = np.random.default_rng(seed)
    logits = np.repeat(rng.normal(size=(300, V // 2)), 2, axis=1).astype(np.float32)
    change = 1e-6 * rng.normal(size=logits.shape).astype(np.float32)
    for row in (dict(temperature=1.0), dict(temperature=0.7), dict(temperature=1.3, min_p=0.02)):
        rows = settings(*[row] * 300)
        ours, others = (np.asarray(sampled(x, keys(seed, 300), rows)) for x in (logits, logits + change))
        assert (ours != others).sum() <= 2


MIXED = [
    dict(temperature=1.0),
    dict(temperature=0.6, top_p=0.9),  # Meta's defaults
    dict(temperature=1.5, top_k=7),
    dict(temperature=0.8, min_p=0.1),
    dict(temperature=1.2, top_k=10, top_p=0.7, min_p=0.05),
    dict(temperature=0.0),
]
DRAWS = 20_000


@pytest.fixture(scope="module")
def draws() -> tuple[np.ndarray, np.ndarray]:
    """Logits [6, V] and DRAWS tokens of each; the six settings stand in turn in one batch."""
    logits = 1.5 * np.random.default_rng(4).normal(size=(len(MIXED), V)).astype(np.float32)
    batch = Sampling(*(jnp.tile(column, DRAWS) for column in settings(*MIXED)))
    tokens = sampled(jnp.tile(logits, (DRAWS, 1)), keys(5, DRAWS * len(MIXED)), batch)
    return logits, np.asarray(tokens).reshape(DRAWS, len(MIXED)).T


@pytest.mark.parametrize("row", range(len(MIXED)))
def test_tokens_are_drawn_as_often_as_the_formula_says(draws, row):
    """Pearson's statistic within five standard deviations of what chance gives."""
    logits, tokens = draws
    probs = rule(logits[row].astype(np.float64), **MIXED[row])
    counts = np.bincount(tokens[row], minlength=V)
    assert counts[probs == 0].sum() == 0
    rare = DRAWS * probs < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = DRAWS * np.append(probs[~rare], probs[rare].sum())
    statistic = np.sum((observed - expected) ** 2 / np.maximum(expected, 1))
    freedom = len(observed) - 1
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_a_row_is_sampled_in_a_batch_as_it_is_alone(draws):
    logits, tokens = draws
    row_keys = keys(5, DRAWS * len(MIXED))
    for i in range(3 * len(MIXED)):
        row = i % len(MIXED)
        alone = sampled(logits[row : row + 1], row_keys[i : i + 1], settings(MIXED[row]))
        assert int(alone[0]) == tokens[row, i // len(MIXED)]


def test_another_key_draws_another_token():
    tokens = sampled(jnp.zeros((200, V)), keys(6, 200), settings(*[{}] * 200))
    assert len(set(np.asarray(tokens).tolist())) > V // 2


# penalise


def random_history(rng: np.random.Generator, B: int) -> History:
    counts = rng.integers(0, 4, size=(B, V)) * (rng.random((B, V)) < 0.3)
    return History(rng.random((B, V)) < 0.3, counts.astype(np.int32), rng.normal(size=(B, V)).astype(np.float32))


@given(st.integers(0, 2**32))
def test_penalties_are_the_formula(seed):
    rng = np.random.default_rng(seed)
    logits, history = 3 * rng.normal(size=(4, V)).astype(np.float32), random_history(rng, 4)
    rows = [dict(repetition=rng.uniform(0.5, 2), frequency=rng.uniform(-2, 2), presence=rng.uniform(-2, 2)) for _ in range(4)]
    ours = penalised(logits, history, settings(*rows))
    expected = np.zeros((4, V))
    for b, v in np.ndindex(4, V):
        x, count, seen = float(logits[b, v]), history.counts[b, v], history.in_prompt[b, v] or history.counts[b, v] > 0
        if seen:
            x = x / rows[b]["repetition"] if x > 0 else x * rows[b]["repetition"]
        x -= count * rows[b]["frequency"] + (rows[b]["presence"] if count > 0 else 0)
        expected[b, v] = x + history.bias[b, v]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_neutral_penalties_change_nothing():
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(4, V)).astype(np.float32)
    history = random_history(rng, 4)._replace(bias=np.zeros((4, V), np.float32))
    np.testing.assert_array_equal(penalised(logits, history, settings({}, {}, {}, {})), logits)


def test_the_prompt_is_penalised_for_repetition_only():
    history = History(np.ones((1, V), bool), np.zeros((1, V), np.int32), np.zeros((1, V), np.float32))
    logits = np.random.default_rng(8).normal(size=(1, V)).astype(np.float32)
    np.testing.assert_array_equal(penalised(logits, history, settings(dict(frequency=1.0, presence=1.0))), logits)
    assert np.all(np.asarray(penalised(logits, history, settings(dict(repetition=1.5)))) < logits)


def test_a_bias_forbids_and_forces_a_token():
    bias = np.zeros((1, V), np.float32)
    bias[0, 3], bias[0, 5] = -np.inf, 100
    history = History(np.zeros((1, V), bool), np.zeros((1, V), np.int32), bias)
    logits = penalised(np.full((1, V), 2.0, np.float32), history, settings(dict(repetition=1.3)))
    assert logits[0, 3] == -np.inf and sampled(logits, keys(9, 1), settings({}))[0] == 5


# top_k

largest = jax.jit(top_k, static_argnums=1)


def rule_largest(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and ids, the first of equals first."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(logits, ids, axis=-1), ids


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    """Logits with many ties."""
    return np.random.default_rng(seed).integers(-9, 0, size=shape).astype(np.float32)


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 7, V]))
def test_the_largest_are_ranked_and_the_first_of_equals_is_first(seed, k):
    logits = integers(2, V, seed=seed)
    values, ids = largest(logits, k)
    assert ids.dtype == jnp.int32
    for ours, wanted in zip((values, ids), rule_largest(logits, k), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("size, k", [(320, 20), (320, 0), (320, 41), (321, 20), (64, 8)])
@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_the_largest_are_the_same_on_every_mesh(name, size, k):
    """Also where a device has fewer than k, and where the vocabulary is not divided evenly."""
    for logits in (integers(8, size), integers(8, 3, size, seed=1)):
        with jax.set_mesh(mesh_of(name)), without_rematerialisation():
            found = jax.jit(top_k, static_argnums=1)(logits, k)
        for ours, wanted in zip(found, rule_largest(logits, k), strict=True):
            np.testing.assert_array_equal(ours, wanted)


def test_a_divided_vocabulary_is_not_gathered_for_its_largest():
    """What crosses devices is 20 of each, not 4,000: no all-gather of the compiled program is as large as a row."""
    mesh, names = mesh_of("1x1x8"), jax.sharding.PartitionSpec(None, "tensor")
    logits = jax.ShapeDtypeStruct((8, 32_000), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, names))
    with jax.set_mesh(mesh):
        program = largest.lower(logits, 20).compile().as_text()
    gathered = [int(size) for size in re.findall(r"= f32\[8,(\d+)(?:,\d+)*\]\S* all-gather\(", program)]
    assert gathered and max(gathered) <= 8 * 20
