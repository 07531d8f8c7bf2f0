"""Hypothesis strategies: hostile text, and ids with many half characters."""

from hypothesis import strategies as st

from llama_jax.text.base import Tokenizer

SPECIALS = (
    *("<s>", "</s>", "<unk>", "<step>", "▁<PRE>", "<EOT>"),
    *("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|tool|>"),
)
SNIPPETS = (
    *SPECIALS,
    *(" <PRE>", "<|eot", "_id|>", "<0x0A>", "[INST]", "<", "|>"),
    *("▁", " ", "  ", "\n\n", "\x00", "the", "123", "😀", "é"),
)


def texts(max_parts: int = 8) -> st.SearchStrategy[str]:
    part = st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=6))
    return st.lists(part, max_size=max_parts).map("".join)


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of all sorts, the first few hundred (bytes and control tokens) more often than others."""
    low = st.integers(0, min(299, tokenizer.vocab_size - 1))
    real = st.sampled_from([tokenizer.encode(text) for text in ("😀日本語 é", " the \n\n house", "x")])
    part = st.one_of(low.map(lambda i: [i]), st.integers(0, tokenizer.vocab_size - 1).map(lambda i: [i]), real)
    return st.lists(part, max_size=12).map(lambda parts: [i for ids in parts for i in ids])
