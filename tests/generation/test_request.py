"""What a user may ask for, and what is refused with numbers before any work."""

import numpy as np
import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.request import Row, Settings, make_row, to_controls
from llama_jax.generation.state import MAX_STOP_IDS
from tests.generation.make import CFG, counting_compilations, ids

OUTSIDE = {
    "max_new_tokens": (-1, 2**20 + 1),
    "temperature": (-0.1, 1e5, float("nan"), float("inf"), "hot", True, None),
    "top_k": (-1, 2**31),
    "top_p": (-0.01, 1.01, float("nan")),
    "min_p": (-0.01, 1.01),
    "repetition_penalty": (0.0, -1.0, 1e4),
    "frequency_penalty": (-1001, 1001),
    "presence_penalty": (-1001, 1001),
    "seed": (-1, 2**64),
    "n": (0, 2**16 + 1),
    "logprobs": (-2, 21),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(LlamaError, match=f"^{name} is .*expected a (whole )?number from") as error:
        Settings(**{name: value})
    assert error.value.code == ExitCode.BAD_REQUEST


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "n", "logprobs"])
def test_a_fraction_is_refused_where_a_whole_number_is_meant(name):
    with pytest.raises(LlamaError, match=name):
        Settings(**{name: 1.5})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(stop=""), "stop is"),
        (dict(stop=["a", ""]), "stop is"),
        (dict(stop=[3]), "stop is"),
        (dict(stop=5), "stop is 5"),
        (dict(stop_ids=["a"]), "stop_ids are"),
        (dict(stop_ids=[2.5]), "stop_ids are"),
        (dict(ignore_eos="no"), "ignore_eos is 'no'"),
        (dict(logit_bias=[3]), "logit_bias is"),
        (dict(logit_bias={3: float("nan")}), r"logit_bias is \{3: nan\}"),
        (dict(logit_bias={3: float("inf")}), r"logit_bias is \{3: inf\}"),
        (dict(logit_bias={"3": 1.0}), r"logit_bias is \{'3': 1.0\}"),
    ],
)
def test_stops_and_biases_that_mean_nothing_are_refused(changes, match):
    with pytest.raises(LlamaError, match=match) as error:
        Settings(**changes)
    assert error.value.code == ExitCode.BAD_REQUEST


def test_numpy_numbers_are_numbers():
    settings = Settings(seed=np.int64(3), temperature=np.float32(0.5))
    assert settings == Settings(seed=3, temperature=0.5) and type(settings.seed) is int


def test_one_stop_string_need_not_be_a_list():
    assert Settings(stop="end").stop == ("end",)


def row(tokens=(5, 6, 7), stop_ids=(2,), max_length=128, **settings) -> Row:
    return make_row(
        tokens, Settings(**dict(max_new_tokens=8) | settings), stop_ids, vocab_size=CFG.vocab_size, max_length=max_length
    )


def test_zero_new_tokens_means_what_the_context_holds():
    assert row(max_new_tokens=0).settings.max_new_tokens == 125


def test_a_prompt_that_leaves_just_enough_room_is_taken():
    assert row(tokens=range(5, 105), max_new_tokens=28).settings.max_new_tokens == 28


def test_too_many_tokens_are_refused_with_all_three_numbers(llama):
    with counting_compilations() as compiled, pytest.raises(LlamaError) as error:
        llama.generate([ids(5), ids(100)], max_new_tokens=29)
    for number in ("100 tokens", "max_new_tokens is 29", "129 together", "max_length is 128"):
        assert number in str(error.value)
    assert error.value.code == ExitCode.BAD_REQUEST
    assert not compiled


def test_a_bad_prompt_is_refused_before_the_engine_is_touched(llama, monkeypatch):
    def touched(*args, **more):
        raise AssertionError("the engine was run")

    monkeypatch.setattr(llama.engine, "run", touched)
    for bad in ({"max_new_tokens": 128}, {"stop_ids": [420]}, {"logit_bias": {420: 1.0}}):
        with pytest.raises(LlamaError):
            llama.generate([ids(1), ids(2), ids(3), ids(4), ids(5)], **bad)
        with pytest.raises(LlamaError):
            list(llama.stream(ids(5), **bad))


def test_a_prompt_as_long_as_the_context_is_refused():
    with pytest.raises(LlamaError, match="prompt has 128 tokens, max_length is 128"):
        row(tokens=[5] * 128, max_new_tokens=0)


@pytest.mark.parametrize("token", [-1, CFG.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(llama, token):
    with pytest.raises(LlamaError, match=str(token)):
        llama.generate([[5, token]])
    for more in (dict(stop_ids=[token]), dict(logit_bias={token: 1.0})):
        with pytest.raises(LlamaError, match=f"token id {token} is outside the vocabulary of 420"):
            llama.generate([[5]], **more)


def test_prompts_that_are_not_ids_are_refused(llama):
    with pytest.raises(LlamaError, match="expected a row of ids"):
        llama.generate([[1.5, 2.0]])
    for odd in ([[1, 2], [3]], [[1, 2], [3, 4]], b"ab", 5):
        with pytest.raises(LlamaError, match="expected a row of ids"):
            llama.generate([odd])
    for bad in ("one string", [], ()):
        with pytest.raises(LlamaError, match="expected a list of texts"):
            llama.generate(bad)
        with pytest.raises(LlamaError, match="expected a list of texts"):
            list(llama.stream_all(bad))


def test_no_ids_are_refused(llama):
    with pytest.raises(LlamaError, match="the prompt has no tokens"):
        llama.generate([[]])


def test_an_unknown_setting_is_refused_and_the_known_are_named(llama):
    with pytest.raises(LlamaError, match=r"no such setting: temprature; there are .*temperature"):
        llama.generate(["a"], temprature=1.0)
    with pytest.raises(LlamaError, match="no such setting: topk"):
        list(llama.stream("a", topk=1))


def test_too_many_stop_ids_are_refused(llama):
    many = list(range(10, 10 + MAX_STOP_IDS))
    with pytest.raises(LlamaError, match="9 stop ids, at most 8: use stop strings"):
        llama.generate([[5]], stop_ids=many, max_new_tokens=8)
    assert row(stop_ids=()).stop_ids == ()
    settings = Settings(max_new_tokens=8, stop_ids=many, ignore_eos=True)
    assert make_row([5], settings, (2,), vocab_size=420, max_length=128).stop_ids == tuple(many)


def test_what_needs_text_is_refused_without_a_tokenizer(bare):
    for ask in (
        lambda: bare.generate(["text"]),
        lambda: bare.generate([[5]], max_new_tokens=8, stop=["x"]),
        lambda: list(bare.stream([5], max_new_tokens=8)),
        lambda: bare.chat([{"role": "user", "content": "Hi"}]),
        lambda: bare.infill("a<FILL_ME>b"),
    ):
        with pytest.raises(LlamaError, match=r"no tokenizer: pass its file .*or give token ids") as error:
            ask()
        assert error.value.code == ExitCode.BAD_TOKENIZER


def test_rows_that_fill_a_batch_generate_nothing():
    controls = to_controls([row(max_new_tokens=7, temperature=0.5, seed=2**40 + 3)], 4, CFG.vocab_size)
    np.testing.assert_array_equal(controls.max_new, [7, 0, 0, 0])
    np.testing.assert_array_equal(controls.seed[0], [2**8, 3, 0])
    assert controls.bias is None
    assert {len(column) for column in controls.sampling} == {4}


def test_arrays_over_the_vocabulary_exist_only_when_a_row_needs_them():
    rows = [row(), row(logit_bias={9: -2.5})]
    bias = to_controls(rows, 2, CFG.vocab_size).bias
    assert bias.shape == (2, 420) and bias[1, 9] == -2.5 and np.count_nonzero(bias) == 1
    for needs in (dict(presence_penalty=0.1), dict(frequency_penalty=-1), dict(repetition_penalty=1.1)):
        assert to_controls([row(), row(**needs)], 2, CFG.vocab_size).bias is not None
