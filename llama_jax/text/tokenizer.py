"""Finds a tokenizer and tells by its content which kind it is."""

import hashlib
import re
from pathlib import Path

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import StreamDecoder, Tokenizer
from llama_jax.text.llama2c import llama2c_to_proto
from llama_jax.text.settings import Settings, as_path, components, read_json, read_settings

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]

FILE_NAMES = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")
MAX_BYTES = 1 << 28  # the largest Llama tokenizer.json is 17 MB


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (our checkpoint, Meta's, Hugging Face's, llama2.c's) or of a file.

    Where a folder has both tokenizer.model and tokenizer.json, Meta's tokenizer.model is the truth, unless the JSON files add
    tokens beyond it. Meta keeps the tokenizer beside the folders of the models, so there we look one folder up as well.
    """
    path = as_path(path)
    if not path.exists():
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"no tokenizer at {path}: there is no such file or folder")
    return _load_file(_choose_file(path) if path.is_dir() else path)


def _choose_file(folder: Path) -> Path:
    found = _tokenizer_files(folder)
    if not found and (folder / "params.json").exists():
        found = _tokenizer_files(folder.parent)
    if not found:
        raise LlamaError(
            ExitCode.BAD_TOKENIZER, f"no tokenizer in {folder}: expected one of {', '.join(FILE_NAMES)}; name its file instead"
        )
    both = [f.name for f in found[:2]] == ["tokenizer.model", "tokenizer.json"]
    return found[1] if both and _adds_tokens(found[0], found[1]) else found[0]


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in FILE_NAMES if (folder / name).exists()]


def _adds_tokens(model: Path, json_file: Path) -> bool:
    size = _load_file(model, alone=True).vocab_size
    spec = read_json(json_file)
    added, model_spec = spec.get("added_tokens"), spec.get("model")
    vocab = model_spec.get("vocab") if isinstance(model_spec, dict) else None
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids += [*(vocab.values() if isinstance(vocab, dict) else ()), *read_settings(json_file).added.values()]
    return any(isinstance(i, int) and i >= size for i in ids)


def _load_file(path: Path, alone: bool = False) -> Tokenizer:
    """The tokenizer in one file; alone: without what the files beside it say."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"cannot read the tokenizer {path}: {e.strerror}") from e
    if len(data) > MAX_BYTES:
        raise LlamaError(
            ExitCode.BAD_TOKENIZER, f"{path} is larger than any tokenizer ({MAX_BYTES:,} bytes): are these weights?"
        )
    settings = Settings(files=(path,)) if alone else read_settings(path)
    try:
        tokenizer = _from_bytes(data, settings, alone)
    except LlamaError as e:
        raise LlamaError(e.code, f"{path}: {e}") from e
    contents = sorted(hashlib.sha256(file.read_bytes()).digest() for file in tokenizer.files())
    tokenizer.fingerprint = hashlib.sha256(b"".join(contents)).hexdigest()
    return tokenizer


def _from_bytes(data: bytes, settings: Settings, alone: bool) -> Tokenizer:
    if data.startswith(b"version https://git-lfs"):
        raise LlamaError(ExitCode.LFS_POINTER, "a git-lfs pointer, not the tokenizer: run `git lfs pull` in its repository")
    if not data.strip():
        raise LlamaError(ExitCode.BAD_TOKENIZER, "the file is empty: download it again")
    if data.lstrip()[:1] == b"{":
        from llama_jax.text.hf import HuggingFaceTokenizer

        return HuggingFaceTokenizer(data, settings)
    if RANK_LINE.match(data):
        from llama_jax.text.ranks import RankTokenizer

        return RankTokenizer(data, chat_template=settings.chat_template, files=settings.files)
    if data[:1] == b"\n":  # field 1 of the proto, its first piece
        return _sentencepiece(data, settings, alone)
    if data[8:17] == b"\x05\x00\x00\x00<unk>":
        return _sentencepiece(llama2c_to_proto(data), settings, alone)
    if data.lstrip()[:1] == b"<":
        raise LlamaError(ExitCode.BAD_TOKENIZER, "a web page, not the tokenizer: log in where you download it, and try again")
    raise LlamaError(
        ExitCode.BAD_TOKENIZER,
        "not a tokenizer we know: expected SentencePiece's tokenizer.model, Llama 3's tokenizer.model (lines of base64 and "
        "rank), tokenizer.json or llama2.c's tokenizer.bin",
    )


def _sentencepiece(proto: bytes, settings: Settings, alone: bool) -> Tokenizer:
    from llama_jax.text.spm import SentencePieceTokenizer

    json_file = settings.files[0].parent / "tokenizer.json"
    if alone or not json_file.exists():
        prefix_every_part, files = settings.legacy, settings.files
    else:  # how its twin treats the text of a template
        spec = read_json(json_file)
        nodes = [*components(spec.get("normalizer")), *components(spec.get("pre_tokenizer"))]
        prefix_every_part = any(n["type"] == "Prepend" or n.get("prepend_scheme") == "always" for n in nodes)
        files = (*settings.files, json_file)
    return SentencePieceTokenizer(
        proto,
        added=settings.added,
        eos=settings.eos,
        stop_ids=settings.stop_ids,
        adds_bos=settings.add_bos,
        prefix_every_part=prefix_every_part,
        chat_template=settings.chat_template,
        files=files,
    )
