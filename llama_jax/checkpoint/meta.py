"""Meta's release: params.json and consolidated.NN.pth, one file per model-parallel rank, merged here without reading them.

Shapes of a 70B in 8 files, and along which axis each tensor was cut: llama-facts 3.1 (from facebookresearch/llama and
meta-llama/llama-models).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.checkpoint.files import as_mapping, fail, read_json, shown
from llama_jax.checkpoint.layout import (
    EMBEDDING,
    FINAL_NORM,
    META,
    Source,
    assemble,
    check_names,
    configured,
    flat_shape,
    leaf_of,
    names,
    tokenizer_files,
    widest,
)
from llama_jax.checkpoint.lazy import LazyArray, concatenate, equal
from llama_jax.checkpoint.torch_zip import open_torch
from llama_jax.config import ModelConfig
from llama_jax.config_files import from_meta
from llama_jax.errors import ExitCode

SHARD = re.compile(r"consolidated\.(\d+)\.pth")
IGNORED = "rope.freqs"  # recomputed from theta
QUERY = "layers.0.attention.wq.weight"
# Axis along which model parallelism cuts a weight; the embedding's is seen from its shapes, norms are whole in every shard.
CUT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1, "lm_head": 0}


def shard_paths(folder: Path) -> list[Path]:
    """The weight files in order of rank; empty when the folder has none.

    Raises:
        LlamaError: MISSING_SHARD for a gap in the numbers, EXTRA_SHARD for a number that occurs twice.
    """
    numbered = sorted((int(m[1][-9:]), path) for path in folder.iterdir() if (m := SHARD.fullmatch(path.name)))
    single = folder / "consolidated.pth"
    if single.exists():
        if numbered:
            fail(
                ExitCode.EXTRA_SHARD, f"{folder} has both {single.name} and {numbered[0][1].name}: remove what does not belong"
            )
        return [single]
    for expected, (number, path) in enumerate(numbered):
        if number > expected:
            fail(
                ExitCode.MISSING_SHARD,
                f"{folder} has {path.name} and lacks consolidated.{expected:02}.pth: download the missing file",
            )
        if number < expected:
            fail(ExitCode.EXTRA_SHARD, f"{folder} has {path.name} under a second name: remove one of them")
    return [path for _, path in numbered]


def open_meta(folder: Path, *, max_length: int | None = None) -> Source:
    """Opens a folder of Meta's; see `source.open_source`."""
    paths = shard_paths(folder)
    config_path = folder / "params.json"
    if not config_path.is_file():
        fail(ExitCode.BAD_CONFIG, f"{folder} has {paths[0].name} and no params.json: download it, it says what the model is")
    given = read_json(config_path)
    as_mapping(given.get("model", given), f'{config_path}: "model"', ExitCode.BAD_CONFIG)
    shards = [{k: v for k, v in open_torch(path).items() if k != IGNORED} for path in paths]
    _check_count(shards, paths)
    width = shards[0][FINAL_NORM[META]].shape[0]
    embedding = shards[0][EMBEDDING[META]].shape
    cuts = CUT | {"embedding": 1 if embedding[1] < width or len(shards) == 1 else 0}
    vocab = embedding[0] * (len(shards) if cuts["embedding"] == 0 else 1)
    config, notes = configured(from_meta, given, config_path, vocab_size=vocab, tied_head=False, max_length=max_length)
    for shard, path in zip(shards, paths, strict=True):
        check_names(shard, config, META, path)
    _check_width(config, shards, config_path)
    raw = {theirs: _merge(config, name, theirs, cuts, shards, paths) for name, theirs in names(config, META)}
    config, params = assemble(config, raw, META, folder, interleaved=True)
    return Source(
        kind="Meta",
        path=folder,
        config=config,
        dtype=widest(params),
        params=params,
        raw=raw,
        files=(*paths, config_path),
        tokenizer=tokenizer_files((folder, folder.resolve().parent), ("tokenizer.model",)),
        notes=tuple(notes),
    )


def _check_count(shards: Sequence[Mapping[str, LazyArray]], paths: Sequence[Path]) -> None:
    """The number of files is that for which the weights were cut: the final norm is whole, wq has D / shards rows.

    Raises:
        LlamaError: MISSING_TENSOR, WRONG_SHAPE, MISSING_SHARD, EXTRA_SHARD.
    """
    for shard, path in zip(shards, paths, strict=True):
        for name, axes in ((FINAL_NORM[META], 1), (QUERY, 2), (EMBEDDING[META], 2)):
            if name not in shard:
                fail(ExitCode.MISSING_TENSOR, f"{path} lacks {name}: it is no file of a Llama by Meta, or from another model")
            if len(shard[name].shape) != axes or 0 in shard[name].shape:
                fail(ExitCode.WRONG_SHAPE, f"{path}: {name} has shape {shown(shard[name].shape)}, expected {axes} axes")
    (width,), (rows, _) = shards[0][FINAL_NORM[META]].shape, shards[0][QUERY].shape
    needed, rest = divmod(width, rows)
    if rest or needed == len(shards):
        return  # a number of rows that no count explains is reported with the shape that was expected
    code = ExitCode.MISSING_SHARD if needed > len(shards) else ExitCode.EXTRA_SHARD
    fail(
        code,
        f"{paths[0]}: {QUERY} has {rows} of {width} rows, so the model was cut into {needed} files, and {paths[0].parent} has "
        f"{len(shards)}: {'download the others' if needed > len(shards) else 'remove those that belong to another model'}",
    )


def _check_width(config: ModelConfig, shards: Sequence[Mapping[str, LazyArray]], config_path: Path) -> None:
    """w1's rows agree with the width that params.json gives by Meta's rounding rule."""
    name = "layers.0.feed_forward.w1.weight"
    shape = shards[0][name].shape
    rows = shape[0] * len(shards) if shape else 0
    if rows != config.mlp_dim:
        fail(
            ExitCode.WRONG_SHAPE,
            f"{config_path}: multiple_of and ffn_dim_multiplier give a feed-forward width of {config.mlp_dim}, the weights "
            f"({name}: {shown(shape)} in each of {len(shards)} files) have {rows}: it is the params.json of another model",
        )


def _merge(
    config: ModelConfig,
    name: str,
    theirs: str,
    cuts: Mapping[str, int],
    shards: Sequence[Mapping[str, LazyArray]],
    paths: Sequence[Path],
) -> LazyArray:
    """One tensor from its parts in all files, each with the shape and dtype it must have."""
    leaf = leaf_of(name)
    full = flat_shape(config, leaf)
    axis = cuts.get(leaf)
    expected = list(full)
    if axis is not None:
        expected[axis] = full[axis] // len(shards)
    parts = [shard[theirs] for shard in shards]
    for part, path in zip(parts, paths, strict=True):
        if part.shape != tuple(expected) or (axis is not None and full[axis] % len(shards)):
            fail(
                ExitCode.WRONG_SHAPE,
                f"{path}: {theirs} has shape {shown(part.shape)}, expected {shown(expected)}, a part of {shown(full)} in "
                f"{len(shards)} files: params.json or a file belongs to another model",
            )
        if part.dtype != parts[0].dtype:
            fail(
                ExitCode.WRONG_SHAPE,
                f"{path}: {theirs} is {part.dtype}, in {paths[0].name} it is {parts[0].dtype}: a file belongs to another model",
            )
        if axis is None and part is not parts[0] and not equal(part, parts[0]):
            fail(
                ExitCode.WRONG_SHAPE,
                f"{path}: {theirs} differs from that in {paths[0].name}, and all files have the same: "
                "a file belongs to another model",
            )
    return parts[0] if axis is None else concatenate(parts, axis)
