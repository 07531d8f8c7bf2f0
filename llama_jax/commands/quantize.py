"""Weights -> a checkpoint of ours whose projections and head are stored in fewer bits."""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from etils import epath

from llama_jax.checkpoint.calibrate import rows_of
from llama_jax.checkpoint.hashing import hashing
from llama_jax.checkpoint.layout import Source
from llama_jax.checkpoint.quantized import check_method, innermost, stored_bytes
from llama_jax.checkpoint.save_quantized import save_quantized
from llama_jax.checkpoint.store import DTYPES, Checkpoint
from llama_jax.choices import METHODS
from llama_jax.distributed import note
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.load import chat_format_of_weights, compute_dtype, open_weights, tokenizer_of
from llama_jax.ops.gptq import METHODS_FOR
from llama_jax.progress import progress_bar
from llama_jax.text.tokenizer import FILE_NAMES

MIN_TOKENS = 32  # of a text to calibrate with


def quantize(
    checkpoint: epath.PathLike,
    output: epath.PathLike,
    method: str,
    *,
    adapter: epath.PathLike = "",
    dtype: str = "auto",
    calibrate: str | Path = "",
    overwrite: bool = False,
    command: str = "llama_jax.quantize.quantize",
) -> Checkpoint:
    """Rounds weights and stores them; says on stderr what it wrote.

    Args:
        checkpoint, adapter, dtype: as for `llama_jax.load`. Weights are rounded from the dtype, and the others stored in it.
        output: the directory to make; a complete checkpoint there stays unless `overwrite`.
        method: a key of llama_jax.choices.METHODS.
        calibrate: a file of text that int8 or int4 weights are rounded for (llama_jax.checkpoint.calibrate).

    Raises:
        LlamaError: what is wrong with the weights or the output, where nothing is left then.
    """
    if method not in METHODS:
        raise LlamaError(ExitCode.BAD_REQUEST, f"method is {method!r}, expected one of {', '.join(METHODS)}")
    opened = open_weights(checkpoint, adapter)
    _check(opened, output, method)
    rows = _rows(opened, Path(calibrate), method) if calibrate else None
    files, chat_format = _text(opened)
    made = Checkpoint(
        path=epath.Path(output),
        config=opened.config,
        dtype=DTYPES[compute_dtype(opened, dtype)],
        chat_format=chat_format,
        tokenizer=tuple(file.name for file in files),
        source={"kind": opened.kind, "path": str(opened.path.absolute())} if isinstance(opened, Source) else opened.source,
        command=command,
        quantize=method,
    )
    total, start = stored_bytes(made), time.monotonic()
    with (
        hashing(opened.files if isinstance(opened, Source) else ()) as hashes,
        progress_bar(total, "quantising", unit="B", unit_scale=True) as bar,
    ):

        def finish(written: Checkpoint) -> Checkpoint:
            found = {"files": hashes.result()} if isinstance(opened, Source) else {}
            return dataclasses.replace(written, source={**written.source, **found})

        made = save_quantized(
            made,
            opened,
            rows=rows,
            tokenizer_files=files,
            overwrite=overwrite,
            written=lambda name, nbytes: bar.update(nbytes),
            finish=finish,
        )
    floats = made.config.num_params * made.dtype.itemsize
    print(
        f"wrote {output}: {made.config.num_params:,} parameters, {method}, {total:,} bytes, {total / floats:.0%} of "
        f"{made.dtype}'s, in {time.monotonic() - start:.1f} s",
        file=sys.stderr,
    )
    return made


def _check(opened: Checkpoint | Source, output: epath.PathLike, method: str) -> None:
    """Refuses weights that are rounded already, and an output that would take the place of what is being read."""
    check_method(opened, method)
    if isinstance(opened, Checkpoint) and opened.quantize:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{opened.path} holds {method} weights already: load or copy it as it is")
    read = (opened.path, innermost(opened).path)
    if any(epath.Path(output).resolve() == epath.Path(path).resolve() for path in read):
        raise LlamaError(ExitCode.OUTPUT_EXISTS, f"{output} is what would be read: give another --output")


def _rows(opened: Checkpoint | Source, file: Path, method: str) -> np.ndarray:
    """The tokens of a file of text, in rows."""
    if method not in METHODS_FOR:
        raise LlamaError(ExitCode.BAD_REQUEST, f"--calibrate is for {' and '.join(METHODS_FOR)}, and the method is {method}")
    tokenizer = tokenizer_of(opened)
    if tokenizer is None:
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"{opened.path} has no tokenizer, and --calibrate needs one")
    try:
        tokens = tokenizer.encode(file.read_text(encoding="utf-8"), bos=tokenizer.bos_id is not None)
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaError(ExitCode.NO_DATA, f"--calibrate: {file} cannot be read as text ({error})") from None
    if len(tokens) < MIN_TOKENS:
        raise LlamaError(
            ExitCode.NO_DATA,
            f"--calibrate: {file} has {len(tokens)} tokens, expected at least {MIN_TOKENS}: give a longer text",
        )
    rows = rows_of(tokens, opened.config)
    note(f"calibrating on {rows.size:,} of {len(tokens):,} tokens of {file}, in rows of {rows.shape[1]:,}")
    return rows


def _text(opened: Checkpoint | Source) -> tuple[list[epath.Path], str]:
    """The files that describe the weights' text, and the chat format."""
    if isinstance(opened, Checkpoint):
        return [opened.path / name for name in opened.tokenizer], opened.chat_format
    tokenizer = tokenizer_of(opened)
    if tokenizer is None:
        note(
            "warning: no tokenizer beside the weights: the checkpoint will have none, and programs need --config.tokenizer=FILE"
        )
        return [], chat_format_of_weights(opened, None)
    side = [file for file in opened.tokenizer if file.name not in FILE_NAMES]  # generation_config.json and the like
    files = {file.name: file for file in (*side, *tokenizer.files())}
    return list(map(epath.Path, files.values())), chat_format_of_weights(opened, tokenizer)
