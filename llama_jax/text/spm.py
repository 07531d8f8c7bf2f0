"""SentencePiece BPE: the tokenizer of Llama 1, Llama 2 and Code Llama.

The proto is read and adjusted before SentencePiece gets it: tokens that a fine-tune added (added_tokens.json,
tokenizer_config.json) are appended, and pieces that steer the model but are spelled like text become CONTROL pieces, so that
no user text can produce them. Code Llama's infilling pieces are the important case: as released, text can merge into them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import MARKER, ByteStream, Tokenizer

SPACE = "▁"
INFILL_PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type


class SentencePieceTokenizer(Tokenizer):
    """Ids as SentencePiece gives them.

    Args:
        proto: a serialized sentencepiece ModelProto.
        added: control tokens beyond the model's own pieces: text -> id.
        eos: text of the token that ends a text, when it is not the model's `</s>`.
        stop_ids: what else ends a generation.
        adds_bos: whether plain text gets a BOS; None: when there is one.
        prefix_every_part: a template's text gets SentencePiece's leading space after every control token (Hugging Face's
            "legacy" behaviour, and Meta's, who encodes each turn by itself) and not at the very start only.
    """

    def __init__(
        self,
        proto: bytes,
        *,
        added: Mapping[str, int] | None = None,
        eos: str = "",
        stop_ids: Iterable[int] = (),
        adds_bos: bool | None = None,
        prefix_every_part: bool = True,
        chat_template: str | None = None,
        files: Sequence[Path] = (),
    ):
        import sentencepiece

        model = read_proto(proto)
        _append(model, added or {})
        _protect(model)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (RuntimeError, ValueError) as e:
            raise LlamaError(ExitCode.BAD_TOKENIZER, f"SentencePiece refuses this tokenizer.model: {e}") from e
        self.source_proto, self.proto = proto, model  # as it came, and as it is used
        self.vocab_size = len(model.pieces)
        self.special_tokens = {p.piece: i for i, p in enumerate(model.pieces) if p.type == CONTROL}
        self.special_ids = frozenset(self.special_tokens.values())
        self.bos_id = _id_or_none(self.processor.bos_id())
        self.eos_id = self.special_tokens.get(eos, _id_or_none(self.processor.eos_id()))
        own = () if self.eos_id is None else (self.eos_id,)
        self.stop_ids = tuple(dict.fromkeys([*own, *(i for i in stop_ids if 0 <= i < self.vocab_size)]))
        self.adds_bos = self.bos_id is not None and adds_bos is not False
        self.chat_template = chat_template
        self._prefix_every_part = prefix_every_part
        self._files = tuple(files)
        self._table = [_decoded(p, model.trainer_spec.unk_surface) for p in model.pieces]
        self._strips_space = model.normalizer_spec.add_dummy_prefix

    def __getstate__(self) -> dict[str, Any]:  # the message's class, which sentencepiece makes, cannot be pickled
        return self.__dict__ | {"proto": self.proto.SerializeToString()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"proto": read_proto(state["proto"])}

    def token_id(self, name: str) -> int | None:
        """As everywhere; Code Llama's pieces also go by the names without their leading space, `<PRE>`."""
        return self.special_tokens.get(name, self.special_tokens.get(SPACE + name))

    def stream(self, *, skip_special: bool = True, continued: bool = False) -> ByteStream:
        def pieces(ids: Sequence[int]) -> Iterable[bytes | str]:
            for i in self.check_ids(ids):
                special = i in self.special_ids
                yield "" if special and skip_special else self._table[i]

        return ByteStream(pieces, strip_space=self._strips_space and not continued, replace_each_byte=True)

    def _encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def _encode_continued(self, text: str) -> list[int]:
        # "☺" takes the leading space upon itself, and no piece holds it together with another character
        return self.processor.encode("☺" + text)[len(self.processor.encode("☺")) :]

    def _encode_template_text(self, text: str, at_start: bool) -> list[int]:
        return self._encode(text) if at_start or self._prefix_every_part else self._encode_continued(text)


def read_proto(data: bytes):
    """The ModelProto in the bytes of a tokenizer.model."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as e:
        raise LlamaError(ExitCode.BAD_TOKENIZER, "the file is not a complete SentencePiece model: download it again") from e
    if not model.pieces:
        raise LlamaError(ExitCode.BAD_TOKENIZER, "the SentencePiece model holds no pieces: download it again")
    return model


def _append(model, added: Mapping[str, int]) -> None:
    """Adds control tokens at their ids; ids that nobody names become unused control pieces."""
    by_id = {i: text for text, i in added.items()}
    if by_id and max(by_id) > len(model.pieces) + 100_000:
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"an added token has id {max(by_id)}, the model {len(model.pieces)} pieces")
    for i in range(len(model.pieces), max(by_id, default=-1) + 1):
        model.pieces.add(piece=by_id.get(i, f"<unused_{i}>"), score=0.0, type=CONTROL)
    for i, text in by_id.items():
        if model.pieces[i].piece == text and model.pieces[i].type in (NORMAL, USER_DEFINED):
            model.pieces[i].type = CONTROL


def _protect(model) -> None:
    """Makes control pieces of the pieces that steer the model."""
    infill = re.compile(r"[▁]?<(P(RE?)?|S(UF?)?|M(ID?)?|E(OT?)?|PRE>|SUF>|MID>|EOT>|FILL_ME>|step>|(▁?<?EOT>)+)")
    first = len(model.pieces)
    while first and infill.fullmatch(model.pieces[first - 1].piece):
        first -= 1
    appended = model.pieces[first:]  # Code Llama's block: the four markers, what merges towards them, repetitions
    for piece in appended if set(INFILL_PIECES) <= {p.piece for p in appended} else ():
        piece.type = CONTROL
    for piece in model.pieces:
        if piece.piece == "<step>" or (piece.type == USER_DEFINED and MARKER.fullmatch(piece.piece)):
            piece.type = CONTROL


def _decoded(piece, unk_surface: str) -> bytes | str:
    if piece.type == BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    if piece.type == UNKNOWN:
        return unk_surface.encode()  # as bytes: its leading space is not the dummy prefix
    return piece.piece.replace(SPACE, " ")


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None
