"""Writing: every array to the bit, one at a time; nothing half-written is left or taken for a checkpoint."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from llama_jax.checkpoint import save as saving
from llama_jax.checkpoint.layout import META, names
from llama_jax.checkpoint.save import ARRAY_BYTES, REPLACED, ROOM_BYTES, UNFINISHED, Leaf, save_checkpoint
from llama_jax.checkpoint.store import DTYPES, MANIFEST, Checkpoint, to_tree
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from tests.checkpoint.make import Params, meta_tiny, random_params

CFG = meta_tiny(num_layers=1)
PARAMS = random_params(CFG)


def save(path: Path, cfg: ModelConfig, params: Params, *, tokenizer_files=(), chat_format: str = "", **options) -> Checkpoint:
    """A checkpoint of these arrays, whatever they are."""
    checkpoint = Checkpoint(
        path=epath.Path(path),
        config=cfg,
        dtype=params["embedding"].dtype,
        chat_format=chat_format,
        tokenizer=tuple(file.name for file in tokenizer_files),
        source={"kind": "test"},
        command="save",
    )
    leaves = {name: Leaf(value.shape, value.dtype, lambda value=value: value) for name, value in params.items()}
    return save_checkpoint(checkpoint, leaves, tokenizer_files=tokenizer_files, **options)


def assert_stored(path: Path, params: Params) -> None:
    """The checkpoint is complete and has these arrays, to the bit."""
    checkpoint = Checkpoint.open(path)
    arrays = checkpoint.arrays()
    assert [ours for ours, _ in names(checkpoint.config, META)] == list(params)
    for name, value in params.items():
        stored = arrays.read(name)
        assert (stored.shape, stored.dtype) == (value.shape, value.dtype), name
        assert stored.tobytes() == value.tobytes(), name


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str):
    """A file system of this size at the folder; skips where one cannot be mounted."""
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("a full disk needs a tmpfs, and only root may mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- what is written


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_arrays_come_back_to_the_bit(tmp_path, dtype, tied):
    cfg = meta_tiny(num_layers=2, tied_head=tied)
    params = random_params(cfg, 1, dtype)
    save(tmp_path / "c", cfg, params)
    assert_stored(tmp_path / "c", params)


def test_zeros_and_negative_zeros_come_back_to_the_bit(tmp_path):
    """TensorStore leaves out chunks that equal the fill value."""
    params = PARAMS | {"final_norm": np.zeros(48, np.float32), "embedding": np.full((40, 48), -0.0, np.float32)}
    save(tmp_path / "c", CFG, params)
    assert_stored(tmp_path / "c", params)


def test_more_layers_than_ten_keep_their_order(tmp_path):
    cfg = meta_tiny(num_layers=12, embed_dim=12, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=10, vocab_size=7)
    params = random_params(cfg)
    save(tmp_path / "c", cfg, params)
    assert_stored(tmp_path / "c", params)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_any_orbax_restores_it(tmp_path, dtype):
    """The stock checkpointer, told nothing, or told where each array goes."""
    params = random_params(CFG, 2, dtype)
    save(tmp_path / "c", CFG, params)
    expected = to_tree(params)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "c/params", targets)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(restored), strict=True):
        assert theirs.dtype == ours.dtype and np.asarray(theirs).tobytes() == ours.tobytes()


def test_the_mark_that_orbax_looks_for_in_a_bucket_is_there_without_the_path_of_this_machine(tmp_path):
    save(tmp_path / "c", CFG, PARAMS)
    assert (tmp_path / "c/params/commit_success.txt").read_text() == "Checkpoint commit was successful"


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")  # orbax's, about restoring without targets
def test_any_orbax_restores_it_without_being_told_shapes(tmp_path):
    save(tmp_path / "c", CFG, PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "c/params")
    assert jax.tree.structure(restored) == jax.tree.structure(to_tree(PARAMS))
    assert np.asarray(restored["layers"][0]["k_proj"]).tobytes() == PARAMS["layers.0.k_proj"].tobytes()


def test_arrays_in_memory_together_are_small_or_one(tmp_path, monkeypatch):
    together = PARAMS["layers.0.q_proj"].nbytes + 1000
    monkeypatch.setattr(saving, "TOGETHER_BYTES", together)
    held, sizes = [], {}

    def read(value):
        held.append(value.nbytes)
        assert len(held) == 1 or sum(held) <= together, held
        return value.copy()

    def written(name, nbytes):
        held.remove(nbytes)
        sizes[name] = nbytes

    checkpoint = Checkpoint(epath.Path(tmp_path / "c"), CFG, np.dtype(np.float32), "", (), {}, "")
    leaves = {name: Leaf(value.shape, value.dtype, lambda value=value: read(value)) for name, value in PARAMS.items()}
    save_checkpoint(checkpoint, leaves, written=written)
    assert max(sizes.values()) > together and sizes == {name: value.nbytes for name, value in PARAMS.items()}
    assert_stored(tmp_path / "c", PARAMS)


def test_the_manifest_is_written_last(tmp_path):
    seen = []

    def finish(checkpoint):
        seen.extend(file.name for file in checkpoint.path.iterdir())
        return checkpoint

    (tmp_path / "tokenizer.model").write_bytes(b"tokens")
    save(tmp_path / "c", CFG, PARAMS, tokenizer_files=[tmp_path / "tokenizer.model"], finish=finish)
    assert sorted(seen) == ["params", "tokenizer.model", UNFINISHED]
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [MANIFEST, "params", "tokenizer.model"]
    assert (tmp_path / "c/tokenizer.model").read_bytes() == b"tokens"


# --- where it is written


def test_parents_are_made_and_an_empty_directory_is_used(tmp_path):
    save(tmp_path / "a/b/c", CFG, PARAMS)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", CFG, PARAMS)
    assert_stored(tmp_path / "a/b/c", PARAMS)
    assert_stored(tmp_path / "empty", PARAMS)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_never_touched(tmp_path, overwrite, kind):
    output = tmp_path / "thesis"
    if kind == "folder":
        output.mkdir()
    (output / "chapter1" if kind == "folder" else output).write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(LlamaError, match="thesis exists and is no checkpoint of ours: give the name of a new") as caught:
        save(output, CFG, PARAMS, overwrite=overwrite)
    assert caught.value.code == ExitCode.OUTPUT_EXISTS
    assert snapshot(tmp_path) == before


def test_a_checkpoint_is_replaced_only_when_asked(tmp_path):
    save(tmp_path / "c", CFG, PARAMS)
    before = snapshot(tmp_path)
    with pytest.raises(LlamaError, match="c holds a checkpoint already: give another --output, or --overwrite") as caught:
        save(tmp_path / "c", CFG, random_params(CFG, 1))
    assert caught.value.code == ExitCode.OUTPUT_EXISTS and snapshot(tmp_path) == before
    save(tmp_path / "c", CFG, random_params(CFG, 1), overwrite=True)
    assert_stored(tmp_path / "c", random_params(CFG, 1))
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


class FailsError(Exception):
    pass


def fail(*_):
    raise FailsError("stop")


def interrupt(name, nbytes):
    if name == "embedding":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # the main thread goes on first, as it does when a large array is being read


@pytest.mark.parametrize(
    ("options", "error"),
    [({"written": fail}, FailsError), ({"finish": fail}, FailsError), ({"written": interrupt}, KeyboardInterrupt)],
    ids=["while writing", "while finishing", "interrupted"],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, options, error, old):
    if old:
        save(tmp_path / "c", CFG, PARAMS)
    before = snapshot(tmp_path)
    with pytest.raises(error):
        save(tmp_path / "c", CFG, random_params(CFG, 1), overwrite=True, **options)
    assert snapshot(tmp_path) == before
    assert [file.name for file in tmp_path.iterdir()] == (["c"] if old else [])
    time.sleep(0.5)  # what still ran in the background would have written by now
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("begun", [False, True])
def test_a_killed_overwriting_run_is_undone_by_the_next(tmp_path, begun):
    """It leaves the old checkpoint beside its own beginnings; the next run refuses again, and the old one is back."""
    save(tmp_path / "c", CFG, PARAMS)
    before = snapshot(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / f"c{REPLACED}")
    if begun:
        (tmp_path / "c/params").mkdir(parents=True)
        (tmp_path / "c/params/part").write_bytes(b"half")
        (tmp_path / "c" / UNFINISHED).write_text("")
    with pytest.raises(LlamaError, match="holds a checkpoint already"):
        save(tmp_path / "c", CFG, random_params(CFG, 1))
    assert snapshot(tmp_path / "c") == before and not (tmp_path / f"c{REPLACED}").exists()
    (tmp_path / "c").rename(tmp_path / f"c{REPLACED}")
    save(tmp_path / "c", CFG, random_params(CFG, 1), overwrite=True)
    assert_stored(tmp_path / "c", random_params(CFG, 1))
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_an_overwriting_run_killed_after_its_manifest_is_complete(tmp_path):
    """The old checkpoint lies beside the new one: the new one is used, and the old goes with the next replacement."""
    save(tmp_path / f"c{REPLACED}", CFG, PARAMS)
    save(tmp_path / "d", CFG, random_params(CFG, 1))
    (tmp_path / "d").rename(tmp_path / "c")
    assert_stored(tmp_path / "c", random_params(CFG, 1))
    save(tmp_path / "c", CFG, random_params(CFG, 2), overwrite=True)
    assert_stored(tmp_path / "c", random_params(CFG, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_killed_run_is_no_checkpoint_and_the_next_begins_anew(tmp_path):
    (tmp_path / "c/params/ocdbt.process_0").mkdir(parents=True)
    (tmp_path / "c/params/ocdbt.process_0/part").write_bytes(b"half")
    (tmp_path / "c" / UNFINISHED).write_text("")
    with pytest.raises(LlamaError, match="a conversion that was stopped") as caught:
        Checkpoint.open(tmp_path / "c")
    assert caught.value.code == ExitCode.NOT_A_CHECKPOINT
    save(tmp_path / "c", CFG, PARAMS)
    assert_stored(tmp_path / "c", PARAMS)
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [MANIFEST, "params"]


# --- a disk that is too small


@pytest.mark.parametrize("old", [False, True])
def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch, old):
    if old:
        save(tmp_path / "c", CFG, PARAMS)
    before = snapshot(tmp_path)
    nbytes = sum(value.nbytes + ARRAY_BYTES for value in PARAMS.values()) + ROOM_BYTES
    usage = shutil.disk_usage(tmp_path)._replace(free=nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LlamaError, match=f"needs {nbytes:,} bytes and its disk has {nbytes - 1:,} free: make room") as caught:
        save(tmp_path / "c", CFG, PARAMS, overwrite=True)
    assert caught.value.code == ExitCode.DISK_FULL
    assert snapshot(tmp_path) == before
    assert [file.name for file in tmp_path.iterdir()] == (["c"] if old else [])


@pytest.mark.parametrize("old", [False, True])
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch, old):
    """Another program took the space after it was looked at: 3 MB go to a disk of 2."""
    cfg = meta_tiny(num_layers=1, vocab_size=8000)
    with tiny_disk(tmp_path / "disk", "2m") as disk:
        if old:
            save(disk / "c", CFG, PARAMS)
        before = snapshot(disk)
        usage = shutil.disk_usage(disk)._replace(free=10**9)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(LlamaError, match=r"is full: the checkpoint needs .* bytes; nothing was kept") as caught:
            save(disk / "c", cfg, random_params(cfg), overwrite=True)
        assert caught.value.code == ExitCode.DISK_FULL
        assert snapshot(disk) == before
        if old:
            assert_stored(disk / "c", PARAMS)
