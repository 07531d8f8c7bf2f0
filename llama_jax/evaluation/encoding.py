"""Text to token ids as lm-eval's Hugging Face backend does it, and chat templates as text."""

import datetime
from collections.abc import Mapping, Sequence

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.llama import Llama
from llama_jax.text.base import Tokenizer
from llama_jax.text.templates import CHAT_TEMPLATES, render


def encode(tokenizer: Tokenizer, text: str, bos: bool | None = None, *, repeat_bos: bool = False) -> list[int]:
    """Ids of a text in which the text of a control token is that token, as chat templates need it.

    Args:
        bos: whether BOS goes before it; None: as the tokenizer does it for plain text.
        repeat_bos: also before a text that begins with one.
    """
    ids = tokenizer.encode_template(text)
    wanted = tokenizer.adds_bos if bos is None else bos
    if not wanted or tokenizer.bos_id is None or (ids[:1] == [tokenizer.bos_id] and not repeat_bos):
        return ids
    return [tokenizer.bos_id, *ids]


def template_of(llama: Llama) -> str:
    """The Jinja source of the model's chat format.

    Raises:
        LlamaError: it is a base model.
    """
    template = CHAT_TEMPLATES.get(llama.chat_format) or (llama.tokenizer.chat_template if llama.chat_format else "")
    if not template:
        raise LlamaError(
            ExitCode.BAD_REQUEST, "this is a base model, it knows no conversations: leave out --apply_chat_template"
        )
    return template


def render_chat(llama: Llama, messages: Sequence[Mapping[str, str]], *, opened: bool, now: datetime.datetime) -> str:
    """A conversation as text, open for an answer, or for the rest of its last message.

    Args:
        opened: false: the last message is the beginning of the answer, which goes on where it ends.
        now: the date that a template may write.
    """
    texts = {token_id: text for text, token_id in llama.tokenizer.special_tokens.items()}
    tokens = {"bos_token": texts.get(llama.tokenizer.bos_id, ""), "eos_token": texts.get(llama.tokenizer.eos_id, "")}
    text = render(template_of(llama), messages, tokens, now, opened=opened)
    if opened:
        return text
    begun = messages[-1]["content"].strip()
    return text[: text.rindex(begun) + len(begun)]
