"""A checkpoint of ours -> files that Hugging Face's transformers loads unchanged; an adapter -> files that its peft loads."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.adapter import reader, stored_adapter
from llama_jax.checkpoint.huggingface_writer import SHARD_BYTES, write_huggingface
from llama_jax.checkpoint.peft import write_peft
from llama_jax.checkpoint.quantized import stored_method
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.config_files import to_huggingface
from llama_jax.distributed import note
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.progress import progress_bar
from llama_jax.text.chat import stop_ids
from llama_jax.text.hf_export import write_tokenizer
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer


def export(checkpoint: Checkpoint, output: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the Hugging Face folder; one tensor is in memory at a time.

    Raises:
        LlamaError: the output exists and is not empty. Whatever was begun is removed, on any error.
    """
    if method := stored_method(checkpoint):
        note(f"note: the {method} weights are written as the floats that they stand for, in {checkpoint.dtype}")
    with _new(output) as folder:
        _write_weights(checkpoint, folder, shard_bytes)
        tokenizer = _write_tokenizer(checkpoint, folder)
        _write_generation_config(checkpoint, tokenizer, folder)
        ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id) if tokenizer else {}
        _write_json(folder / "config.json", to_huggingface(checkpoint.config) | {"torch_dtype": checkpoint.dtype.name} | ids)


def export_adapter(checkpoint: Checkpoint, output: str | Path, base_model: str = "") -> None:
    """Writes a LoRA run's adapter as a folder of PEFT's.

    Args:
        base_model: name or folder by which transformers finds the base; the one it was trained on when that was Hugging Face's.

    Raises:
        LlamaError: as for `export`.
    """
    weights = stored_adapter(checkpoint)
    recorded = checkpoint.adapter["base"]
    base_model = base_model or (recorded if (Path(recorded) / "config.json").exists() else "")
    with _new(output) as folder:
        write_peft(folder, checkpoint.config, weights, base_model)
        _write_tokenizer(checkpoint, folder)


@contextlib.contextmanager
def _new(output: str | Path) -> Iterator[Path]:
    """A directory to write into; removed again, with what was begun, on any error."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LlamaError(ExitCode.OUTPUT_EXISTS, f"{output} exists and is not empty: give the name of a new or empty directory")
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield output
    except BaseException:
        shutil.rmtree(output)
        raise


def _write_tokenizer(checkpoint: Checkpoint, output: Path) -> Tokenizer | None:
    if not checkpoint.tokenizer:
        return None
    tokenizer = load_tokenizer(Path(checkpoint.path))
    write_tokenizer(tokenizer, output, chat_format=checkpoint.chat_format, max_length=checkpoint.config.max_length)
    return tokenizer


def _write_weights(checkpoint: Checkpoint, output: Path, shard_bytes: int) -> None:
    stored, total = reader(checkpoint), checkpoint.config.num_params * checkpoint.dtype.itemsize
    with progress_bar(total, "exporting", unit="B", unit_scale=True) as bar:

        def read(name: str) -> np.ndarray:
            array = stored(name).read().astype(checkpoint.dtype, copy=False)
            bar.update(array.nbytes)
            return array

        write_huggingface(output, checkpoint.config, checkpoint.dtype, read, shard_bytes)


def _write_generation_config(checkpoint: Checkpoint, tokenizer: Tokenizer | None, output: Path) -> None:
    """The source's own, when the checkpoint has it; otherwise ids, and Meta's sampling for chat models."""
    own = checkpoint.path / "generation_config.json"
    if own.exists():
        (output / own.name).write_bytes(own.read_bytes())
        return
    config: dict[str, Any] = {"_from_model_config": True}
    if tokenizer:
        stops = list(stop_ids(tokenizer, checkpoint.chat_format))
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    if checkpoint.chat_format:
        config |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    _write_json(output / "generation_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
