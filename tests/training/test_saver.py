"""The saver: what is on disk at every instant, what a thread may and may not do, what is kept, what an error leaves."""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import save as saving
from llama_jax.checkpoint import store
from llama_jax.checkpoint.save import UNFINISHED
from llama_jax.checkpoint.store import MANIFEST, Checkpoint
from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.training import saving as training_saving
from llama_jax.training.restoring import restore
from llama_jax.training.saving import Retention, read_run
from tests.checkpoint.mesh import ROOT, run
from tests.checkpoint.test_save import snapshot, tiny_disk
from tests.training.states import IDENTITY, KEEP_ALL, assert_is, assert_stored, drawn, layout_of, saver_of, state_of

CFG = dataclasses.replace(PRESETS["tiny"], vocab_size=8, embed_dim=6, num_layers=1, num_heads=2, head_dim=4, mlp_dim=3)
LAYOUT = layout_of("sgd", cfg=CFG)  # arrays do not matter here, files do
STATE = state_of(LAYOUT)


@pytest.fixture
def run_of_one(tmp_path) -> Path:
    """A workdir with the checkpoint of step 1."""
    with saver_of(tmp_path / "run", LAYOUT) as saver:
        saver.save(state_of(LAYOUT, step=1, seed=1))
    return tmp_path / "run"


def steps(workdir: Path) -> list[int]:
    """What lies under checkpoints/, which is complete."""
    found = sorted((workdir / "checkpoints").iterdir())
    assert all((step / MANIFEST).exists() and not (step / UNFINISHED).exists() for step in found)
    return sorted(int(step.name) for step in found)


# --- the thread


def test_what_is_written_is_the_state_at_the_time_of_save(tmp_path, monkeypatch):
    """Its arrays are donated, and their memory used again, before the thread has begun."""
    go = threading.Event()
    write = training_saving.save_rooms
    monkeypatch.setattr(training_saving, "save_rooms", lambda *args, **options: go.wait(60) and write(*args, **options))
    state = state_of(LAYOUT, seed=1)
    with saver_of(tmp_path, LAYOUT) as saver:
        saver.save(state)
        spoil = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 3, state), donate_argnums=0)
        for _ in range(3):
            state = jax.block_until_ready(spoil(state))
        assert saver.latest() is None  # save has returned, and nothing is written
        go.set()
        saver.wait()
        assert saver.latest() == 1
    assert_stored(tmp_path / "checkpoints/1", LAYOUT, seed=1)


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    under_way = []

    def write(checkpoint, *args, **options):
        under_way.append(checkpoint.path.name)
        time.sleep(0.2)
        assert under_way == [checkpoint.path.name]
        under_way.clear()

    monkeypatch.setattr(training_saving, "save_rooms", write)
    with saver_of(tmp_path, LAYOUT) as saver:
        for step in (1, 2, 3):
            saver.save(state_of(LAYOUT, step))


@pytest.mark.parametrize("call", ["save", "wait", "close", "with"])
def test_an_error_of_the_thread_is_raised_by_the_next_call_once(run_of_one, monkeypatch, call):
    def fail(*args, **options):
        raise FloatingPointError("of the thread")

    before = snapshot(run_of_one)
    saver = saver_of(run_of_one, LAYOUT)
    monkeypatch.setattr(saving, "_write_part", fail)
    saver.save(state_of(LAYOUT, step=2))
    with pytest.raises(FloatingPointError, match="of the thread"):
        if call == "save":
            saver.save(state_of(LAYOUT, step=3))
        elif call == "with":
            with saver:
                pass
        else:
            getattr(saver, call)()
    assert snapshot(run_of_one) == before
    monkeypatch.undo()
    if call in ("save", "wait"):
        saver.save(state_of(LAYOUT, step=4, seed=4))
    saver.close()
    assert steps(run_of_one) == ([1, 4] if call in ("save", "wait") else [1])


def test_an_error_of_the_thread_does_not_hide_the_one_that_ends_the_run(run_of_one, monkeypatch, capsys):
    def fail(*args, **options):
        raise FloatingPointError("of the thread")

    with pytest.raises(KeyError, match="of the run"), saver_of(run_of_one, LAYOUT) as saver:
        monkeypatch.setattr(saving, "_write_part", fail)
        saver.save(state_of(LAYOUT, step=2))
        raise KeyError("of the run")
    assert "warning: the last checkpoint was not written: of the thread" in capsys.readouterr().err


def test_a_step_is_written_once_by_a_run_and_anew_by_another(run_of_one):
    written = (run_of_one / "checkpoints/1" / MANIFEST).stat().st_ino
    with saver_of(run_of_one, LAYOUT) as saver:
        saver.save(state_of(LAYOUT, step=1, seed=5), metric=2.0)
        saver.wait()
        replaced = (run_of_one / "checkpoints/1" / MANIFEST).stat().st_ino
        saver.save(state_of(LAYOUT, step=1, seed=6))
    assert written != replaced == (run_of_one / "checkpoints/1" / MANIFEST).stat().st_ino
    assert_stored(run_of_one / "checkpoints/1", LAYOUT, seed=5)
    assert steps(run_of_one) == [1]


# --- a run that is killed


def images(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, bytes | None]]:
    """From now on, what a folder holds (None: a directory) before each array is written and before each file or directory is
    made, moved, removed or synchronised."""
    found: list[dict[str, bytes | None]] = []
    lock, busy = threading.RLock(), []

    def look() -> None:
        with lock:
            if busy:
                return
            busy.append(True)
            image: dict[str, bytes | None] = {}
            for path in sorted(folder.rglob("*")):
                with contextlib.suppress(FileNotFoundError):  # a file of TensorStore's that has got its name meanwhile
                    image[str(path.relative_to(folder))] = None if path.is_dir() else path.read_bytes()
            if image not in found:
                found.append(image)
            busy.clear()

    def before(f):
        def call(*args, **options):
            look()
            return f(*args, **options)

        return call

    for name in ("_write_part", "_sync", "_write_whole"):
        monkeypatch.setattr(saving, name, before(getattr(saving, name)))
    for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, before(getattr(os, name)))
    return found


def lay_out(image: dict[str, bytes | None], folder: Path) -> Path:
    folder.mkdir()
    for name, data in image.items():
        if data is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("case", ["another step, and the first is removed", "the same step"])
def test_whenever_a_run_is_killed_a_complete_checkpoint_is_found(run_of_one, tmp_path, monkeypatch, case):
    """The old one or the new one, to the bit; what else is there is tidied away, and the next run saves as ever."""
    step, retention = (1, KEEP_ALL) if case == "the same step" else (2, Retention(keep=1))
    with monkeypatch.context() as patch, saver_of(run_of_one, LAYOUT, retention) as saver:
        found = images(patch, run_of_one)
        saver.save(state_of(LAYOUT, step, seed=2))
        saver.wait()
    assert steps(run_of_one) == [step] and len(found) > 15
    seeds = []
    for i, image in enumerate(found):
        workdir = lay_out(image, tmp_path / str(i))
        if step == 2:  # a step that is replaced is taken back by the next run
            assert Checkpoint.open(workdir).path.name in ("1", "2")
        with saver_of(workdir, LAYOUT) as saver:
            newest = saver.latest()
            assert set(steps(workdir)) <= {1, step}
            seeds.append(seed_of(workdir / f"checkpoints/{newest}"))
            assert_stored(workdir / f"checkpoints/{newest}", LAYOUT, seeds[-1])
            if i % 10 == 0:
                saver.save(state_of(LAYOUT, step=3, seed=3))
        assert i % 10 or assert_stored(workdir / "checkpoints/3", LAYOUT, seed=3) is None
        shutil.rmtree(workdir)
    assert seeds == sorted(seeds) and set(seeds) == {1, 2}


def seed_of(step: Path) -> int:
    """Which of the states it is."""
    found = Checkpoint.open(step).arrays().read("final_norm")
    leaf = LAYOUT.leaves["params.final_norm"]
    return next(seed for seed in (1, 2, 3) if np.array_equal(found, drawn(leaf, leaf.name, seed=seed)))


SAVES_FOR_EVER = """
import itertools, sys
from tests.training.states import *
from tests.training.test_saver import LAYOUT as layout
with saver_of(sys.argv[1], layout, Retention(keep=2)) as saver:
    for step in itertools.count(1 + (saver.latest() or 0)):
        saver.save(state_of(layout, step, seed=step))
        print(step, flush=True)
"""


def test_a_run_that_is_killed_again_and_again_has_its_newest_checkpoint_whole(tmp_path):
    """kill -9 of a process that does nothing but save, each time a moment later."""
    last = 0
    for i in range(2):
        command = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
            begun = [int(process.stdout.readline()) for _ in range(3)][-1]
            time.sleep(0.01 + 0.02 * i)
            process.send_signal(signal.SIGKILL)
        newest = int(Checkpoint.open(tmp_path).path.name)
        assert last < begun - 1 <= newest  # save returns when the one before is complete
        assert_stored(tmp_path / f"checkpoints/{newest}", LAYOUT, seed=newest)
        last = newest


# --- full disks


def test_a_disk_that_is_full_before_a_checkpoint_is_begun_is_reported(run_of_one, monkeypatch):
    """What is counted is everything: parameters, moments, tokenizer."""
    layout = layout_of("adamw", cfg=CFG)
    nbytes = sum(np.prod(leaf.shape) * 4 * len(leaf.names) for leaf in layout.leaves.values())
    usage = shutil.disk_usage(run_of_one)._replace(free=int(nbytes))
    before = snapshot(run_of_one)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    saver = saver_of(run_of_one, layout)
    saver.save(state_of(layout, step=2))
    with pytest.raises(
        LlamaError, match=r"step 2 was not written: .*has [0-9,]+ free: .*; the newest is that of step 1"
    ) as caught:
        saver.close()
    assert caught.value.code == ExitCode.DISK_FULL and snapshot(run_of_one) == before


@pytest.mark.parametrize("after", [0, 1, 5, 13])
def test_a_disk_that_is_full_in_the_middle_leaves_what_was_there_and_the_run_goes_on(run_of_one, monkeypatch, after):
    left, write = [None] * after, saving._write_part

    async def write_part(*args):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        await write(*args)

    before = snapshot(run_of_one)
    with saver_of(run_of_one, LAYOUT) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(saving, "_write_part", write_part)
            saver.save(state_of(LAYOUT, step=2))
            with pytest.raises(LlamaError, match=r"step 2 was not written: the disk of .* is full: .*newest is that of step 1"):
                saver.wait()
        assert snapshot(run_of_one) == before
        saver.save(state_of(LAYOUT, step=2, seed=2))
    assert_stored(run_of_one / "checkpoints/2", LAYOUT, seed=2)


def test_a_disk_that_is_full_indeed_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    with tiny_disk(tmp_path / "disk", "256k") as disk:
        with saver_of(disk / "run", LAYOUT) as saver:
            saver.save(state_of(LAYOUT, step=1, seed=1))
        monkeypatch.setattr(saving, "_check_space", lambda folder, nbytes: None)  # as if others wrote at the same time
        saver = saver_of(disk / "run", LAYOUT)
        failed = 0
        for step in range(2, 6):
            saver.save(state_of(LAYOUT, step, seed=1))
            try:
                saver.wait()
            except LlamaError as error:
                assert error.code == ExitCode.DISK_FULL and f"step {step} was not written" in str(error)
                failed += 1
        saver.close()
        assert failed >= 2
        for step in steps(disk / "run"):
            assert_stored(disk / f"run/checkpoints/{step}", LAYOUT, seed=1)


# --- what is kept

RETENTIONS = st.builds(Retention, st.integers(1, 4), st.sampled_from([0, 0, 2, 3, 10]), st.integers(0, 3))
SAVES = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([None, float("nan"), 1.0, 2.0, 3.0, 4.0]), st.booleans()), max_size=12
)


def kept_by(retention: Retention, metrics: dict[int, float]) -> set[int]:
    """Of these steps, in words: among the last, a multiple, or fewer than so many are better."""
    return {
        step
        for step, metric in metrics.items()
        if sum(other > step for other in metrics) < retention.keep
        or (retention.keep_every and step % retention.keep_every == 0)
        or (
            metric == metric
            and sum(other < metric or (other == metric and later > step) for later, other in metrics.items())
            < retention.keep_best
        )
    }


@hypothesis.settings(max_examples=40)
@hypothesis.given(RETENTIONS, SAVES)
def test_after_any_saves_and_restarts_what_is_kept_is_what_was_asked_for(tmp_path_factory, retention, saves):
    """Steps with metrics; True: the run begins anew before. Only the arrays are left out."""
    workdir = tmp_path_factory.mktemp("run")

    def write(checkpoint, rooms, *, finish, **options):
        (checkpoint.path / "state").mkdir(parents=True)
        finish(checkpoint)
        (checkpoint.path / MANIFEST).write_text("{}")

    model: dict[int, float] = {}
    step, saver = 0, saver_of(workdir, LAYOUT, retention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_saving, "save_rooms", write)
        for more, metric, again in saves:
            if again:
                saver.close()
                saver = saver_of(workdir, LAYOUT, retention)
            step += more
            saver.save(dataclasses.replace(STATE, step=jax.numpy.int32(step)), metric=metric)
            saver.wait()
            model[step] = float("nan") if metric is None else metric
            model = {step: model[step] for step in kept_by(retention, model)}
            assert steps(workdir) == sorted(model)
            assert saver.latest() == step
            measured = [metric for metric in model.values() if metric == metric]
            assert model.get(saver.best()) == min(measured, default=None)
    saver.close()


def test_a_metric_is_recorded_with_its_checkpoint(tmp_path):
    with saver_of(tmp_path, LAYOUT, Retention(keep=1, keep_best=1)) as saver:
        for step, metric in ((1, 3.0), (2, 1.5), (3, float("nan")), (4, None), (5, 2.0)):
            saver.save(state_of(LAYOUT, step), metric=metric)
        saver.wait()
        assert (saver.latest(), saver.best()) == (5, 2)
    assert [read_run(epath.Path(tmp_path / f"checkpoints/{step}"))["metric"] for step in steps(tmp_path)] == [1.5, 2.0]
    assert saver_of(tmp_path, LAYOUT).best() == 2


# --- several processes


def two_processes(folder: str) -> list[str]:
    """Save on a mesh over both, restore on another; then one fails, and both do."""
    layout, other = layout_of("lion", "1x8x1", scan=True), layout_of("lion", "2x2x2")
    store.MIN_CHUNK_BYTES = 64  # for small arrays to be in parts of both
    errors = []
    with saver_of(folder, layout) as saver:
        saver.save(state_of(layout, step=1, seed=1), extra={"seed": 5}, metric=1.0)
        saver.save(state_of(layout, step=2, seed=2), extra={"seed": 6})
        with pytest.MonkeyPatch.context() as patch:
            if jax.process_index() == 1:
                patch.setattr(saving, "_write_part", lambda *args: 1 / 0)
            try:
                saver.save(state_of(layout, step=3))
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        saver.save(state_of(layout, step=4, seed=4), metric=2.0)
        errors.append(f"{saver.latest()} {saver.best()}")
    state, extra = restore(folder, other, identity=IDENTITY)
    assert_is(state, other, step=4, seed=4)
    assert extra == {}
    return errors


def test_two_processes_save_together_and_one_restores(tmp_path):
    first, second = run(two_processes, tmp_path, processes=2, devices=4)
    assert first[0].startswith("LlamaError: the checkpoint of step 3 was not written: ") and first[1:] == ["4 1"]
    assert first[0].endswith("process 1 failed and says why; the newest is that of step 2")
    assert second == ["ZeroDivisionError: division by zero", "4 1"]
    assert steps(tmp_path) == [1, 2, 4]
    for layout in (layout_of("lion"), layout_of("lion", "1x1x8", scan=True)):
        state, extra = restore(tmp_path / "checkpoints/2", layout, identity=IDENTITY)
        assert_is(state, layout, step=2, seed=2)
        assert extra == {"seed": 6}
