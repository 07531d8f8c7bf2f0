"""Hugging Face folders: config.json and safetensors or pytorch_model.bin, in one file or several with an index."""

import re
from collections.abc import Iterable
from pathlib import Path

from llama_jax.checkpoint.files import as_mapping, fail, read_json, shown
from llama_jax.checkpoint.layout import HUGGING_FACE, Source, assemble, check_names, configured, tokenizer_files, widest
from llama_jax.checkpoint.lazy import LazyArray
from llama_jax.checkpoint.safetensors_file import open_safetensors
from llama_jax.checkpoint.torch_zip import open_torch
from llama_jax.config_files import from_huggingface
from llama_jax.errors import ExitCode

FORMATS = (("model", ".safetensors", open_safetensors), ("pytorch_model", ".bin", open_torch))
IGNORED = "rotary_emb.inv_freq"  # recomputed from theta; in files of 2023
TOKENIZER = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


def formats(folder: Path) -> list[int]:
    """Which of FORMATS the folder holds, the preferred first."""
    return [i for i, (stem, suffix, _) in enumerate(FORMATS) if _whole_or_shards(folder, stem, suffix)]


def open_huggingface(folder: Path, *, max_length: int | None = None) -> Source:
    """Opens a folder of Hugging Face's; see `source.open_source`."""
    available = formats(folder)
    stem, suffix, open_file = FORMATS[available[0]]
    config_path = folder / "config.json"
    if not config_path.is_file():
        fail(ExitCode.BAD_CONFIG, f"{folder} has {stem}{suffix} and no config.json: download it, it says what the model is")
    config, notes = configured(from_huggingface, read_json(config_path), config_path, max_length=max_length)
    if len(available) > 1:
        notes.append(f"{folder} holds safetensors and pytorch_model.bin: the safetensors are used")
    index_path, weight_map = _weight_map(folder, stem, suffix)
    paths = _shards(folder, stem, suffix, weight_map)
    raw: dict[str, LazyArray] = {}
    for path in paths:
        found = {name: array for name, array in open_file(path).items() if not name.endswith(IGNORED)}
        _check_file(path, found, raw, weight_map)
        raw |= found
    check_names(raw, config, HUGGING_FACE, folder)
    config, params = assemble(config, raw, HUGGING_FACE, folder, interleaved=False)
    return Source(
        kind="Hugging Face",
        path=folder,
        config=config,
        dtype=widest(params),
        params=params,
        raw=raw,
        files=(*paths, *index_path, config_path),
        tokenizer=tokenizer_files((folder,), TOKENIZER),
        notes=tuple(notes),
    )


def _whole_or_shards(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The weight files and the index that the folder has, in order of name."""
    wanted = re.compile(rf"{stem}(-\d+-of-\d+)?{re.escape(suffix)}|{stem}{re.escape(suffix)}\.index\.json")
    return sorted(path for path in folder.iterdir() if wanted.fullmatch(path.name))


def _weight_map(folder: Path, stem: str, suffix: str) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The index file and its map from tensor to file name, or () and None when there is no index.

    Raises:
        LlamaError: BAD_CONFIG when it is no index, UNSAFE_NAME when a file name leaves the folder.
    """
    path = folder / f"{stem}{suffix}.index.json"
    if not path.is_file():
        return (), None
    table = dict(as_mapping(read_json(path).get("weight_map"), f'{path}: "weight_map"', ExitCode.BAD_CONFIG))
    for tensor, name in table.items():
        if not isinstance(name, str) or not name:
            fail(ExitCode.BAD_CONFIG, f"{path}: {shown(tensor)} lies in {shown(name)}, expected the name of a file")
        if any(c in name for c in "/\\:\0") or name in (".", ".."):
            fail(
                ExitCode.UNSAFE_NAME,
                f"{path}: {shown(tensor)} lies in {shown(name)}, expected the name of a file in the same folder",
            )
    if not table:
        fail(ExitCode.BAD_CONFIG, f"{path} names no tensor: download it again")
    return (path,), table


def _shards(folder: Path, stem: str, suffix: str, weight_map: dict[str, str] | None) -> list[Path]:
    """The files to read, in order, all there and none too many.

    Raises:
        LlamaError: MISSING_SHARD, EXTRA_SHARD.
    """
    present = {path.name for path in _whole_or_shards(folder, stem, suffix)} - {f"{stem}{suffix}.index.json"}
    named = set(weight_map.values()) if weight_map is not None else present
    source = f"{stem}{suffix}.index.json names" if weight_map is not None else f"{folder} has"
    whole = f"{stem}{suffix}"
    totals = {}
    for name in sorted(named):
        if m := re.fullmatch(rf"{stem}-(\d{{1,9}})-of-(\d{{1,9}}){re.escape(suffix)}", name):
            totals.setdefault(int(m[2]), set()).add(int(m[1]))
    if len(totals) + (whole in named) > 1:
        fail(ExitCode.EXTRA_SHARD, f"{source} files of several sets ({_few(named)}): remove those that belong to another model")
    for total, numbers in totals.items():
        gap = next((i for i in range(1, min(total, len(numbers) + 1) + 1) if i not in numbers), None)
        if gap is not None:
            fail(
                ExitCode.MISSING_SHARD,
                f"{source} {len(numbers)} of {total} files, not {stem}-{gap:05}-of-{total:05}{suffix}: download the rest",
            )
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        fail(ExitCode.MISSING_SHARD, f"{folder} lacks {_few(missing)}, which {source.split(' ')[0]} names: download it")
    if extra := sorted(present - named):
        fail(
            ExitCode.EXTRA_SHARD,
            f"{folder} has {_few(extra)}, which {source.split(' ')[0]} does not name: remove what does not belong",
        )
    return [folder / name for name in sorted(named)]


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(shown(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")


def _check_file(
    path: Path, found: dict[str, LazyArray], before: dict[str, LazyArray], weight_map: dict[str, str] | None
) -> None:
    """A file holds exactly the tensors that the index says, and none that an earlier file had."""
    for name in found:
        if name in before:
            fail(
                ExitCode.UNKNOWN_TENSOR,
                f"{path} holds {shown(name)}, which an earlier file has: one of them is of another model",
            )
    if weight_map is None:
        return
    for name in found:
        if weight_map.get(name) != path.name:
            place = f"puts it in {shown(weight_map[name])}" if name in weight_map else "does not name it"
            fail(
                ExitCode.UNKNOWN_TENSOR, f"{path} holds {shown(name)}, but the index {place}: index and files are of two models"
            )
    for name, file in weight_map.items():
        if file == path.name and name not in found and not name.endswith(IGNORED):
            fail(ExitCode.MISSING_TENSOR, f"{path} lacks {shown(name)}, which the index puts there: download both again")
