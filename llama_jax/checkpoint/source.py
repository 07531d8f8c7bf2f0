"""Opens somebody else's checkpoint, whatever its format: recognised by what lies in the folder or file, never by a flag."""

from pathlib import Path

from llama_jax.checkpoint import huggingface, llama2c, meta
from llama_jax.checkpoint.files import fail, refuse_pointer
from llama_jax.checkpoint.layout import Source
from llama_jax.checkpoint.torch_zip import is_torch
from llama_jax.errors import ExitCode, LlamaError

__all__ = ["Source", "open_source"]

LOOKED_FOR = (
    "model.safetensors or pytorch_model.bin (or their shards) with config.json, consolidated.*.pth with params.json, "
    "or a .bin file of llama2.c"
)


def open_source(path: str | Path, *, max_length: int | None = None) -> Source:
    """Opens a checkpoint of Meta's, Hugging Face's or llama2.c's for reading; no weight is read yet.

    Args:
        path: a folder, or a file of llama2.c.
        max_length: overrides the context that the source states.

    Raises:
        LlamaError: what is wrong, with which file or tensor, and what to do; its code is the cause.
    """
    path = Path(path)
    try:
        if not path.exists():
            fail(ExitCode.NO_WEIGHTS, f"{path} does not exist: give a folder with {LOOKED_FOR}")
        return _open_folder(path, max_length) if path.is_dir() else _open_file(path, max_length)
    except OSError as e:  # a folder that may not be listed, a file that vanished
        raise LlamaError(ExitCode.NO_WEIGHTS, f"{path} cannot be read: {e.strerror or e}") from e


def _open_folder(folder: Path, max_length: int | None) -> Source:
    if huggingface.formats(folder):
        source = huggingface.open_huggingface(folder, max_length=max_length)
        if any(meta.SHARD.fullmatch(p.name) or p.name == "consolidated.pth" for p in folder.iterdir()):
            note = f"{folder} holds the weights of Hugging Face and of Meta: those of Hugging Face are used"
            source = source.noted(note)
        return source
    if meta.shard_paths(folder):
        return meta.open_meta(folder, max_length=max_length)
    found = [p for p in sorted(folder.glob("*.bin")) if p.is_file() and _is_llama2c(p)]
    if len(found) > 1:
        fail(
            ExitCode.NO_WEIGHTS,
            f"{folder} holds several models ({', '.join(p.name for p in found[:4])}): give one of the files",
        )
    if found:
        return llama2c.open_llama2c(found[0], max_length=max_length)
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and _holds_weights(p))
    hint = f"; {inner[0]} holds some: give that folder" if inner else ""
    fail(ExitCode.NO_WEIGHTS, f"{folder} holds no weights; looked for {LOOKED_FOR}{hint}")


def _open_file(path: Path, max_length: int | None) -> Source:
    head = _head(path)
    if is_torch(head) or head[8:9] == b"{":
        fail(ExitCode.NO_WEIGHTS, f"{path} is one file of a checkpoint: give its folder, {path.parent}")
    return llama2c.open_llama2c(path, max_length=max_length)


def _head(path: Path) -> bytes:
    with open(refuse_pointer(path), "rb") as file:
        return file.read(llama2c.HEADER)


def _is_llama2c(path: Path) -> bool:
    """Whether a .bin file may be a model: a tokenizer.bin begins with a small number and a score."""
    return path.name != "tokenizer.bin" and llama2c.parse_header(_head(path)) is not None


def _holds_weights(folder: Path) -> bool:
    try:
        return bool(huggingface.formats(folder) or any(meta.SHARD.fullmatch(p.name) for p in folder.iterdir()))
    except OSError:
        return False
