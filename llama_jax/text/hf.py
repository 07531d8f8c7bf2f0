"""Hugging Face's tokenizer.json, run by the `tokenizers` library.

The library's own parsing of control tokens is switched off for user text. Added tokens that look like `<|...|>` count as
control tokens even where a fine-tune forgot to mark them special.
"""

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import MARKER, Tokenizer, valid_text
from llama_jax.text.settings import Settings, components

DECODERS = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "ByteLevel"}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class HuggingFaceTokenizer(Tokenizer):
    """Ids as the `tokenizers` library gives them for a Llama-like tokenizer.json (ByteLevel, or SentencePiece's decoder)."""

    def __init__(self, data: bytes, settings: Settings):
        spec = _parse(data)
        self._spec = spec
        for token in spec["added_tokens"]:
            if MARKER.fullmatch(token["content"]) or token["content"] in (settings.bos, settings.eos):
                token["special"] = True
        self._user = _build(spec, parse_special=False)
        self._lazy: dict[str, Any] = {}
        vocab = self._user.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.special_tokens = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        unknown = spec["model"].get("unk_token")
        self.special_ids = frozenset(i for name, i in self.special_tokens.items() if name != unknown)
        self.bos_id = self._first(settings.bos, "<s>", "<|begin_of_text|>")
        self.eos_id = self._first(settings.eos, "</s>", "<|end_of_text|>")
        own = () if self.eos_id is None else (self.eos_id,)
        named = (self.special_tokens[name] for name in LLAMA3_STOPS if name in self.special_tokens)
        self.stop_ids = tuple(dict.fromkeys([*own, *(i for i in settings.stop_ids if i < self.vocab_size), *named]))
        self.adds_bos = self._adds_bos() if settings.add_bos is None else settings.add_bos and self.bos_id is not None
        self.chat_template = settings.chat_template
        self._files = settings.files
        decoders = {node["type"] for node in components(spec["decoder"])}
        self._byte_ids = frozenset(i for t, i in vocab.items() if "ByteFallback" in decoders and BYTE_TOKEN.fullmatch(t))
        self._prefix_every_part = not any(n["type"] == "Metaspace" for n in components(spec["pre_tokenizer"]))

    def __getstate__(self) -> dict[str, Any]:  # a pickled `tokenizers.Tokenizer` forgets whether it parses control tokens
        return {name: value for name, value in self.__dict__.items() if name not in ("_user", "_lazy")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_user": _build(state["_spec"], parse_special=False), "_lazy": {}}

    def stream(self, *, skip_special: bool = True, continued: bool = False) -> "ChunkStream":
        return ChunkStream(self, skip_special, continued)

    def encode_template(self, text: str, escape: str = "") -> list[int]:
        text = valid_text(text)
        plain = text.replace(escape, "") if escape else text
        trusted = [(m.start() - text.count(escape, 0, m.start()), m[0]) for m in self.special_pattern(escape).finditer(text)]
        if trusted == [(m.start(), m[0]) for m in self.special_pattern("").finditer(plain)]:
            return self._variant("template").encode(plain, add_special_tokens=False).ids
        return super().encode_template(text, escape)  # some of the text only looks like a control token

    def _encode(self, text: str) -> list[int]:
        return self._checked(self._user.encode(text, add_special_tokens=False).ids)

    def _encode_continued(self, text: str) -> list[int]:
        return self._checked(self._variant("continued").encode(text, add_special_tokens=False).ids)

    def _encode_template_text(self, text: str, at_start: bool) -> list[int]:
        return self._encode(text) if at_start or self._prefix_every_part else self._encode_continued(text)

    def decode_chunk(self, ids: Sequence[int], continued: bool) -> str:
        """The library's decode; continued keeps the leading space."""
        return (self._variant("continued") if continued else self._user).decode(ids, skip_special_tokens=False)

    def holds_bytes(self, token_id: int) -> bool:
        """Whether the id is one of the <0xNN> pieces, of which only a whole run has a text."""
        return token_id in self._byte_ids

    def _variant(self, kind: str):
        if kind not in self._lazy:
            spec = _continued(self._spec) if kind == "continued" else self._spec
            self._lazy[kind] = _build(spec, parse_special=kind == "template")
        return self._lazy[kind]

    def _checked(self, ids: list[int]) -> list[int]:
        if not self.special_ids.isdisjoint(ids):  # a model whose merges lead to a control token
            token = next(i for i in ids if i in self.special_ids)
            name = self._user.id_to_token(token)
            raise LlamaError(ExitCode.BAD_REQUEST, f"the text spells the control token {name!r}: take it out of the text")
        return ids

    def _first(self, *names: str) -> int | None:
        return next((self.special_tokens[name] for name in names if name in self.special_tokens), None)

    def _adds_bos(self) -> bool:
        return self.bos_id is not None and self._user.encode("a").ids[:1] == [self.bos_id]


class ChunkStream:
    """StreamDecoder over the library's decode, which only knows whole lists.

    Ids wait in a chunk until its text is certain: a run of <0xNN> pieces until it ends, a final U+FFFD (perhaps half a
    character) until the next id. A later chunk is decoded as a continuation, so nothing is decoded twice.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, skip_special: bool, continued: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._continued = continued
        self._chunk: list[int] = []
        self._emitted = 0  # characters of the chunk's text already returned

    def push(self, ids: Sequence[int]) -> str:
        self._chunk += [i for i in self._tokenizer.check_ids(ids) if i not in self._skip]
        ready = len(self._chunk)
        while ready and self._tokenizer.holds_bytes(self._chunk[ready - 1]):
            ready -= 1
        text = self._tokenizer.decode_chunk(self._chunk[:ready], self._continued)
        certain = text.removesuffix("\ufffd")
        new, self._emitted = certain[self._emitted :], len(certain)
        if text and certain == text:
            self._chunk, self._emitted, self._continued = self._chunk[ready:], 0, True
        return new

    def finish(self) -> str:
        text = self._tokenizer.decode_chunk(self._chunk, self._continued)[self._emitted :]
        self._chunk, self._emitted = [], 0
        return text


def _parse(data: bytes) -> dict[str, Any]:
    try:
        spec = json.loads(data)
    except ValueError as e:
        raise _bad(f"is not JSON ({e}): download it again") from e
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise _bad("has no model in it: give the file named tokenizer.json, not one of the configurations beside it")
    spec["truncation"] = spec["padding"] = None
    spec.setdefault("pre_tokenizer", None)
    spec["added_tokens"] = spec.get("added_tokens") or []
    for token in spec["added_tokens"]:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not isinstance(token.get("id"), int):
            raise _bad(f"has an added token without content and id: {str(token)[:80]}")
        token.setdefault("special", False)
    decoders = {node["type"] for node in components(spec.get("decoder"))}
    if not decoders or not decoders <= DECODERS:
        raise _bad(f"has decoder {sorted(decoders - DECODERS) or None}; Llama's is ByteLevel, or ByteFallback or Metaspace")
    return spec


def _build(spec: dict[str, Any], parse_special: bool):
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as e:  # the library raises bare Exception
        raise _bad(f"is refused by the tokenizers library: {e}") from e
    tokenizer.encode_special_tokens = not parse_special
    for token in spec["added_tokens"]:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise _bad(f"gives {token['content']!r} id {token['id']}, which its vocabulary does not leave free")
    return tokenizer


def _continued(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that follows other text: no leading space added, none taken away."""
    spec = copy.deepcopy({key: value for key, value in spec.items() if key != "model"}) | {"model": spec["model"]}
    if isinstance(spec.get("normalizer"), dict) and spec["normalizer"]["type"] == "Prepend":
        spec["normalizer"] = None
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for node in components(spec.get(part)):
            if "normalizers" in node:
                node["normalizers"] = [n for n in node["normalizers"] if n.get("type") != "Prepend"]
            if node["type"] == "Metaspace":
                node.pop("add_prefix_space", None)
                node["prepend_scheme"] = "never"
            if node["type"] == "ByteLevel" and part == "pre_tokenizer":
                node["add_prefix_space"] = False
            if node["type"] == "Strip" and part == "decoder":
                node["start"] = 0
    return spec


def _bad(what: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_TOKENIZER, f"tokenizer.json {what}")
