"""Writes a tokenizer as the files that Hugging Face's transformers loads unchanged.

A tokenizer.json describes BPE by an ordered list of merges; SentencePiece and tiktoken only order the pieces. The list that
does the same holds, for each piece from the first to be formed to the last, every pair of pieces that makes it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import Tokenizer
from llama_jax.text.chat import CHAT_TEMPLATES
from llama_jax.text.ranks import NAMED_HF, SPLIT_PATTERN, RankTokenizer, special_names
from llama_jax.text.settings import as_path
from llama_jax.text.spm import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, SentencePieceTokenizer

Piece = TypeVar("Piece", str, bytes)


def write_tokenizer(
    tokenizer: Tokenizer, output_dir: str | Path, *, chat_format: str = "", template: str | None = None, max_length: int
) -> list[Path]:
    """Writes the tokenizer's files into output_dir and returns their paths.

    A tokenizer that came with a tokenizer.json goes out as it came, byte for byte and with every file that was read
    (generation_config.json among them); the arguments below then change nothing. For Meta's two kinds the tokenizer.json and
    the configurations are made here; Llama 2's tokenizer.model goes along.

    Args:
        chat_format: its template of ours becomes the chat template.
        template: a Jinja chat template, instead.
        max_length: context of the model in tokens, model_max_length of the configuration.
    """
    output = as_path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if any(path.name == "tokenizer.json" for path in tokenizer.files()):
        for path in tokenizer.files():
            (output / path.name).write_bytes(path.read_bytes())
        return [output / path.name for path in tokenizer.files()]
    if isinstance(tokenizer, SentencePieceTokenizer):
        spec, written = _sentencepiece_spec(tokenizer), [output / "tokenizer.model"]
        written[0].write_bytes(tokenizer.source_proto)
    elif isinstance(tokenizer, RankTokenizer):
        spec, written = _rank_spec(tokenizer), []
    else:
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"cannot write a {type(tokenizer).__name__} as tokenizer.json")
    config = _config(tokenizer, spec, chat_format, max_length)
    if chat_template := template or tokenizer.chat_template or CHAT_TEMPLATES.get(chat_format):
        config["chat_template"] = chat_template
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token") if name in config}
    for name, value in (("tokenizer.json", spec), ("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        written.append(output / name)
        written[-1].write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return written


def merges_of(pieces: Iterable[Piece], ids: Mapping[Piece, int]) -> list[tuple[Piece, Piece]]:
    """All pairs that make each piece.

    Args:
        pieces: the pieces in the order in which they are formed.
        ids: the pieces that may be part of a pair; of two pairs for one piece the one with the lower ids comes first.
    """
    merges: list[tuple[Piece, Piece]] = []
    for piece in pieces:
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += sorted((p for p in pairs if p[0] in ids and p[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]]))
    return merges


def _sentencepiece_spec(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    model = tokenizer.proto
    normalizer = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE or normalizer.precompiled_charsmap:
        raise LlamaError(
            ExitCode.BAD_TOKENIZER, "this tokenizer.model is not BPE without normalisation, as Llama's are: export it by itself"
        )
    if normalizer.remove_extra_whitespaces:
        raise LlamaError(ExitCode.BAD_TOKENIZER, "this tokenizer.model drops repeated spaces: export it by itself")
    ids = {p.piece: i for i, p in enumerate(model.pieces) if p.type == NORMAL}

    def order(piece: str) -> tuple[float, int, int]:
        # Llama 2's runs of spaces all have one score. There the leftmost pair wins, so that a run grows from its left end:
        # whatever makes a longer run goes first.
        return -model.pieces[ids[piece]].score, -len(piece) if set(piece) == {SPACE} else 0, ids[piece]

    merges = merges_of(sorted(ids, key=order), ids)
    prefix = [{"type": "Prepend", "prepend": SPACE}] if normalizer.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normalizer.add_dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return _spec(
        added=[
            _added_token(i, p.piece, special=p.type != USER_DEFINED)
            for i, p in enumerate(model.pieces)
            if p.type in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        normalizer={
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        pre_tokenizer=None,
        post_processor=_bos_processor(tokenizer),
        decoder={"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        unk_token=next(p.piece for p in model.pieces if p.type == UNKNOWN),
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=False,
        vocab={p.piece: i for i, p in enumerate(model.pieces)},
        merges=merges,
    )


def _rank_spec(tokenizer: RankTokenizer) -> dict[str, Any]:
    letters = byte_letters()
    written = {token: "".join(letters[b] for b in token) for token in tokenizer.ranks}
    names = special_names(NAMED_HF)
    return _spec(
        added=[_added_token(len(tokenizer.ranks) + i, name, special=True) for i, name in enumerate(names)],
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        post_processor=_bos_processor(tokenizer, names[0]),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        unk_token=None,
        byte_fallback=False,
        ignore_merges=True,
        vocab={written[token]: rank for token, rank in tokenizer.ranks.items()},
        merges=[(written[left], written[right]) for left, right in merges_of(tokenizer.ranks, tokenizer.ranks)],
    )


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a ByteLevel vocabulary.

    Bytes that are printable in Latin-1 stand for themselves, the others are numbered through from U+0100 (as GPT-2 did).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _spec(*, added, normalizer, pre_tokenizer, post_processor, decoder, unk_token, byte_fallback, ignore_merges, vocab, merges):
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def _added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": content, **flags}


def _bos_processor(tokenizer: Tokenizer, name: str = "<s>") -> dict[str, Any] | None:
    """Puts BOS before each text, as transformers' users expect of a Llama."""
    if not tokenizer.adds_bos:
        return None
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def _config(tokenizer: Tokenizer, spec: Mapping[str, Any], chat_format: str, max_length: int) -> dict[str, Any]:
    texts = {token["id"]: token["content"] for token in spec["added_tokens"]}
    eos = tokenizer.token_id("<|eot_id|>") if chat_format == "llama3" else tokenizer.eos_id
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": texts.get(tokenizer.bos_id),
        "eos_token": texts.get(eos),
        "unk_token": spec["model"]["unk_token"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in spec["added_tokens"]
        },
    }
    return {key: value for key, value in config.items() if value is not None}
