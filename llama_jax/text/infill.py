"""Code Llama's infilling: the prompt that asks for the text between a prefix and a suffix (arXiv:2308.12950, section 2.3)."""

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import Tokenizer

FILL_ME = "<FILL_ME>"


def encode_infill(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
    """Ids after which the model writes the middle and then `infill_stop_id`; decode them with continued=True.

    Args:
        suffix_first: the paper's SPM order, suffix before prefix, instead of PSM.
    """
    pre, suf, mid = (_infill_id(tokenizer, name) for name in ("<PRE>", "<SUF>", "<MID>"))
    before, after = tokenizer.encode(prefix), tokenizer.encode_continued(suffix)
    bos = tokenizer.encode("", bos=True)
    if suffix_first:
        return [*bos, pre, suf, *after, mid, *before]
    return [*bos, pre, *before, suf, *after, mid]


def infill_stop_id(tokenizer: Tokenizer) -> int:
    """The token that ends the middle: EOT, not EOS."""
    return _infill_id(tokenizer, "<EOT>")


def split_fill_me(text: str) -> tuple[str, str]:
    """Prefix and suffix around the one <FILL_ME> in the text."""
    parts = text.split(FILL_ME)
    if len(parts) != 2:
        found = len(parts) - 1
        raise LlamaError(ExitCode.BAD_REQUEST, f"an infilling prompt has one {FILL_ME} for the text to come, this has {found}")
    return parts[0], parts[1]


def _infill_id(tokenizer: Tokenizer, name: str) -> int:
    found = (tokenizer.token_id(spelling) for spelling in (f"▁{name}", name))
    token_id = next((i for i in found if i is not None), None)
    if token_id is None:
        raise LlamaError(
            ExitCode.BAD_TOKENIZER,
            f"this tokenizer has no {name}: infilling needs Code Llama 7B, 13B or 70B, base or instruct (not 34B, not Python)",
        )
    return token_id
