"""A record of a source -> the tokens of a document, and which of them are learnt.

| record | tokens | learnt |
|---|---|---|
| `{"text"}` | BOS text EOS | all |
| `{"prompt", "completion"}` | BOS prompt completion EOS | completion and EOS |
| `{"messages"}` | as the chat format writes them | the assistant's answers, each with the token that ends it |

A record with several of them is taken for the last one in this table that it has. Prompt and completion are encoded one by
one, as they will be when the model is asked: a space between them has to be written. A tokenizer that begins no text with a
BOS leaves it out here, too.
"""

import datetime
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_jax.data.sources import bad_record
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import Tokenizer
from llama_jax.text.chat import encode_answers

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)  # what Llama 3.1's template says where there is no clock: the same on every day


class Document(NamedTuple):
    """Attributes:
    ids: token ids.
    learnt: for each, whether it is to be predicted from those before it; the first one never can be.
    kind: "text", "completion" or "messages".
    """

    ids: list[int]
    learnt: list[bool]
    kind: str


def to_document(tokenizer: Tokenizer, record: Mapping[str, Any], chat_format: str) -> Document:
    """Tokens of a record.

    Raises:
        LlamaError: BAD_RECORD when something is wrong with this record (what, but not where: the caller knows); other codes
            when tokenizer or chat format cannot do it for any record.
    """
    try:
        if "messages" in record:
            document = _conversation(tokenizer, record["messages"], chat_format)
        elif "prompt" in record or "completion" in record:
            document = _completion(tokenizer, record)
        elif "text" in record:
            ids = tokenizer.encode(_text(record, "text"), bos=tokenizer.adds_bos, eos=True)
            document = Document(ids, [True] * len(ids), "text")
        else:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            raise bad_record(f"has the keys {keys}; expected text, or prompt and completion, or messages")
    except LlamaError as error:
        if error.code != ExitCode.BAD_REQUEST:
            raise
        raise bad_record(f"cannot be encoded: {error}") from error
    document.learnt[0] = False
    return document


def _completion(tokenizer: Tokenizer, record: Mapping[str, Any]) -> Document:
    missing = [name for name in ("prompt", "completion") if name not in record]
    if missing:
        raise bad_record(f"has no {missing[0]!r}: prompt and completion belong together")
    prompt = _text(record, "prompt", may_be_empty=True)
    ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    answer = _text(record, "completion")
    answer_ids = tokenizer.encode_continued(answer) if prompt else tokenizer.encode(answer)
    answer_ids = [*answer_ids, *tokenizer.encode("", eos=True)]
    return Document([*ids, *answer_ids], [False] * len(ids) + [True] * len(answer_ids), "completion")


def _conversation(tokenizer: Tokenizer, messages: Any, chat_format: str) -> Document:
    if not isinstance(messages, list):
        raise bad_record(f"has messages of type {type(messages).__name__}, expected a list of {{role, content}}")
    if not chat_format:
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            "there are conversations (records with messages) and no chat format: set config.data.chat_format (--chat-format), "
            "e.g. llama2",
        )
    messages = [_without_nones(message) for message in messages]
    return Document(*encode_answers(tokenizer, messages, chat_format, now=TEMPLATE_DATE), "messages")


def _text(record: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    text = record[name]
    if not isinstance(text, str):
        raise bad_record(f"has a {name!r} of type {type(text).__name__}, expected a string")
    if not may_be_empty and not text.strip():
        raise bad_record(f"has an empty {name!r}")
    return text


def _without_nones(message: Any) -> Any:
    """A column of Parquet has a value, if only None, for every key that any message has."""
    if not isinstance(message, Mapping):
        return message
    return {name: value for name, value in message.items() if value is not None}
