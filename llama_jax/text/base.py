"""What every tokenizer is to the rest of the library, and the streaming decoder they share.

Two rules hold for all kinds. Text that a user wrote never becomes a control token: `encode` takes `"<|eot_id|>"` for eleven
ordinary characters, and control tokens enter a prompt by id only. And a stream gives back, piece by piece, exactly what
`decode` gives for the whole, without ever cutting a character.
"""

import abc
import codecs
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llama_jax.errors import ExitCode, LlamaError

MARKER = re.compile(r"<[|｜]\S+[|｜]>")  # how control tokens are spelled when nothing else marks them


class Tokenizer(abc.ABC):
    """Strings to ids and back.

    Attributes:
        vocab_size: ids are 0..vocab_size-1.
        bos_id, eos_id: None when the tokenizer has none.
        stop_ids: what ends a generation unless a chat format says otherwise.
        special_tokens: control tokens by their text; a text that different releases give to different ids is left out.
        special_ids: all control tokens; `encode` never returns one.
        adds_bos: whether plain text is continued from a BOS (true of every released Llama; some fine-tunes have no BOS).
        chat_template: the Jinja template that came with the tokenizer, if one did.
        fingerprint: hash of its files' contents, "" for one that did not come from files.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]
    special_ids: frozenset[int]
    adds_bos: bool = True
    chat_template: str | None = None
    fingerprint: str = ""
    _files: tuple[Path, ...] = ()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of user text; special-token text in it is ordinary text."""
        ids = self._encode(valid_text(text))
        if bos:
            ids = [self._required(self.bos_id, "beginning-of-sequence"), *ids]
        return [*ids, self._required(self.eos_id, "end-of-sequence")] if eos else ids

    def encode_continued(self, text: str) -> list[int]:
        """Ids of text that follows other text: without the leading space that SentencePiece adds (Code Llama infilling)."""
        return self._encode_continued(valid_text(text))

    def encode_template(self, text: str, escape: str = "") -> list[int]:
        """Ids of trusted text, in which the text of a control token is that token.

        Args:
            text: a rendered chat template.
            escape: one character; it is removed, a control token's text may not hold it, nor begin right after it.
        """
        parts = self.special_pattern(escape).split(valid_text(text))
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special_tokens[part])
                continue
            part = part.replace(escape, "") if escape else part
            if part:
                ids += self._encode_template_text(part, at_start=i == 0)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continued: bool = False) -> str:
        """Text of ids.

        Args:
            ids: any ids of the vocabulary; bytes that are not UTF-8 become U+FFFD.
            skip_special: leave control tokens out; otherwise they appear as their text.
            continued: the ids follow other text, so SentencePiece's leading space stays.
        """
        stream = self.stream(skip_special=skip_special, continued=continued)
        return stream.push(ids) + stream.finish()

    @abc.abstractmethod
    def stream(self, *, skip_special: bool = True, continued: bool = False) -> "StreamDecoder":
        """A decoder that takes ids as they come; arguments as in `decode`."""

    def token_id(self, name: str) -> int | None:
        """Id of a control token by its text, or None."""
        return self.special_tokens.get(name)

    def files(self) -> tuple[Path, ...]:
        """The files this tokenizer was read from; a copy of them loads as an equal tokenizer."""
        return self._files

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of valid text, no control token among them."""

    def _encode_continued(self, text: str) -> list[int]:
        return self._encode(text)

    def _encode_template_text(self, text: str, at_start: bool) -> list[int]:
        return self._encode(text)

    def _required(self, token_id: int | None, name: str) -> int:
        if token_id is None:
            raise LlamaError(ExitCode.BAD_TOKENIZER, f"this tokenizer has no {name} token: call encode without it")
        return token_id

    def special_pattern(self, escape: str = "") -> re.Pattern[str]:
        """Finds the control tokens in trusted text, escaped ones left out; its one group is the token's text."""
        names = sorted(self.special_tokens, key=len, reverse=True)  # the longest of two that begin alike
        guard = f"(?<!{re.escape(escape)})" if escape else ""
        return re.compile(f"{guard}({'|'.join(map(re.escape, names))})" if names else "((?!))")

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """The ids as Python ints, all inside the vocabulary."""
        ids = [operator.index(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise LlamaError(
                    ExitCode.VOCAB_MISMATCH,
                    f"token id {i} is outside the tokenizer's 0..{self.vocab_size - 1}: the tokenizer is not the one the "
                    "model was trained with, or padding was decoded",
                )
        return ids


class StreamDecoder(Protocol):
    """Ids in, text out as soon as it is certain; the concatenation of all it returns is `decode` of all ids."""

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that no later id can change."""

    def finish(self) -> str:
        """Returns what was held back; the stream is over."""


class ByteStream:
    """StreamDecoder of tokenizers whose ids stand for bytes (joined into UTF-8) or for whole text (which ends a run of bytes).

    Args:
        pieces: list of ids -> their bytes or text, in order.
        strip_space: the first text loses one leading space (SentencePiece's dummy prefix).
        replace_each_byte: invalid UTF-8 gives one U+FFFD a byte, as in SentencePiece; otherwise one for each maximal
            prefix of a character, as in Python and tiktoken.
    """

    def __init__(
        self,
        pieces: Callable[[Sequence[int]], Iterable[bytes | str]],
        *,
        strip_space: bool = False,
        replace_each_byte: bool = False,
    ):
        self._pieces = pieces
        self._strip_space = strip_space
        self._replace_each_byte = replace_each_byte
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape" if replace_each_byte else "replace")

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(self._text, self._pieces(ids)))

    def finish(self) -> str:
        return self._text("")

    def _text(self, piece: bytes | str) -> str:
        if isinstance(piece, bytes):
            text, piece = self._utf8.decode(piece), ""
        else:
            text = self._utf8.decode(b"", final=True)
        if self._replace_each_byte:
            text = re.sub("[\udc80-\udcff]", "\ufffd", text)  # surrogateescape: one surrogate a byte
        if self._strip_space and (text or piece):
            self._strip_space = False
            piece = piece.removeprefix(" ") if not text else piece  # a space written as a byte is text and stays
        return text + piece


def valid_text(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, lone surrogates (undecodable bytes of a shell argument) U+FFFD."""
    if not isinstance(text, str):
        raise LlamaError(ExitCode.BAD_REQUEST, f"text to encode must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
