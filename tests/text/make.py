"""Small tokenizers of every kind, made on the spot.

small_sentencepiece(path)   tokenizer.model: a trained SentencePiece BPE with byte fallback, set up like Llama 2's
small_ranks(path)           tokenizer.model: Llama 3's rank file, the 256 bytes and a few merges
small_tokenizer_json(path)  tokenizer.json as the tokenizers library writes it, byte-level or SentencePiece-like
small_llama2c(path, model)  tokenizer.bin that llama2.c would make of a tokenizer.model
"""

import base64
import itertools
import json
import struct
from pathlib import Path

BYTE_PIECES = [f"<0x{b:02X}>" for b in range(256)]
INFILL_PIECES = [
    *("▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    *("▁<EOT><EOT>", "▁<EOT><EOT><EOT>", "▁<EOT><EOT><EOT><EOT>", "<EOT>", "<EOT><EOT>"),
]
TRAINING_TEXT = [
    f"{who} {what} the {adjective} {thing}{end}"
    for who, what, adjective, thing, end in itertools.product(
        ("The child", "She", "A small dog", "Nobody", "def"),
        ("found", "looked at", "said hello to", "returned  to"),
        ("red", "old", "quiet", "happy"),
        ("house", "river", "story", "café"),
        (".", "!\n", ", and smiled.", " (1234)  :\n    return x\n"),
    )
]


def small_sentencepiece(path: Path, vocab_size: int = 420) -> Path:
    """A tokenizer.model with Llama 2's settings: ids 0..2 <unk> <s> </s>, then the bytes, then what BPE learned."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentencepiece_length=16,
        character_coverage=1.0,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def with_pieces(proto: bytes, pieces: list[str], piece_type: int = 1) -> bytes:
    """The model with pieces appended, scored below all others; Code Llama's are INFILL_PIECES, of the normal type."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    for piece in pieces:
        model.pieces.add(piece=piece, score=-float(len(model.pieces)), type=piece_type)
    return model.SerializeToString()


def small_ranks(path: Path) -> Path:
    """256 single bytes in the order of their values and merges of common English pairs: 280 ranks, 536 ids."""
    merges = [b"he", b" t", b" the", b"in", b" a", b"ll", b"llo", b"hello", b" w", b"or", b"ld", b"orld", b" world", b"\n\n"]
    merges += [b"us", b"er", b"user", b"12", b"123", "é".encode(), "日".encode(), b"\xf0\x9f", b"\xf0\x9f\x98", b"  "]
    tokens = [*(bytes([b]) for b in range(256)), *merges]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def small_tokenizer_json(path: Path, kind: str = "bytes") -> Path:
    """A tokenizer.json whose control tokens are added tokens.

    Args:
        kind: "bytes", ByteLevel with Llama 3's control tokens; "prepend" or "metaspace", SentencePiece's pieces in the
            two ways in which Hugging Face writes them. All have a `<|tool|>` that is not marked special.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    if kind == "bytes":
        from llama_jax.text.hf_export import byte_letters
        from llama_jax.text.ranks import SPLIT_PATTERN

        letters = byte_letters()
        merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ġ", "t"), ("Ġt", "he"), (letters[0xF0], letters[0x9F]), ("Ċ", "Ċ")]
        vocab = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in merges)])}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        special = [f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")]
    else:
        merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("▁", "▁"), ("s", ">")]
        characters = ["▁", *"abcdefghijklmnopqrstuvwxyzHSI[]/<>|_.,!1\n"]
        pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *characters, *(a + b for a, b in merges)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(strip)
        special = ["<unk>", "<s>", "</s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([tokenizers.AddedToken("<|tool|>", special=False, normalized=False)])
    bos = "<|begin_of_text|>" if kind == "bytes" else "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return path


def small_llama2c(path: Path, model: Path) -> Path:
    """The tokenizer.bin of a tokenizer.model: scores and texts, spaces for ▁, line ends around <s> and </s>."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i).replace("▁", " ") for i in range(processor.get_piece_size())]
    pieces[1:3] = ["\n<s>\n", "\n</s>\n"]
    data = [struct.pack("<I", max(len(p.encode()) for p in pieces))]
    for i, piece in enumerate(pieces):
        data.append(struct.pack("<fi", processor.get_score(i), len(piece.encode())) + piece.encode())
    path.write_bytes(b"".join(data))
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
