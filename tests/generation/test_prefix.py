"""What is read in parts, or was read before, is what is read at once; and it is not read again."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_jax
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation import programs
from llama_jax.generation.engine import Engine
from llama_jax.generation.reading import Reader, common_length
from llama_jax.generation.request import Settings
from tests.generation.make import ONE_LAYER, ids, llama_of
from tests.model.make import params_of

SHARED = ids(40, seed=9)
PROMPTS = [[*SHARED, *ids(3, seed=1)], [*SHARED, *ids(11, seed=2)], [*SHARED, 5]]
DRAWN = Settings(temperature=1.0, top_p=1.0, seed=3, max_new_tokens=20, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def llama():
    return llama_of(ONE_LAYER)


@pytest.fixture
def read(monkeypatch):
    """How many tokens of each row every program read, in order."""
    found, on_mesh = [], Reader.on_mesh

    def counted(self, program, *args, **options):
        if program in (programs.prefill, programs.read, programs.extend):
            found.append(next(a.shape[1] for a in args if isinstance(a, np.ndarray) and a.ndim == 2))
        return on_mesh(self, program, *args, **options)

    monkeypatch.setattr(Reader, "on_mesh", counted)
    return found


def same(a, b):
    for one, other in zip(a, b, strict=True):
        assert (one.tokens, one.finish_reason, one.text) == (other.tokens, other.finish_reason, other.text)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def chunked(chunk: int, **options):
    llama = llama_of(options.pop("cfg", ONE_LAYER), **options)
    llama.engine.chunk = chunk
    return llama


@pytest.mark.parametrize("chunk", [16, 32])
def test_a_prompt_read_in_chunks_is_a_prompt_read_at_once(llama, chunk, read):
    prompts = [ids(n, seed=n) for n in (1, 15, 100, 17)]
    expected = llama.generate(prompts, DRAWN)
    del read[:]
    same(chunked(chunk).generate(prompts, DRAWN), expected)
    assert read == [chunk] * -(-100 // chunk)


def test_chunks_end_where_the_context_does():
    llama, whole = chunked(48), llama_of(ONE_LAYER)
    prompt = ids(127)
    same(llama.generate([prompt], DRAWN, max_new_tokens=1), whole.generate([prompt], DRAWN, max_new_tokens=1))


def test_penalties_know_a_prompt_read_in_chunks(llama):
    prompt = [*ids(20), *[7] * 30]
    changes = dict(temperature=0, repetition_penalty=1.4)
    same(chunked(16).generate([prompt], DRAWN, **changes), llama.generate([prompt], DRAWN, **changes))


def test_what_a_prefix_has_read_is_not_read_again(llama, read):
    expected = llama.generate(PROMPTS, DRAWN)
    prefix = llama.prefill(SHARED)
    for _ in range(2):  # a prefix is not used up
        del read[:]
        same(llama.generate(PROMPTS, DRAWN, prefix=prefix), expected)
        assert read == [16]


@pytest.mark.parametrize("prompt", [SHARED, SHARED[:30], [*SHARED[:20], *ids(60, seed=4)], ids(9), [*SHARED, *ids(87, seed=5)]])
def test_any_prompt_may_meet_any_prefix(llama, prompt):
    changes = dict(max_new_tokens=min(20, ONE_LAYER.max_length - len(prompt)))
    expected = llama.generate([prompt], DRAWN, **changes)
    same(llama.generate([prompt], DRAWN, prefix=llama.prefill(SHARED), **changes), expected)


def test_a_prefix_as_long_as_the_context_is_one(llama):
    prompt = ids(127, seed=6)
    changes = dict(max_new_tokens=1)
    same(
        llama.generate([prompt], DRAWN, prefix=llama.prefill([*prompt, 3]), **changes),
        llama.generate([prompt], DRAWN, **changes),
    )


def test_streams_take_a_prefix_too(llama):
    expected = llama.generate(PROMPTS, DRAWN)
    texts = [""] * len(PROMPTS)
    for b, piece in llama.stream_all(PROMPTS, DRAWN, prefix=llama.prefill(SHARED)):
        texts[b] += piece
    assert texts == [completion.text for completion in expected]


def test_the_next_turn_of_a_chat_reads_only_what_is_new(llama, read):
    session, messages = llama_jax.Session(), []
    for text in ("She found a child", "hello", "who"):
        messages.append({"role": "user", "content": text})
        fresh = llama.chat(messages, DRAWN, max_new_tokens=12)
        del read[:]
        answer = llama.chat(messages, DRAWN, max_new_tokens=12, session=session)
        same([answer], [fresh])
        assert common_length(session.prefix.tokens, answer.prompt_tokens) == len(answer.prompt_tokens)
        messages.append({"role": "assistant", "content": "a child"})
    assert len(answer.prompt_tokens) == 64 and read == [32]


def test_a_streamed_turn_is_kept_and_one_left_by_its_reader_is_not(llama):
    session, messages = llama_jax.Session(), [{"role": "user", "content": "She"}]
    assert "".join(llama.stream_chat(messages, DRAWN, session=session)) == llama.chat(messages, DRAWN).text
    kept = session.prefix
    stream = llama.stream_chat(messages, DRAWN, session=session)
    next(stream)
    stream.close()
    assert kept is not None and session.prefix is kept


def test_dynamic_rope_has_no_prefixes_and_chats_without(llama):
    cfg = dataclasses.replace(ONE_LAYER, rope_type="dynamic", rope_factor=2.0, rope_original_length=32)
    dynamic = llama_of(cfg)
    with pytest.raises(LlamaError, match="dynamic RoPE") as error:
        dynamic.prefill(SHARED)
    assert error.value.code == ExitCode.BAD_REQUEST
    messages, session = [{"role": "user", "content": "She"}], llama_jax.Session()
    same([dynamic.chat(messages, DRAWN, session=session)], [dynamic.chat(messages, DRAWN)])
    long = [ids(50, seed=8)]
    same(chunked(16, cfg=cfg).generate(long, DRAWN), dynamic.generate(long, DRAWN))


def test_a_prefix_in_int8_is_what_decoding_reads(llama):
    """What follows a prefix reads it rounded, as it reads what it made itself: close to the floats, not equal."""
    rounded = llama_of(ONE_LAYER, cache_dtype="int8")
    asked = dict(temperature=0, max_new_tokens=1)
    exact = llama.generate(PROMPTS, DRAWN, **asked)
    for prefix in (None, rounded.prefill(SHARED)):
        for ours, wanted in zip(rounded.generate(PROMPTS, DRAWN, prefix=prefix, **asked), exact, strict=True):
            np.testing.assert_allclose(ours.logprobs, wanted.logprobs, rtol=0, atol=0 if prefix is None else 0.1)
            assert prefix is None or ours.logprobs != wanted.logprobs


@pytest.mark.parametrize("prompt", [[], ids(129)])
def test_a_prefix_of_no_tokens_or_too_many_is_refused(llama, prompt):
    with pytest.raises(LlamaError, match=f"{len(prompt)} tokens to read, expected 1 to max_length"):
        llama.prefill(prompt)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_length_is_the_longest_beginning_of_both(a, b):
    n = common_length(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_16k_tokens_of_the_tiny_model_are_read_within_a_bound():
    """In chunks of 4,096: the cache, and temporaries that do not grow with the prompt but for a block's scores."""
    cfg = dataclasses.replace(ONE_LAYER, max_length=2**14)
    engine = Engine(cfg, params_of(cfg), cfg.max_length)
    tokens = np.zeros((1, engine.chunk), np.int32)
    cache = jax.eval_shape(
        lambda p, t, n: programs.read(cfg, p, t, n, n, cache_length=cfg.max_length)[0],
        engine.params,
        tokens,
        np.ones(1, np.int32),
    )
    last = jax.ShapeDtypeStruct((1, 1, cfg.embed_dim), np.float32)
    one = np.ones(1, np.int32)
    memory = programs.extend.lower(cfg, engine.params, cache, last, tokens, np.int32(0), one, one).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * 4 for x in jax.tree.leaves(cache))
    scores = cfg.num_heads * 128 * cfg.max_length * 4
    assert memory.temp_size_in_bytes < 4 * scores  # 50 MB each; of the whole prompt they would be 6.4 GB
