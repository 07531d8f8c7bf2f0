"""Infilling prompts of Code Llama."""

import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.infill import encode_infill, infill_stop_id, split_fill_me
from llama_jax.text.spm import SentencePieceTokenizer
from tests.text import make


@pytest.mark.parametrize("kind", ["codellama", "json_prepend", "json_metaspace"])
def test_prompt_orders(all_tokenizers, kind):
    t = all_tokenizers[kind]
    pre, suf, mid = (t.token_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID"))
    prefix, suffix = t.encode("the "), t.encode_continued(" house")
    assert encode_infill(t, "the ", " house") == [t.bos_id, pre, *prefix, suf, *suffix, mid]
    assert encode_infill(t, "the ", " house", suffix_first=True) == [t.bos_id, pre, suf, *suffix, mid, *prefix]
    assert infill_stop_id(t) == t.token_id("▁<EOT>")
    assert t.decode(t.encode_continued("  return"), continued=True) == "  return"


def test_codellama_ids(llama2):
    tokenizer = SentencePieceTokenizer(make.with_pieces(llama2.source_proto, make.INFILL_PIECES))
    assert [tokenizer.token_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT")] == [32007, 32008, 32009, 32010]
    x = [29916, 353, 29871, 29896]  # without the leading space
    assert encode_infill(tokenizer, "x = 1", "x = 1") == [1, 32007, 921, *x[1:], 32008, *x, 32009]
    assert encode_infill(tokenizer, "x = 1", "x = 1", True) == [1, 32007, 32008, *x, 32009, 921, *x[1:]]
    assert tokenizer.special_ids == {1, 2, *range(32000, 32016)}
    text = "def f():\n  <PRE> <SUF> <MID> <EOT>"
    assert tokenizer.encode(text) == llama2.encode(text)


def test_user_text_cannot_end_the_prefix(all_tokenizers):
    t = all_tokenizers["codellama"]
    ids = encode_infill(t, "a <SUF> b", " <MID> <EOT>")
    assert [i for i in ids if i in t.special_ids] == [t.bos_id, *(t.token_id(f"<{n}>") for n in ("PRE", "SUF", "MID"))]


@pytest.mark.parametrize("kind", ["sentencepiece", "ranks", "json_bytes"])
def test_tokenizers_without_infilling_tokens_are_refused(all_tokenizers, kind):
    for ask in (lambda t: encode_infill(t, "a", "b"), infill_stop_id):
        with pytest.raises(LlamaError, match=r"infilling needs Code Llama 7B, 13B or 70B") as e:
            ask(all_tokenizers[kind])
        assert e.value.code == ExitCode.BAD_TOKENIZER


def test_fill_me_splits_once():
    assert split_fill_me("a <FILL_ME> b") == ("a ", " b")
    for text, count in (("ab", 0), ("<FILL_ME>a<FILL_ME>", 2)):
        with pytest.raises(LlamaError, match=f"has one <FILL_ME> for the text to come, this has {count}") as e:
            split_fill_me(text)
        assert e.value.code == ExitCode.BAD_REQUEST
