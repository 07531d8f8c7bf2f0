"""Saving from a mesh: one form on disk whatever the mesh, and back from it onto any other, to the bit."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding

from llama_jax.checkpoint.arrays import aligned, mesh_leaves
from llama_jax.checkpoint.load import load_params, read_arrays
from llama_jax.checkpoint.save import UNFINISHED, save_params, write_arrays
from llama_jax.checkpoint.store import DTYPES, ArrayReader, Checkpoint, chunk_shape, stored_names, to_flat, to_tree
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape
from llama_jax.model import param_axes, stack_layers
from llama_jax.sharding import make_mesh, sharding, spec
from tests.checkpoint.make import Params, meta_tiny, random_params
from tests.checkpoint.mesh import run
from tests.checkpoint.test_save import assert_stored, save, snapshot

CFG = meta_tiny(vocab_size=321, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=96, num_layers=3)
SAVED = [  # mesh, scan, dtype
    ("1x8x1", False, "float32"),
    ("2x2x2", True, "float32"),
    ("1x1x8", False, "bfloat16"),
    ("1x2x4", True, "bfloat16"),
]
RESTORED = ["8x1x1", "1x8x1", "1x1x8", "2x2x2", "1x1x1", "1x2x1", "1x1x4"]


def mesh_of(sizes: str) -> jax.sharding.Mesh:
    """ "2x2x2" -> data=2, fsdp=2, tensor=2, of the first devices."""
    shape = MeshShape(*map(int, sizes.split("x")))
    return make_mesh(shape, jax.devices()[: shape.num_devices])


def described(path: Any, cfg=CFG) -> Checkpoint:
    """A checkpoint to be."""
    return Checkpoint(epath.Path(path), cfg, np.dtype(np.float32), "", (), {"kind": "test"}, "save")


def assert_placed(params: Any, expected: Params, *, scan: bool) -> None:
    """Every device has its part of these arrays to the bit, and zeros in the padding."""
    whole = to_flat(jax.tree.map(np.asarray, stack_layers(to_tree(expected)))) if scan else expected
    placed = to_flat(params)
    assert placed.keys() == whole.keys()
    for name, array in placed.items():
        value = np.zeros(array.shape, array.dtype)
        value[tuple(slice(size) for size in whole[name].shape)] = whole[name]
        assert array.dtype == whole[name].dtype
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), (name, shard.index)


# --- names


def test_names_of_any_tree_become_the_tree_again():
    flat = {"step": 0, "mu.layers.0.q_proj": 1, "mu.layers.1.q_proj": 2, "mu.embedding": 3, "clip.0": 4}
    tree = {"step": 0, "mu": {"layers": [{"q_proj": 1}, {"q_proj": 2}], "embedding": 3}, "clip": [4]}
    assert to_tree(flat) == tree and to_flat(tree) == flat
    stack = {"mu": {"layers": {"q_proj": 1}}}
    assert to_flat(stack) == {"mu.layers.q_proj": 1} and to_tree(to_flat(stack)) == stack


def test_a_stack_has_a_name_on_disk_for_each_layer():
    assert stored_names("mu.layers.q_proj", (2, 8, 64)) == ["mu.layers.0.q_proj", "mu.layers.1.q_proj"]
    assert stored_names("layers.10.q_proj", (8, 64)) == ["layers.10.q_proj"]
    assert stored_names("embedding", (321, 64)) == ["embedding"]


# --- one process, eight devices


def save_and_restore(folder: str) -> None:
    """Saves from some meshes, in both forms and dtypes, and restores each on all of the others, in the other form."""
    for saved, scan, dtype in SAVED:
        expected = random_params(CFG, 1, DTYPES[dtype])
        save(Path(folder) / f"{saved} first", CFG, expected)
        params = load_params(Checkpoint.open(f"{folder}/{saved} first"), DTYPES[dtype], mesh=mesh_of(saved), scan=scan)
        assert_placed(params, expected, scan=scan)
        checkpoint = save_params(described(f"{folder}/{saved}"), params)
        assert checkpoint.dtype == DTYPES[dtype]
        for restored in RESTORED:
            loaded = load_params(checkpoint, DTYPES[dtype], mesh=mesh_of(restored), scan=not scan)
            assert_placed(loaded, expected, scan=not scan)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints under the names of the meshes that they were saved from."""
    folder = tmp_path_factory.mktemp("saved")
    run(save_and_restore, folder)
    return folder


@pytest.mark.parametrize(("mesh", "dtype"), [(mesh, DTYPES[dtype]) for mesh, _, dtype in SAVED])
def test_what_a_mesh_saves_is_what_one_process_saves(saved, mesh, dtype):
    """Logical rows, one array per layer, the same chunks; stock Orbax restores it (and all meshes did, in the fixture)."""
    expected = random_params(CFG, 1, dtype)
    assert_stored(saved / mesh, expected)
    assert sorted(file.name for file in (saved / mesh).iterdir()) == ["checkpoint.json", "params"]
    ours, theirs = Checkpoint.open(saved / mesh).arrays(), Checkpoint.open(saved / f"{mesh} first").arrays()
    for name in expected:
        assert ours.open(name).spec().to_json()["metadata"] == theirs.open(name).spec().to_json()["metadata"]
    targets = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), to_tree(expected))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = to_flat(checkpointer.restore(saved / mesh / "params", targets))
    assert {name: np.asarray(value).tobytes() for name, value in restored.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }


PARTS = [  # shape and axes on disk, mesh, the part of a device that is written: the array's chunks are eighths where 8 divides
    ((4096, 11008), ("embed", "mlp"), "1x8x1", (512, 11008)),
    ((4096, 11008), ("embed", "mlp"), "2x2x2", (2048, 5504)),
    ((4096, 11008), ("embed", "mlp"), "1x6x1", (2048, 11008)),  # six parts would begin inside chunks: two, three copies of each
    ((2001, 4096), ("vocab", "embed"), "1x1x8", (2001, 4096)),  # 2001 rows are one chunk
    ((2001, 4096), ("vocab", "embed"), "1x2x4", (2001, 2048)),
    ((4, 128, 4096), ("heads", "head_dim", "embed"), "1x1x8", (1, 128, 4096)),
    ((8, 128, 4096), ("kv_heads", "head_dim", "embed"), "1x2x3", (8, 128, 2048)),
    ((4096,), ("norm",), "2x2x2", (4096,)),
]


def parts_are_whole_chunks() -> None:
    """A part is what is written by one process: never less than a chunk."""
    for shape, axes, mesh, expected in PARTS:
        chunks = chunk_shape(shape, axes, 2)
        ours = aligned(NamedSharding(mesh_of(mesh), spec(*axes)), shape, chunks)
        assert ours.shard_shape(shape) == expected, (shape, mesh)
        assert all(n % chunk == 0 for n, chunk in zip(expected, chunks, strict=True))
        stack = NamedSharding(mesh_of(mesh), spec("layers", *axes))
        assert aligned(stack, shape, chunks, stacked=True) == ours


def moments_come_back(folder: str) -> None:
    """A tree of an optimizer's: stacks beside single arrays, scalars, integers, another mesh and form when they return."""
    axes = to_flat(param_axes(CFG, scan=True))
    first, second = mesh_of("1x2x4"), mesh_of("4x2x1")
    rng = np.random.default_rng(0)
    whole = {"count": np.int32(7), "mu.embedding": rng.normal(size=(324, 64)).astype(np.float32)}
    whole["mu.embedding"][321:] = 0
    whole |= {"mu.layers.q_proj": rng.normal(size=(3, 8, 8, 64)).astype(np.float32), "mu.final_norm": np.ones(64, np.float32)}
    names = {name: axes[name.removeprefix("mu.")] if name != "count" else () for name in whole}
    arrays = {name: jax.device_put(value, sharding(first, names[name], value.shape)) for name, value in whole.items()}
    stored = {"mu.embedding": (321, 64)}
    leaves = mesh_leaves(arrays, stored)
    assert list(leaves) == ["count", "mu.embedding", *(f"mu.layers.{i}.q_proj" for i in range(3)), "mu.final_norm"]
    on_disk = names | {f"mu.layers.{i}.q_proj": names["mu.layers.q_proj"][1:] for i in range(3)}
    write_arrays(epath.Path(folder) / "state", leaves, on_disk)

    def target(name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, whole.get(name, whole["mu.final_norm"]).dtype, sharding=sharding(second, axes, shape)
        )

    targets = {name: target(name, value.shape, names[name]) for name, value in whole.items() if "layers" not in name}
    targets["mu.embedding"] = target("mu.embedding", (321, 64), names["mu.embedding"])
    targets |= {f"mu.layers.{i}.q_proj": target("", (8, 8, 64), names["mu.layers.q_proj"][1:]) for i in range(3)}
    back = read_arrays(ArrayReader(epath.Path(folder) / "state").array, targets)
    expected = whole | {"mu.embedding": whole["mu.embedding"][:321]}
    expected |= {f"mu.layers.{i}.q_proj": whole["mu.layers.q_proj"][i] for i in range(3)}
    for name, array in back.items():
        assert array.sharding == targets[name].sharding
        assert array.dtype == expected[name].dtype and np.asarray(array).tobytes() == expected[name].tobytes(), name


class FailsError(Exception):
    pass


def fail(*_: Any) -> None:
    raise FailsError("stop")


def a_failure_leaves_what_was_there(folder: str) -> None:
    before = snapshot(Path(folder))
    checkpoint = Checkpoint.open(f"{folder}/old")
    params = load_params(checkpoint, np.dtype(np.float32), mesh=mesh_of("2x2x2"), scan=True)
    changed = jax.tree.map(lambda x: x + 1, params)
    for path in ("old", "new"):
        with pytest.raises(FailsError):
            save_params(described(f"{folder}/{path}"), changed, overwrite=True, written=fail)
        assert snapshot(Path(folder)) == before and [file.name for file in Path(folder).iterdir()] == ["old"]


def other_properties(folder: str) -> None:
    parts_are_whole_chunks()
    moments_come_back(folder)
    os.mkdir(f"{folder}/failing")
    save(Path(folder) / "failing/old", CFG, random_params(CFG))
    a_failure_leaves_what_was_there(f"{folder}/failing")


def test_chunks_have_one_writer_moments_come_back_and_failures_leave_what_was_there(tmp_path):
    """Three properties, one process: starting it takes longer than they do."""
    run(other_properties, tmp_path)


def save_until_killed(folder: str) -> None:
    mesh = mesh_of("1x8x1")
    params = load_params(Checkpoint.open(f"{folder}/source"), np.dtype(np.float32), mesh=mesh)
    save_params(described(f"{folder}/c"), params, written=lambda name, nbytes: os._exit(9) if name == "lm_head" else None)


def test_a_killed_save_is_no_checkpoint_and_the_next_begins_anew(tmp_path):
    params = random_params(CFG)
    save(tmp_path / "source", CFG, params)
    with pytest.raises(AssertionError, match=r"exit 9"):
        run(save_until_killed, tmp_path)
    assert (tmp_path / "c" / UNFINISHED).exists() and len(list((tmp_path / "c").iterdir())) == 2
    with pytest.raises(LlamaError, match=r"holds no complete llama_jax checkpoint") as caught:
        Checkpoint.open(tmp_path / "c")
    assert caught.value.code == ExitCode.NOT_A_CHECKPOINT
    save_params(described(tmp_path / "c"), jax.tree.map(jax.numpy.asarray, to_tree(params)))
    assert_stored(tmp_path / "c", params)
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == ["checkpoint.json", "params"]


# --- two processes


def two_processes(folder: str) -> dict[str, Any]:
    """Loads on a mesh over both, saves, and loads what was saved; then both fail when one does."""
    params = random_params(CFG, 3)
    loaded = load_params(Checkpoint.open(f"{folder}/source"), np.dtype(np.float32), mesh=mesh_of("1x8x1"), scan=True)
    assert_placed(loaded, params, scan=True)
    wrote: dict[str, int] = {}
    save_params(described(f"{folder}/saved"), loaded, written=wrote.__setitem__)
    for sizes, scan in (("1x1x8", False), ("2x2x2", True)):
        again = load_params(Checkpoint.open(f"{folder}/saved"), np.dtype(np.float32), mesh=mesh_of(sizes), scan=scan)
        assert_placed(again, params, scan=scan)
    int8 = load_params(Checkpoint.open(f"{folder}/saved"), np.dtype(np.float32), mesh=mesh_of("1x8x1"), quantize="int8")
    jax.block_until_ready(int8)
    first = jax.process_index() == 0
    errors = []
    for path, written in (("saved", None), ("failed", None if first else fail)):
        try:
            save_params(described(f"{folder}/{path}"), loaded, **({"written": written} if written else {}))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"wrote": sum(wrote.values()), "errors": errors}


def test_two_processes_save_together_and_fail_together(tmp_path):
    params = random_params(CFG, 3)
    save(tmp_path / "source", CFG, params)
    first, second = run(two_processes, tmp_path, processes=2, devices=4)
    assert_stored(tmp_path / "saved", params)
    assert first["wrote"] + second["wrote"] == sum(value.nbytes for value in params.values())  # each byte once
    exists, failed = first["errors"]
    assert exists.startswith("LlamaError") and "holds a checkpoint already" in exists
    assert failed == "LlamaError: the checkpoint was not written: process 1 failed and says why"
    exists, failed = second["errors"]
    assert exists == "LlamaError: the checkpoint was not written: process 0 failed and says why"
    assert failed == "FailsError: stop"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]
