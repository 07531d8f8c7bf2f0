"""Texts in, texts out: stops, streams, echo, reports, batches, chat, infilling."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.request import Settings
from llama_jax.text.tokenizer import load_tokenizer
from tests.generation.make import CFG, ONE_LAYER, full_logprobs, ids, llama_of, logprobs_of
from tests.text.make import INFILL_PIECES, small_sentencepiece, with_pieces

TEXTS = ["The child found", "She", "Nobody said hello", "a"]
DRAWN = Settings(temperature=1.0, top_p=1.0, seed=7, max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def drawn(llama):
    """The answers of DRAWN to TEXTS."""
    return llama.generate(TEXTS, DRAWN)


def test_a_text_is_continued_from_a_beginning_of_sequence(llama, drawn):
    for text, completion in zip(TEXTS, drawn, strict=True):
        assert completion.prompt_tokens == [1, *llama.tokenizer.encode(text)]
        assert completion.text == llama.tokenizer.decode(completion.tokens, continued=True)


def test_ids_are_taken_as_they_are(llama, drawn):
    again = llama.generate([np.array(completion.prompt_tokens) for completion in drawn], DRAWN)
    assert again == drawn
    assert llama.generate([ids(5)], DRAWN)[0].prompt_tokens == ids(5)


def test_an_empty_prompt_is_the_beginning_of_a_text(llama):
    (completion,) = llama.generate([""], DRAWN)
    assert completion.prompt_tokens == [1]
    assert completion.text == llama.tokenizer.decode(completion.tokens)


def test_a_leading_space_stands_between_text_and_answer_only(llama):
    the = llama.tokenizer.encode("the")[0]  # "▁the"
    for prompt, text in (("", "the"), ("She", " the")):
        assert llama.generate([prompt], logit_bias={the: 100.0}, max_new_tokens=1)[0].text == text


@pytest.mark.parametrize("new", [1, 2, 32, 33, 34, 64])
def test_as_many_tokens_as_asked_for(llama, new):
    for completion in llama.generate(TEXTS, DRAWN, max_new_tokens=new):
        assert (len(completion.tokens), completion.finish_reason) == (new, "length")


def test_more_prompts_than_a_batch_holds_wait_their_turn(llama, drawn):
    many = llama.generate([*TEXTS, TEXTS[0]], DRAWN)
    assert many[:4] == drawn
    assert many[4].tokens == drawn[0].tokens


def test_answers_come_in_the_order_of_prompts_and_samples(llama):
    answers = llama.generate(TEXTS[:2], DRAWN, n=4)
    assert [a.sample for a in answers] == [0, 1, 2, 3] * 2
    assert [a.prompt_tokens[1:] for a in answers] == [llama.tokenizer.encode(text) for text in TEXTS[:2] for _ in range(4)]
    assert len({a.text for a in answers}) == 8


def test_a_stop_id_ends_the_answer_before_it(llama, drawn):
    for completion in drawn:
        stop = completion.tokens[17]
        at = completion.tokens.index(stop)
        (cut,) = llama.generate([completion.prompt_tokens], DRAWN, stop_ids=[stop, 5, 6])
        at = min(completion.tokens.index(token) for token in (stop, 5, 6) if token in completion.tokens)
        assert (cut.tokens, cut.finish_reason) == (completion.tokens[:at], "stop")
        assert cut.text == llama.tokenizer.decode(completion.tokens[:at], continued=True)


def test_the_end_of_sequence_stops_unless_ignored(llama):
    force_end = dict(logit_bias={2: 100.0}, max_new_tokens=6)
    for completion in llama.generate(TEXTS, **force_end):
        assert (completion.tokens, completion.text, completion.finish_reason) == ([], "", "stop")
    for completion in llama.generate(TEXTS, ignore_eos=True, **force_end):
        assert (completion.tokens, completion.text, completion.finish_reason) == ([2] * 6, "", "length")


def stops_of(text: str) -> list[str]:
    """Pieces of a text, most of them across the borders of tokens; none with half a character."""
    found = [text[at : at + n] for at in range(2, len(text) - 4, 9) for n in (1, 2, 3, 4)]
    return [stop for stop in found if "\ufffd" not in stop]


def test_a_stop_string_ends_the_answer_before_it_wherever_tokens_end(llama, drawn):
    for prompt, completion in zip(TEXTS, drawn, strict=True):
        stops = stops_of(completion.text)
        assert len(stops) > 5
        for stop in stops:
            (cut,) = llama.generate([prompt], DRAWN, stop=stop)
            assert (cut.text, cut.finish_reason) == (completion.text[: completion.text.find(stop)], "stop")
            assert completion.tokens[: len(cut.tokens)] == cut.tokens


def test_a_stream_is_the_text_and_never_shows_a_part_of_a_stop(llama, drawn):
    for prompt, completion in zip(TEXTS, drawn, strict=True):
        assert "".join(llama.stream(prompt, DRAWN)) == completion.text
        for stop in stops_of(completion.text)[::3]:
            shown = ""
            for piece in llama.stream(prompt, DRAWN, stop=["never this", stop]):
                shown += piece
                assert completion.text.startswith(shown) and stop not in shown
            assert shown == completion.text[: completion.text.find(stop)]


def test_pieces_of_a_stream_are_whole_characters(llama):
    tokens = [3 + byte for byte in "日本".encode()]
    for i in range(len(tokens)):
        pieces = list(llama.stream(tokens[:i] or [1], DRAWN, max_new_tokens=20))
        (whole,) = llama.generate([tokens[:i] or [1]], DRAWN, max_new_tokens=20)
        assert "".join(pieces) == whole.text


def test_streams_of_several_rows_are_their_texts(llama, drawn):
    shown = [""] * 5
    for index, piece in llama.stream_all([*TEXTS, TEXTS[0]], DRAWN):
        shown[index] += piece
    assert shown == [completion.text for completion in (*drawn, drawn[0])]


def test_a_reader_may_leave_a_stream(llama, drawn):
    stream = llama.stream(TEXTS[0], DRAWN)
    first = next(stream)
    stream.close()
    assert drawn[0].text.startswith(first)
    assert llama.generate(TEXTS, DRAWN) == drawn


def test_echo_puts_the_prompt_before_the_answer(llama, drawn):
    for prompt, plain, echoed in zip(TEXTS, drawn, llama.generate(TEXTS, DRAWN, echo=True), strict=True):
        assert echoed.text == prompt + plain.text
        assert echoed.tokens == plain.tokens
        assert "".join(llama.stream(prompt, DRAWN, echo=True)) == echoed.text


def test_log_probabilities_are_the_log_softmax_of_the_forward_pass(llama, drawn):
    reported = llama.generate(TEXTS, DRAWN, logprobs=5)
    assert [completion.tokens for completion in reported] == [completion.tokens for completion in drawn]
    for completion in reported:
        tokens = [*completion.prompt_tokens, *completion.tokens]
        expected = full_logprobs(tokens)[len(completion.prompt_tokens) - 1 : -1]
        chosen = expected[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.logprobs, chosen, rtol=1e-6, atol=1e-5)
        for row, top in zip(expected, completion.top_logprobs, strict=True):
            assert list(top) == np.argsort(-row)[:5].tolist()
            assert list(top.values()) == sorted(top.values(), reverse=True)
    assert drawn[0].logprobs is None and drawn[0].top_logprobs is None and drawn[0].prompt_logprobs is None


def test_log_probabilities_of_the_prompt_come_with_echo(llama):
    (completion,) = llama.generate([ids(9)], max_new_tokens=1, logprobs=0, echo=True)
    np.testing.assert_allclose(completion.prompt_logprobs, logprobs_of(ids(1), ids(9)[1:]), rtol=0, atol=1e-5)
    assert llama.generate([""], max_new_tokens=1, logprobs=0, echo=True)[0].prompt_logprobs == []
    assert llama.generate([ids(9)], max_new_tokens=1, logprobs=0)[0].prompt_logprobs is None


def test_without_a_tokenizer_ids_give_ids(llama, bare):
    (completion,) = bare.generate([ids(7)], DRAWN, echo=True)
    assert completion.text == ""
    assert completion.tokens == llama.generate([ids(7)], DRAWN)[0].tokens


@pytest.mark.parametrize("length", [1, 0])
def test_too_little_or_too_much_to_score_is_refused(llama, length):
    for tokens in (ids(length), ids(CFG.max_length + 1)):
        with pytest.raises(LlamaError, match=rf"{len(tokens)} tokens to score, expected 2 to max_length \(128\)"):
            llama.score(tokens)


@pytest.mark.parametrize("tokens", [[1, 2], [[1.0]], np.zeros((1, 129), int), np.zeros((2, 0), int), [[420]], [[-1]]])
def test_logits_of_what_are_no_ids_are_refused(llama, tokens):
    with pytest.raises(LlamaError, match="tokens are") as error:
        llama.logits(tokens)
    assert error.value.code == ExitCode.BAD_REQUEST


MESSAGES = [{"role": "user", "content": "The red house"}]


def test_a_chat_answers_the_formatted_conversation(llama):
    answer = llama.chat(MESSAGES, DRAWN)
    assert answer.prompt_tokens == [1, *llama.tokenizer.encode("[INST] The red house [/INST]")]
    assert answer.tokens == llama.generate([answer.prompt_tokens], DRAWN)[0].tokens
    assert answer.text == llama.tokenizer.decode(answer.tokens, continued=True)
    assert "".join(llama.stream_chat(MESSAGES, DRAWN)) == answer.text


def test_a_chat_is_answered_once_and_without_its_prompt(llama):
    assert llama.chat(MESSAGES, DRAWN, n=3, echo=True) == llama.chat(MESSAGES, DRAWN)


def test_a_base_model_refuses_to_chat(llama):
    base = llama_of(chat_format="")
    for ask in (base.chat, lambda messages: list(base.stream_chat(messages))):
        with pytest.raises(LlamaError, match="this is a base model") as error:
            ask(MESSAGES)
        assert error.value.code == ExitCode.BAD_REQUEST


@pytest.fixture(scope="module")
def code_llama():
    with tempfile.TemporaryDirectory() as folder:
        model = small_sentencepiece(Path(folder) / "tokenizer.model", CFG.vocab_size)
        model.write_bytes(with_pieces(model.read_bytes(), INFILL_PIECES))
        tokenizer = load_tokenizer(model)
    return llama_of(dataclasses.replace(ONE_LAYER, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)


def test_infilling_gives_prefix_middle_and_suffix(code_llama):
    prefix, suffix = "def f", "\n    return"
    settings = dataclasses.replace(DRAWN, max_new_tokens=12, ignore_eos=False)
    tokenizer = code_llama.tokenizer
    pre, suf, mid, end = (tokenizer.token_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))
    orders = {
        False: [1, pre, *tokenizer.encode(prefix), suf, *tokenizer.encode_continued(suffix), mid],
        True: [1, pre, suf, *tokenizer.encode_continued(suffix), mid, *tokenizer.encode(prefix)],
    }
    for suffix_first, prompt in orders.items():
        (middle,) = code_llama.generate([prompt], settings, stop_ids=[end])
        filled = code_llama.infill(f"{prefix}<FILL_ME>{suffix}", settings, suffix_first=suffix_first)
        assert filled == prefix + tokenizer.decode(middle.tokens, continued=True) + suffix


@pytest.mark.parametrize("text", ["none", "two <FILL_ME> of <FILL_ME> them"])
def test_infilling_needs_one_place_to_fill(code_llama, text):
    with pytest.raises(LlamaError, match="one <FILL_ME>"):
        code_llama.infill(text)


def test_infilling_needs_its_tokens(llama):
    with pytest.raises(LlamaError, match="infilling needs Code Llama"):
        llama.infill("a<FILL_ME>b")
