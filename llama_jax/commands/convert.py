"""Weights of Meta, Hugging Face or llama2.c -> a checkpoint of ours."""

import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from etils import epath

from llama_jax.checkpoint.arrays import is_finite
from llama_jax.checkpoint.hashing import hashing
from llama_jax.checkpoint.lazy import LazyArray
from llama_jax.checkpoint.save import Leaf, save_checkpoint
from llama_jax.checkpoint.source import Source, open_source
from llama_jax.checkpoint.store import DTYPES, Checkpoint
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.progress import progress_bar
from llama_jax.text.chat import chat_format_of
from llama_jax.text.hf import HuggingFaceTokenizer
from llama_jax.text.spm import SentencePieceTokenizer
from llama_jax.text.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer

PADDED_ROWS = 1024  # rows an embedding may have beyond its tokenizer: Hugging Face models are padded for speed


def convert(
    source: str | Path,
    output: epath.PathLike,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    chat_format: str | None = None,
    overwrite: bool = False,
    command: str = "llama_jax.convert.convert",
) -> Checkpoint:
    """Converts a source; says on stderr what it found, assumed and wrote.

    Args:
        source: a folder of Meta's or Hugging Face's, or a .bin file of llama2.c.
        output: the directory to make; a complete checkpoint there stays unless `overwrite`.
        dtype: of the checkpoint; the source's when not given, so that nothing is lost.
        tokenizer: its file or folder, when it is not beside the weights.
        max_length: context in tokens, when the source does not say it or is wrong.
        chat_format: a name of llama_jax.text.chat.FORMATS, "" for a base model; found out when not given.

    Raises:
        LlamaError: what is wrong with the source; nothing is left at the output then.
    """
    opened = open_source(source, max_length=max_length)
    with tempfile.TemporaryDirectory() as scratch:
        text, files = _tokenizer(opened, tokenizer, Path(scratch))
        _report(opened, text)
        if chat_format is None:
            template = text.chat_template if text else None
            chat_format = chat_format_of(opened.name, template, text)
        target = np.dtype(opened.dtype) if dtype is None else DTYPES[dtype]
        leaves = {
            name: Leaf(array.shape, target, lambda name=name, array=array: _read(name, array, target))
            for name, array in opened.params.items()
        }
        total = sum(leaf.nbytes for leaf in leaves.values())
        start = time.monotonic()
        with (
            hashing(opened.files) as hashes,
            progress_bar(total, "converting", unit="B", unit_scale=True) as bar,
        ):
            checkpoint = Checkpoint(
                path=epath.Path(output),
                config=opened.config,
                dtype=target,
                chat_format=chat_format,
                tokenizer=tuple(file.name for file in files) if text else (),
                source={"kind": opened.kind, "path": str(Path(source).absolute())},
                command=command,
            )
            checkpoint = save_checkpoint(
                checkpoint,
                leaves,
                tokenizer_files=files,
                overwrite=overwrite,
                written=lambda name, nbytes: bar.update(nbytes),
                finish=lambda written: dataclasses.replace(written, source={**written.source, "files": hashes.result()}),
            )
    seconds = time.monotonic() - start
    print(
        f"wrote {output}: {opened.config.num_params:,} parameters, {target}, {total / 1e9:.2f} GB in {seconds:.1f} s "
        f"({total / 1e6 / seconds:.0f} MB/s)",
        file=sys.stderr,
    )
    return checkpoint


def _tokenizer(source: Source, given: str | Path | None, scratch: Path) -> tuple[Tokenizer | None, list[Path]]:
    """The source's tokenizer, checked against the embedding, and the files that describe its text.

    The tokenizer itself is among them as tokenizer.model or tokenizer.json, whatever its file was called.
    """
    side = [file for file in source.tokenizer if file.name not in FILE_NAMES]  # generation_config.json and the like
    if given is None and len(side) == len(source.tokenizer):
        print(
            "warning: no tokenizer beside the weights: the checkpoint will have none, and programs will need one "
            "(--tokenizer FILE here, or --config.tokenizer=FILE there)",
            file=sys.stderr,
        )
        return None, side
    path = Path(given) if given is not None else source.tokenizer[0].parent
    tokenizer = load_tokenizer(path)
    rows, tokens = source.config.vocab_size, tokenizer.vocab_size
    if tokens > rows or rows - tokens >= (PADDED_ROWS if source.kind == "Hugging Face" else 1):
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"the tokenizer {path} has {tokens:,} tokens, the embedding {rows:,} rows: they belong to different models; "
            "--tokenizer FILE names the right one",
        )
    if rows != tokens:
        print(f"the embedding has {rows - tokens} rows more than the tokenizer has tokens (padding)", file=sys.stderr)
    main, *beside = tokenizer.files()
    if isinstance(tokenizer, SentencePieceTokenizer):  # llama2.c's tokenizer.bin has become one, too
        main = scratch / "tokenizer.model"
        main.write_bytes(tokenizer.source_proto)
    else:
        name = "tokenizer.json" if isinstance(tokenizer, HuggingFaceTokenizer) else "tokenizer.model"
        main = Path(shutil.copyfile(main, scratch / name))
    files = {file.name: file for file in (*(side if given is None else ()), *beside, main)}
    return tokenizer, list(files.values())


def _report(source: Source, tokenizer: Tokenizer | None) -> None:
    config = source.config
    print(
        f"{source.kind} weights in {source.path}: {config.num_params:,} parameters, {source.dtype}, "
        f"{config.num_layers} layers, width {config.embed_dim}, "
        f"{config.num_heads} heads ({config.num_kv_heads} key/value), theta {config.rope_theta:g}, "
        f"epsilon {config.norm_eps:g}, context {config.max_length}{', tied head' if config.tied_head else ''}"
        f"{', ' + type(tokenizer).__name__ if tokenizer else ''}",
        file=sys.stderr,
    )
    for note in source.notes:
        print(note, file=sys.stderr)
    if config.norm_eps == 1e-6 and "llama2" in source.name.lower().replace("-", "").replace("_", ""):
        print(
            "warning: the source says epsilon 1e-6; Llama 2 has 1e-5 and early downloads had this wrong in params.json "
            "(meta-llama/llama#771): correct params.json and convert again",
            file=sys.stderr,
        )


def _read(name: str, array: LazyArray, dtype: np.dtype) -> np.ndarray:
    """An array of the source in memory, finite, in the checkpoint's dtype."""
    values = array.read()
    array.release()
    if not is_finite(values):
        raise LlamaError(
            ExitCode.NOT_FINITE,
            f"{name} has NaN or infinite values: the source is damaged; download it again or check its training",
        )
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not is_finite(cast):
        raise LlamaError(ExitCode.NOT_FINITE, f"{name} has values that {dtype} cannot hold: choose another --dtype")
    return cast
