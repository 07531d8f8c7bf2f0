"""Llama 3's rank file: ids, names of the special tokens, slicing, and files that are refused."""

import base64

import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text import ranks
from llama_jax.text.ranks import NAMED_3_0, NAMED_3_1, NAMED_HF, parse_ranks, special_names

GOLDEN = {  # llama-facts 4.3, ids of Meta's tokenizer.model
    "This is a test sentence.": [2028, 374, 264, 1296, 11914, 13],
    "Hello world": [9906, 1917],
    "\n\n": [271],
    "user": [882],
    "assistant": [78191],
    "system": [9125],
    "ipython": [23799, 4690],
    "12345": [4513, 1774],
    "I'LL": [40, 6, 4178],
    "😀": [76460, 222],
    "  x": [220, 865],
    "Hello!\n\n": [9906, 2268],
    "<|eot_id|>": [27, 91, 68, 354, 851, 91, 29],
    "!": [0],
    " ": [220],
    "\n": [198],
    "A": [32],
}


def test_llama3_ids(llama3):
    assert {text: llama3.encode(text) for text in GOLDEN} == GOLDEN
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (128256, 128000, 128001)
    assert llama3.stop_ids == (128001, 128008, 128009)
    assert llama3.decode([128000, 9906, 1917, 128009]) == "Hello world"
    assert llama3.decode([128000, 9906, 128010], skip_special=False) == "<|begin_of_text|>Hello<|python_tag|>"


def test_special_names_of_each_release():
    assert all(len(set(special_names(n))) == 256 for n in (NAMED_3_0, NAMED_3_1, NAMED_HF))
    assert special_names(NAMED_3_0)[4:13:4] == [f"<|reserved_special_token_{k}|>" for k in (2, 4, 7)]
    assert special_names(NAMED_3_1)[11:13] == ["<|image|>", "<|reserved_special_token_2|>"]
    assert special_names(NAMED_HF)[5] == "<|reserved_special_token_2|>"
    assert [special_names(n)[-1] for n in (NAMED_3_0, NAMED_3_1, NAMED_HF)] == [
        f"<|reserved_special_token_{k}|>" for k in (250, 245, 247)
    ]


def test_names_are_recognised_unless_releases_disagree(all_tokenizers):
    tokenizer = all_tokenizers["ranks"]
    n = tokenizer.bos_id
    known = {
        "begin_of_text": 0,
        "eot_id": 9,
        "eom_id": 8,
        "finetune_right_pad_id": 4,
        "step_id": 5,
        "python_tag": 10,
        "image": 11,
    }
    assert {name: tokenizer.token_id(f"<|{name}|>") for name in known} == {name: n + i for name, i in known.items()}
    assert tokenizer.token_id("<|reserved_special_token_1|>") == n + 3
    assert tokenizer.token_id("<|reserved_special_token_2|>") is None  # id 4, 5 or 12
    assert len(tokenizer.special_ids) == 256


def test_merges_follow_the_ranks(all_tokenizers):
    tokenizer = all_tokenizers["ranks"]
    pieces = ["".join(tokenizer.decode([i])) for i in tokenizer.encode("hello hello world 123456")]
    assert pieces == ["hello", " ", "hello", " world", " ", "123", "4", "5", "6"]


def test_long_runs_are_cut_where_meta_cuts_them(monkeypatch):
    monkeypatch.setattr(ranks, "SLICE_CHARS", 20)
    monkeypatch.setattr(ranks, "RUN_CHARS", 4)
    monkeypatch.setattr(ranks, "LONG_RUN", ranks.re.compile(r"\s{5,}|\S{5,}"))
    for text in (
        "",
        "abcd",
        "abcdefghij kl      mn",
        "a bb ccc dddd eeeee ffffff ggggggg",
        " " * 30,
        "x" * 41,
        "日本\u3000\u3000 語\x1c\x1d",
    ):
        assert list(ranks._slices(text)) == [
            part for at in range(0, len(text), 20) for part in meta_slices(text[at : at + 20], 4)
        ]


def meta_slices(text: str, longest: int) -> list[str]:
    """Character by character: a part ends where its last run would exceed `longest`."""
    parts, run, space = [""], 0, None
    for c in text:
        run = run + 1 if c.isspace() == space else 1
        space = c.isspace()
        if run > longest:
            parts.append("")
            run = 1
        parts[-1] += c
    return parts


def test_very_long_text_encodes_and_comes_back(all_tokenizers):
    text = "hello world " * 40_000 + "x" * 60_000
    tokenizer = all_tokenizers["ranks"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def lines(tokens, numbers=None):
    numbers = range(len(tokens)) if numbers is None else numbers
    return b"\n".join(base64.b64encode(t) + b" %d" % i for t, i in zip(tokens, numbers, strict=True))


BYTES = [bytes([b]) for b in range(256)]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (lines([*BYTES, b"ab"], [*range(256), 255]), "rank 255 is given twice"),
        (lines([*BYTES, b"ab"], [*range(256), 257]), "rank 256 is missing"),
        (lines([*BYTES, b"a"]), "token of rank 97 is given again as rank 256"),
        (lines(BYTES[:-1]), "no token for the single byte 0xFF"),
        (lines(BYTES) + b"\nYQ== ten", "line 257 is not `base64 rank`"),
        (lines(BYTES) + b"\nYQ", "line 257 is not `base64 rank`"),
        (lines(BYTES) + b"\n!! 256", "line 257 is not `base64 rank`"),
        (lines(BYTES) + b"\nYQ== -1", "a negative rank"),
    ],
)
def test_broken_files_are_refused(data, what):
    with pytest.raises(LlamaError, match=what) as e:
        parse_ranks(data)
    assert e.value.code == ExitCode.BAD_TOKENIZER


def test_line_ends_of_windows_and_order_do_not_matter():
    shuffled = b"\r\n".join(reversed(lines([*BYTES, b"ab"]).split(b"\n"))) + b"\r\n\r\n"
    assert list(parse_ranks(shuffled).items()) == [*((b, i) for i, b in enumerate(BYTES)), (b"ab", 256)]
