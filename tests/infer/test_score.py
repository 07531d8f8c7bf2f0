"""infer.score: each token once, in windows; logits to a file."""

import gc
import json
import math

import numpy as np
import pytest

from configs.score import get_config
from infer import score
from infer.windows import log_likelihoods
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.state import Output
from tests.generation.make import CFG, full_logits, full_logprobs, ids, llama_of, log_softmax, logprobs_of
from tests.model.make import params_of, reference_of

TEXT = "The child found the red house."


class Counting:
    """Says of each token which one it is and how many it saw before it."""

    def __init__(self):
        self.windows = []

    def score(self, tokens):
        self.windows.append(list(tokens))
        seen = np.arange(1, len(tokens))
        return Output(np.array(tokens[1:]), np.array(tokens[1:]) + seen / 1000, None, None)


@pytest.mark.parametrize("window", [2, 3, 8, 16])
def test_every_token_is_scored_once_with_enough_before_it(window):
    for length in range(2, 40):
        for stride in sorted({1, max(1, window // 2), window - 1}):
            found = log_likelihoods(Counting(), range(length), window, stride)
            np.testing.assert_array_equal(np.floor(found + 1e-6), np.arange(1, length))
            seen = np.rint((found - np.floor(found + 1e-6)) * 1000)
            wanted = np.minimum(np.arange(1, length), window - stride)
            assert np.all(seen >= wanted) and np.all(seen < window)


def test_no_window_is_computed_for_nothing():
    counting = Counting()
    log_likelihoods(counting, range(20), 8, 4)
    assert [window[0] for window in counting.windows] == [0, 4, 8, 12]
    assert counting.windows[-1][-1] == 19


def test_one_window_is_one_pass(llama):
    tokens = ids(60)
    found = log_likelihoods(llama, tokens, CFG.max_length, CFG.max_length // 2)
    np.testing.assert_allclose(found, logprobs_of(tokens[:1], tokens[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (7, 6), (2, 1), (128, 64)])
def test_windows_are_those_of_the_reference(llama, window, stride):
    """Windows by hand: of token t, the first window that holds it; float64, from the equations."""
    tokens = ids(40)
    found = log_likelihoods(llama, tokens, window, stride)
    assert len(found) == 39
    begins = [0]
    while begins[-1] + window < 40:
        begins.append(begins[-1] + stride)
    said = {begin: log_softmax(reference_of(CFG, params_of(CFG), np.array(tokens[begin : begin + window]))) for begin in begins}
    for at in range(1, 40):
        begin = next(begin for begin in begins if begin < at < begin + window)
        assert at - begin >= min(at, window - stride)
        assert found[at - 1] == pytest.approx(said[begin][at - 1 - begin, tokens[at]], abs=1e-4)


def test_windows_see_what_their_tokens_say(llama):
    tokens, window, stride = ids(40), 16, 8
    found = log_likelihoods(llama, tokens, window, stride)
    for at in range(1, 40):
        begin = 0 if at < window else (at - window) // stride * stride + stride
        expected = full_logprobs(tokens[begin:at])[-1, tokens[at]]
        assert found[at - 1] == pytest.approx(expected, abs=1e-5)


def summary(capsys) -> dict:
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_a_text_is_scored(given, llama, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    given(score, get_config(), TEXT=[str(tmp_path / "text.txt")], TOKENS=None, LOGITS=None, DOCUMENTS=False)
    score.main()
    tokens = llama.tokenizer.encode(TEXT, bos=True)
    total = logprobs_of(tokens[:1], tokens[1:]).sum()
    found = summary(capsys)
    assert found["tokens"] == len(tokens) - 1
    assert found["log_likelihood"] == pytest.approx(total, abs=2e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-total / (len(tokens) - 1)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / len(TEXT.encode()), rel=1e-5)


def lines(capsys) -> list[dict]:
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_documents_are_reported_one_by_one_and_together(given, llama, capsys, tmp_path):
    texts = [TEXT, "She said\nhello.", TEXT + " " + TEXT]
    (tmp_path / "one.txt").write_text(texts[0])
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text, "id": 7}) + "\n\n" for text in texts[1:]))
    files = [str(tmp_path / name) for name in ("one.txt", "more.jsonl")]
    given(score, get_config(), TEXT=files, TOKENS=None, LOGITS=None, DOCUMENTS=True)
    score.main()
    *each, total = lines(capsys)
    assert [line["document"] for line in each] == [0, 1, 2]
    assert [line["name"] for line in each] == [files[0], f"{files[1]}:1", f"{files[1]}:3"]
    for line, text in zip(each, texts, strict=True):
        tokens = llama.tokenizer.encode(text, bos=True)
        said = logprobs_of(tokens[:1], tokens[1:]).sum()
        assert line["tokens"] == len(tokens) - 1 and line["log_likelihood"] == pytest.approx(said, abs=2e-4)
        assert line["bits_per_byte"] == pytest.approx(-said / math.log(2) / len(text.encode()), rel=1e-5)
    assert total["documents"] == 3 and total["tokens"] == sum(line["tokens"] for line in each)
    whole = sum(line["log_likelihood"] for line in each)
    assert total["log_likelihood"] == pytest.approx(whole, abs=2e-4)
    assert total["perplexity"] == pytest.approx(math.exp(-whole / total["tokens"]), rel=1e-5)
    assert total["bits_per_byte"] == pytest.approx(-whole / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5)


def test_rows_of_tokens_are_documents(given, capsys, tmp_path):
    np.save(tmp_path / "in.npy", np.array([ids(13), ids(13, seed=1)], np.int32))
    given(score, get_config(), TEXT=[], TOKENS=str(tmp_path / "in.npy"), LOGITS=None, DOCUMENTS=True)
    score.main()
    first, second, total = lines(capsys)
    assert first["name"].endswith("in.npy[0]") and second["tokens"] == 12 and total["tokens"] == 24


def test_the_window_may_be_shorter_than_the_context(given, llama, capsys, tmp_path):
    rows = np.array([ids(40)], np.int64)
    np.save(tmp_path / "in.npy", rows)
    config = get_config()
    config.window, config.stride = 16, 4
    given(score, config, TEXT=[], TOKENS=str(tmp_path / "in.npy"), LOGITS=None, DOCUMENTS=False)
    score.main()
    expected = log_likelihoods(llama, ids(40), 16, 4).sum()
    assert summary(capsys)["log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert abs(expected - log_likelihoods(llama, ids(40), 128, 64).sum()) > 0.1  # what the window changes


@pytest.mark.parametrize("window", [1, -5, 129])
def test_a_window_that_the_model_cannot_read_is_refused(given, tmp_path, window):
    np.save(tmp_path / "in.npy", np.ones((1, 8), int))
    config = get_config()
    config.window = window
    refused(given, rf"window is {window}, expected 2 to max_length \(128\)", config=config, TOKENS=str(tmp_path / "in.npy"))


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "no JSON"), ('{"text": 3}', "expected"), ('{"text": ""}', "not empty"), ("[1]", "expected"), ("{}", "expected")],
)
def test_a_line_without_a_text_is_named(given, tmp_path, line, said):
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    refused(given, f"in.jsonl:2 .*{said}", TEXT=[str(tmp_path / "in.jsonl")])


def test_tokens_are_scored_and_their_logits_written(given, capsys, tmp_path):
    rows = np.array([ids(13), ids(13, seed=1), ids(13, seed=2)], np.int32)
    np.save(tmp_path / "in.npy", rows)
    out = tmp_path / "logits.out"
    given(score, get_config(), TEXT=[], DOCUMENTS=False, TOKENS=str(tmp_path / "in.npy"), LOGITS=str(out))
    score.main()
    logits = np.load(out)
    assert (logits.shape, logits.dtype) == ((3, 13, CFG.vocab_size), np.float32)
    for row, found in zip(rows, logits, strict=True):
        np.testing.assert_allclose(found, full_logits(row), rtol=0, atol=1e-5)
    total = sum(logprobs_of(row[:1], row[1:]).sum() for row in rows)
    found = summary(capsys)
    assert found["tokens"] == 36 and found["log_likelihood"] == pytest.approx(total, abs=4e-4)
    assert "bits_per_byte" not in found


def test_a_long_text_is_scored_in_windows(given, capsys, tmp_path):
    rows = np.array([ids(300)], np.int64)
    np.save(tmp_path / "in.npy", rows)
    given(score, get_config(), TEXT=[], DOCUMENTS=False, TOKENS=str(tmp_path / "in.npy"), LOGITS=None)
    score.main()
    assert summary(capsys)["tokens"] == 299


def refused(given, match, code=ExitCode.BAD_REQUEST, config=None, model=None, **flags):
    more = {} if model is None else {"model": model}
    given(score, config or get_config(), **more, **dict(TEXT=[], TOKENS=None, LOGITS=None, DOCUMENTS=False) | flags)
    with pytest.raises(LlamaError, match=match) as error:
        score.main()
    assert error.value.code == code


def test_one_input_is_needed(given, tmp_path):
    refused(given, "give one of --text FILE and --tokens IN.npy")
    refused(given, "give one of --text FILE and --tokens IN.npy", TEXT=["a"], TOKENS="b")
    refused(given, "--logits goes with --tokens", TEXT=["a"], LOGITS="b")


def test_a_text_that_cannot_be_read_is_named(given, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(given, "nowhere as UTF-8 text", TEXT=[str(tmp_path / "nowhere")])
    refused(given, "binary as UTF-8 text", TEXT=[str(tmp_path / "binary")])
    refused(given, "empty is empty: nothing to score", TEXT=[str(tmp_path / "empty")])


@pytest.mark.parametrize("array", [np.ones(3, int), np.ones((1, 3)), np.ones((1, 0), int), np.ones((1, 2, 3), int)])
def test_an_array_of_another_kind_is_refused(given, tmp_path, array):
    np.save(tmp_path / "in.npy", array)
    refused(given, r"expected integers \[B, T\]", TOKENS=str(tmp_path / "in.npy"))


def test_a_file_that_is_no_array_is_refused(given, tmp_path):
    (tmp_path / "in.npy").write_text("1 2 3")
    np.save(tmp_path / "objects.npy", np.array([[{}]], object))
    for name in ("nowhere.npy", "in.npy", "objects.npy"):
        refused(given, name, TOKENS=str(tmp_path / name))


def test_an_archive_of_arrays_is_refused_and_closed(given, tmp_path):
    np.savez(tmp_path / "in.npz", tokens=np.ones((1, 3), int))
    refused(given, r"in.npz as a .npy array", TOKENS=str(tmp_path / "in.npz"))
    gc.collect()  # a file left open warns here


def test_one_token_cannot_be_scored(given, tmp_path):
    np.save(tmp_path / "in.npy", np.ones((2, 1), int))
    refused(given, "at least 2 tokens", TOKENS=str(tmp_path / "in.npy"))


@pytest.mark.parametrize("ids_", [[[5, 420]], [[5, -1]]])
def test_ids_outside_the_vocabulary_are_refused(given, tmp_path, ids_):
    np.save(tmp_path / "in.npy", np.array(ids_))
    refused(given, "expected a row of ids from 0 to 419", TOKENS=str(tmp_path / "in.npy"))


def test_logits_beyond_the_context_are_refused(given, tmp_path):
    np.save(tmp_path / "in.npy", np.ones((1, CFG.max_length + 1), int))
    refused(given, "T from 1 to 128", TOKENS=str(tmp_path / "in.npy"), LOGITS=str(tmp_path / "out.npy"))
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("stride", [-1, 128, 1000])
def test_a_stride_that_leaves_tokens_out_is_refused(given, tmp_path, stride):
    np.save(tmp_path / "in.npy", np.ones((1, 8), int))
    config = get_config()
    config.stride = stride
    refused(given, f"stride is {stride}, expected 1 to 127", config=config, TOKENS=str(tmp_path / "in.npy"))


def test_a_text_needs_a_tokenizer(given, tmp_path):
    (tmp_path / "text").write_text("a text")
    bare = llama_of(tokenizer=None)
    refused(given, "has no tokenizer", ExitCode.BAD_TOKENIZER, model=bare, TEXT=[str(tmp_path / "text")])
