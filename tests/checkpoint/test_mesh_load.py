"""Loading onto a mesh: every device gets its part of every format, and no process reads more than its devices need."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from llama_jax.checkpoint import load as loading
from llama_jax.checkpoint.lazy import LazyArray
from llama_jax.checkpoint.load import load_params, read_part
from llama_jax.checkpoint.source import Source, open_source
from llama_jax.checkpoint.store import Checkpoint, to_flat, to_tree
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import param_axes, param_shapes, quantize_params, stack_layers
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import sharding
from tests.checkpoint.make import Params, meta_tiny, random_params, write_huggingface, write_llama2c, write_meta
from tests.checkpoint.mesh import run
from tests.checkpoint.test_mesh_save import assert_placed, mesh_of
from tests.checkpoint.test_save import save

CFG = meta_tiny(vocab_size=330, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=96, num_layers=2)
BIG = meta_tiny(  # each of its weights has 16 MiB, the least that is cut into eighths along both axes
    vocab_size=2048, embed_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=2048, num_layers=1, tied_head=True
)
FORMATS = ["ours", "huggingface", "meta"]
MESHES = ["8x1x1", "1x8x1", "1x1x8", "2x2x2", "1x2x4"]
ONE_DEVICE = ["1x8x1", "1x1x8", "1x2x4", "2x2x2"]  # meshes of which one device's bytes are counted


def write_all(folder: Path, cfg: Any, params: Params) -> None:
    """The same weights in every format, under folder/{ours,huggingface,meta}."""
    save(folder / "ours", cfg, params)
    write_huggingface(folder / "huggingface", cfg, params, files=2)
    write_meta(folder / "meta", dataclasses.replace(cfg, tied_head=False), params, shards=2)


def opened(path: Path) -> Checkpoint | Source:
    return Checkpoint.open(path) if path.name == "ours" else open_source(path)


@contextmanager
def counted(total: dict[str, int]) -> Iterator[None]:
    """Counts bytes while it lasts: of files through TensorStore, and of parts asked of sources; each read by its box, too."""

    def from_files() -> int:
        (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read") or [
            {"values": [{"value": 0}]}
        ]
        return int(metric["values"][0]["value"])

    view = LazyArray.view  # of which some are read

    def viewing(array: LazyArray, index: Any = None) -> np.ndarray:
        part = view(array, index)
        total["asked"] += part.nbytes
        return part

    total |= {"asked": 0, "files": -from_files()}
    LazyArray.view = viewing
    try:
        yield
    finally:
        LazyArray.view = view
        total["files"] += from_files()


# --- every device gets its part


def load_everywhere(folder: str) -> None:
    params = random_params(CFG)
    llama2c = write_llama2c(Path(folder) / "model.bin", CFG, params, version=2)
    for kind, scan in (("ours", False), ("ours", True), ("huggingface", False), ("meta", True), ("model.bin", True)):
        source = opened(Path(folder) / kind)
        for sizes in MESHES:
            loaded = load_params(source, np.dtype(np.float32), mesh=mesh_of(sizes), scan=scan)
            assert_placed(loaded, llama2c if kind == "model.bin" else params, scan=scan)
            shapes, axes = (to_flat(tree(CFG, scan=scan)) for tree in (param_shapes, param_axes))
            for name, array in to_flat(loaded).items():
                assert array.sharding == sharding(mesh_of(sizes), axes[name], array.shape), name
                assert all(0 <= a - b < 8 for a, b in zip(array.shape, shapes[name].shape, strict=True)), name
        cast = load_params(source, np.dtype(ml_dtypes.bfloat16), mesh=mesh_of("1x1x8"), scan=scan)
        bfloat16 = {
            name: value.astype(ml_dtypes.bfloat16) for name, value in (llama2c if kind == "model.bin" else params).items()
        }
        assert_placed(cast, bfloat16, scan=scan)


def parts_are_read_once(folder: str) -> None:
    """Also those that all eight devices hold: norms, everything on a data axis, key/value projections of four heads."""
    source = open_source(Path(folder) / "huggingface")
    nbytes = sum(array.nbytes for array in source.params.values())
    for sizes in MESHES:
        read: dict[str, int] = {}
        with counted(read):
            load_params(source, np.dtype(np.float32), mesh=mesh_of(sizes))
        assert read["asked"] == nbytes, sizes


def int8_is_rounded_where_it_lies(folder: str) -> None:
    """The same numbers as without a mesh, placed by the axes of the weight; few float arrays exist at a time."""
    checkpoint = Checkpoint.open(Path(folder) / "ours")
    whole = jax.jit(quantize_params)(load_params(checkpoint, np.dtype(np.float32)))
    together = []
    quantize_leaf = loading.quantize_leaf

    def watched(leaf: str, weight: Any, method: str) -> Any:
        floats = [array for array in jax.live_arrays() if array.dtype == np.float32 and array.nbytes > 10_000]
        together.append(sum(array.shape in {(8, 8, 64), (4, 8, 64), (64, 8, 8), (96, 64), (64, 96)} for array in floats))
        return quantize_leaf(leaf, weight, method)

    expected = to_flat(jax.tree.map(np.asarray, whole))
    loading.quantize_leaf = watched
    for sizes, scan in (("1x2x4", False), ("2x2x2", True), (None, True)):
        mesh = sizes and mesh_of(sizes)
        together.clear()
        loaded = load_params(checkpoint, np.dtype(np.float32), mesh=mesh, quantize="int8", scan=scan)
        assert max(together) <= loading.THREADS + 1
        flat = to_flat(loaded)
        for name, wanted in (to_flat(stack_layers(to_tree(expected))) if scan else expected).items():
            for ours, theirs in zip(jax.tree.leaves(flat[name]), jax.tree.leaves(wanted), strict=True):
                rows = tuple(slice(size) for size in theirs.shape)
                assert ours.dtype == theirs.dtype and np.array_equal(np.asarray(ours)[rows], theirs), name
            if isinstance(flat[name], QArray) and mesh and name.endswith("q_proj"):
                axes = to_flat(param_axes(CFG, scan=scan))[name]
                assert flat[name].value.sharding == sharding(mesh, axes, flat[name].value.shape)
                assert flat[name].scale.sharding == sharding(mesh, (*axes[:-1], "group"), flat[name].scale.shape)
    loading.quantize_leaf = quantize_leaf


def small_model(folder: str) -> None:
    load_everywhere(folder)
    parts_are_read_once(folder)
    int8_is_rounded_where_it_lies(folder)


def test_every_device_gets_its_part_of_every_format_read_once_and_rounded_in_place(tmp_path):
    """Three properties of one small model, one process: starting it takes longer than they do."""
    write_all(tmp_path, CFG, random_params(CFG))
    run(small_model, tmp_path)


# --- no more than its part is read


def bytes_of_one_device(folder: str) -> list[dict[str, Any]]:
    """What the last device's parts cost, per format and mesh, in bytes; `part` is their size."""
    table = []
    for kind in FORMATS:
        source = opened(Path(folder) / kind)
        stored = source.params.__getitem__ if isinstance(source, Source) else source.arrays().array
        for sizes in ONE_DEVICE:
            mesh = mesh_of(sizes)
            targets = loading._targets(BIG, np.dtype(np.float32), mesh, False)
            read: dict[str, int] = {}
            parts = 0
            with counted(read):
                for name, target in targets.items():
                    index = target.sharding.devices_indices_map(target.shape)[mesh.devices.flat[-1]]
                    ranges = tuple(part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True))
                    parts += read_part([stored(name)], ranges, target.dtype).nbytes
            whole = sum(math.prod(target.shape) * 4 for target in targets.values())
            table.append({"kind": kind, "mesh": sizes, "whole": whole, "part": parts, **read})
    return table


def test_one_device_of_eight_reads_little_more_than_its_part(tmp_path):
    """Of a model of 134 MB. TensorStore reads whole chunks, which are eighths; from a source just the part is copied."""
    write_all(tmp_path, BIG, random_params(BIG))
    (table,) = run(bytes_of_one_device, tmp_path)
    assert [(row["kind"], row["mesh"]) for row in table] == list(itertools.product(FORMATS, ONE_DEVICE))
    for row in table:
        copies = 2 if row["mesh"] == "2x2x2" else 1
        assert row["part"] <= 1.002 * copies * row["whole"] / 8  # norms are whole on every device
        read = row["files"] if row["kind"] == "ours" else row["asked"]
        assert row["part"] <= read <= 1.3 * row["part"], row


# --- without a mesh, and what is refused


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_all(folder, CFG, random_params(CFG))
    return folder


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scan", [False, True])
def test_without_a_mesh_the_default_device_gets_all(small, kind, scan):
    loaded = load_params(opened(small / kind), np.dtype(np.float32), scan=scan)
    assert_placed(loaded, random_params(CFG), scan=scan)
    assert not any(array.committed for array in jax.tree.leaves(loaded))  # free to follow other arguments to their devices


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_kv_heads=8), r"array 'layers.0.k_proj' has shape \[4, 8, 64\], expected \[8, 8, 64\]: the checkpoint is of"),
        (dict(vocab_size=336), r"array 'embedding' has shape \[330, 64\], expected \[336, 64\]"),
        (dict(mlp_dim=128), r"array 'layers.0.gate_proj' has shape \[96, 64\], expected \[128, 64\]"),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_another_models_config_is_refused_with_the_shapes(small, changes, message, scan):
    checkpoint = Checkpoint.open(small / "ours")
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **changes))
    with pytest.raises(LlamaError, match=message) as caught:
        load_params(checkpoint, np.dtype(np.float32), scan=scan)
    assert caught.value.code == ExitCode.WRONG_SHAPE


def test_more_layers_than_there_are_are_refused(small):
    checkpoint = Checkpoint.open(small / "ours")
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, num_layers=3))
    with pytest.raises(LlamaError, match=r"no readable array 'layers.2.attn_norm'"):
        load_params(checkpoint, np.dtype(np.float32))


def test_an_unknown_quantisation_is_refused(small):
    with pytest.raises(LlamaError, match="quantize is 'int3', expected int8, w8a8, int4, fp8, or None"):
        load_params(Checkpoint.open(small / "ours"), np.dtype(np.float32), quantize="int3")
