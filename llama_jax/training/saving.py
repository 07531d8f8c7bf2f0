"""Saving a training run: `WORKDIR/checkpoints/STEP = {checkpoint.json, tokenizer files, params/, state/}`.

STEP is a checkpoint like any other: params/ has float32 weights (or adapter/ a LoRA run's), and what reads checkpoints takes
STEP, or WORKDIR for its newest. state/ has all else that the next step depends on (llama_jax.training.stored), and run.json:
step, settings that must agree, what the program gave. checkpoint.json is written last and removed first: a run may be killed at
any instant, and its newest complete checkpoint is found.

A process that is alone is held up while the arrays are copied into its memory; a thread writes them while training goes on.
Several processes write together before any of them goes on: the barriers of a thread would be collectives, which would meet
those of the step that runs meanwhile.
"""

import concurrent.futures
import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax.checkpoint.arrays import everywhere, on_host
from llama_jax.checkpoint.save import REPLACED, Room, recover, remove, save_rooms
from llama_jax.checkpoint.store import STEPS, Checkpoint, complete_steps
from llama_jax.distributed import note
from llama_jax.errors import LlamaError
from llama_jax.training.state import TrainState
from llama_jax.training.stored import StateLayout

RUN = "state/run.json"


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept; the newest always is.

    Attributes:
        keep: the newest so many, at least 1.
        keep_every: besides, those of steps that are its multiples, for ever; 0 for none.
        keep_best: besides, the so many of lowest metric.
    """

    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0

    def steps(self, metrics: Mapping[int, float | None]) -> set[int]:
        """The steps to keep, of those that have a checkpoint.

        Args:
            metrics: by step; None where there is none.
        """
        for_ever = [step for step in metrics if self.keep_every and step % self.keep_every == 0]
        return {*sorted(metrics)[-self.keep :], *for_ever, *best_first(metrics)[: self.keep_best]}


class Saver:
    """Writes the checkpoints of a run, and removes those that need not be kept.

        with Saver(workdir, layout, Retention(), identity={"optimizer.name": "adamw"}) as saver:
            saver.save(state, extra={"seed": 0})

    All processes call every method, in the same order. An error of the thread is raised by the next call: of save, which then
    does not begin, of wait, or of close at the end of the block. After one the other checkpoints are as they were, what was
    begun is removed, and both saver and run may go on.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        layout: StateLayout,
        retention: Retention,
        *,
        identity: Mapping[str, Any],
        tokenizer_files: Sequence[Path] = (),
        chat_format: str = "",
        source: Mapping[str, Any] | None = None,
        command: str = "",
        adapter: Mapping[str, Any] | None = None,
    ):
        """Tidies what a killed run has left in the workdir: make the saver before looking for a checkpoint to go on from.

        Args:
            layout: of the states to be saved.
            identity: settings that a run must share to go on from these checkpoints, as JSON can hold them; those of the model
                and of the layout's form are known.
            tokenizer_files, chat_format, source, command: of the checkpoints; see Checkpoint.
            adapter: of a LoRA run, what `llama_jax.checkpoint.adapter.adapter_record` says.
        """
        self._steps = epath.Path(workdir) / STEPS
        self._layout = layout
        self._retention = retention
        self._identity = layout.identity() | dict(identity)
        self._tokenizer_files = tuple(tokenizer_files)
        assert (adapter is not None) == bool(layout.form.lora.rank)
        self._checkpoint = Checkpoint(
            path=self._steps,
            config=layout.cfg,
            dtype=np.dtype(np.float32),
            chat_format=chat_format,
            tokenizer=tuple(file.name for file in tokenizer_files),
            source=source or {},
            command=command,
            adapter=adapter,
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._writing: concurrent.futures.Future[None] | None = None
        self._saved = -1
        with everywhere("the old checkpoints were not looked at"):
            if jax.process_index() == 0:
                _tidy(self._steps)
        self._metrics = {step: _metric(self._steps / str(step)) for step in self._complete()}

    def save(self, state: TrainState, *, extra: Mapping[str, Any] | None = None, metric: float | None = None) -> None:
        """Writes the state as it is now; it may be donated as soon as this returns. A step that this saver has saved is not
        written again; one that another run left is replaced.

        Args:
            extra: what `restore` gives back, as JSON can hold it: the seed, the data's fingerprint, the config.
            metric: of these weights, the lower the better: the loss of an evaluation, made before. NaN is none.

        Raises:
            LlamaError: there is no room for it, or the one before could not be written. OSError and others likewise.
        """
        self.wait()
        step = int(state.step)
        if step == self._saved:
            return
        rooms = self._layout.rooms(state)
        metric = None if metric is None or math.isnan(metric) else float(metric)
        run = {"step": step, "metric": metric, "identity": self._identity, "extra": dict(extra or {})}
        text = json.dumps({**run, "arrays": self._layout.arrays()}, indent=1) + "\n"
        if jax.process_count() > 1:
            self._write(step, rooms, metric, text)
            return
        rooms = {name: Room(on_host(room.leaves), room.axes) for name, room in rooms.items()}
        self._writing = self._pool.submit(self._write, step, rooms, metric, text)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            Exception: what the thread has met with, once.
        """
        if self._writing is not None:
            concurrent.futures.wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    def latest(self) -> int | None:
        """The newest step that has a checkpoint."""
        return max(self._complete(), default=None)

    def best(self) -> int | None:
        """The step whose checkpoint has the lowest metric."""
        return next(iter(best_first({step: self._metrics.get(step) for step in self._complete()})), None)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: types.TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as also:  # what ended the block is to be seen
            note(f"warning: the last checkpoint was not written: {also}")

    def _complete(self) -> list[int]:
        return complete_steps(self._steps.parent)

    def _write(self, step: int, rooms: Mapping[str, Room], metric: float | None, run: str) -> None:
        """Writes a checkpoint, then removes those that need not be kept."""
        checkpoint = dataclasses.replace(self._checkpoint, path=self._steps / str(step))
        first = jax.process_index() == 0

        def finish(checkpoint: Checkpoint) -> Checkpoint:
            if first:
                (checkpoint.path / RUN).write_text(run)
            return checkpoint

        try:
            save_rooms(checkpoint, rooms, tokenizer_files=self._tokenizer_files, overwrite=True, finish=finish)
        except LlamaError as error:
            newest = self.latest()
            left = "there is no other" if newest is None else f"the newest is that of step {newest}"
            raise LlamaError(error.code, f"the checkpoint of step {step} was not written: {error}; {left}") from None
        self._saved = step
        self._metrics[step] = metric
        with everywhere("old checkpoints were not removed"):
            if first:
                complete = self._complete()
                kept = self._retention.steps({step: self._metrics.get(step) for step in complete})
                for old in complete:
                    if old not in kept:
                        remove(self._steps / str(old))


def best_first(metrics: Mapping[int, float | None]) -> list[int]:
    """Steps that have a metric, the lowest first; of equal ones the later."""
    return sorted((step for step, metric in metrics.items() if metric is not None), key=lambda step: (metrics[step], -step))


def read_run(folder: epath.Path) -> dict[str, Any]:
    """run.json of the checkpoint of a training run: step, metric, identity, extra, arrays."""
    return json.loads((folder / RUN).read_text())


def _metric(folder: epath.Path) -> float | None:
    try:
        return read_run(folder)["metric"]
    except (OSError, ValueError):  # `restore` says so, should it be wanted
        return None


def _tidy(steps: epath.Path) -> None:
    """Removes checkpoints that were begun and are not complete, and takes back those that were being replaced."""
    names = {child.name.removesuffix(REPLACED) for child in steps.iterdir()} if steps.is_dir() else ()
    for name in filter(str.isdecimal, names):
        recover(steps / name)
        for folder in (steps / name, steps / (name + REPLACED)):
            if folder.is_dir() and not any(folder.iterdir()):  # neither marked yet nor there any more
                folder.rmdir()
