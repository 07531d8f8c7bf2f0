"""The loop: steps, one ahead of their numbers; checkpoints, evaluations, and what ends a run early."""

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError
from train.begin import describe, record
from train.evaluate import Evaluator
from train.flops import Rates
from train.metrics import Log
from train.recipe import Recipe
from train.report import draw_report
from train.setup import Run, prepare

AGREE_STEPS = 5  # several processes ask each other so often whether one was told to stop: a collective
SPIKE_WINDOW, SPIKE_SIGMAS = 100, 6.0  # a loss so far above the mean of so many before it is noted
NAMED_DOCUMENTS = 8


def run_recipe(recipe: Recipe, workdir: epath.Path, command: str, devices: Sequence[jax.Device] | None = None) -> None:
    """Everything that `python -m train.main` does; all processes of a job call it.

    Args:
        devices: all there are when not given.

    Raises:
        LlamaError: see `prepare` and `train`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    run = prepare(recipe, workdir, command, devices)
    record(run)
    distributed.note(describe(run))
    log = Log(workdir, recipe.log, first_step=run.first_step, steps=run.steps, settings=recipe.values)
    with contextlib.closing(log), jax.set_mesh(run.mesh):
        train(run, log)


def train(run: Run, log: Log) -> None:
    """Runs until the last step, a signal, or a step that is not finite; call it under jax.set_mesh(run.mesh).

    Raises:
        LlamaError: SIGTERM came, and the run was saved (STOPPED); loss or gradient was not finite and the recipe says stop
            (NOT_FINITE_STEP).
    """
    state, step = run.state, run.first_step
    run.state = None  # its memory becomes the next state's
    reader, evaluator, profiler = _Reader(run, log), Evaluator(run), _Profiler(run)
    report = _Report(run)
    with _told_to_stop() as told, contextlib.closing(run.batches(step)) as batches, profiler, run.saver as saver:
        while step < run.steps:
            profiler.before(step + 1)
            began = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - began
            state, numbers = run.train_step(state, batch)
            step += 1
            reader.add(step, numbers, waited)
            profiler.after(step, numbers)
            last, stopping = step == run.steps, _agreed(told, step)
            evaluates, saves = last or _is_multiple(step, run.recipe.eval.every), _is_multiple(step, run.recipe.save.every)
            if evaluates or saves or stopping:
                reader.read_all()
                found = evaluator(state) if evaluates and not stopping else {}
                if found:
                    log.evaluation(step, found)
                if last or saves or stopping:
                    saver.save(state, metric=_mean_loss(found))
                reader.forget_time()
            if stopping and not last:
                saver.wait()
                raise LlamaError(
                    ExitCode.STOPPED,
                    f"SIGTERM: saved after step {step:,} of {run.steps:,}; the same command goes on from there",
                )
            report.draw_when_due()
    report.draw()


class _Reader:
    """Reads a step's numbers when the next one is under way, so that the devices do not wait for the host; on a CPU, which is
    both and runs a step in the call (train.host_memory), at once."""

    def __init__(self, run: Run, log: Log):
        self._run, self._log = run, log
        self._rates = Rates(run.cfg, run.recipe, run.mesh)
        self._waiting: deque[tuple[int, Any, float]] = deque()
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._last = time.monotonic()
        self._under_way = 0 if jax.default_backend() == "cpu" else 1

    def add(self, step: int, numbers: Any, waited: float) -> None:
        """A step that is under way, whose batch took so long to come."""
        self._waiting.append((step, numbers, waited))
        while len(self._waiting) > self._under_way:
            self._read()

    def read_all(self) -> None:
        while self._waiting:
            self._read()

    def forget_time(self) -> None:
        """What was done since is no step's time."""
        self._last = time.monotonic()

    def _read(self) -> None:
        step, numbers, waited = self._waiting.popleft()
        values = {name: float(value) for name, value in jax.device_get(numbers).items()}
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        finite = values.pop("finite")
        self._log.step(step, values | {"step_seconds": seconds, "input_seconds": waited} | self._rates(seconds))
        if not finite:
            self._report_not_finite(step, values)
        else:
            self._look_for_spike(step, values["loss"])

    def _report_not_finite(self, step: int, values: dict[str, float]) -> None:
        said = (
            f"step {step:,} is not finite: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}, parameter norm "
            f"{values['param_norm']:.4g}; its documents: {self._documents(step)}"
        )
        if self._run.step_config.nonfinite == "stop":
            self._run.saver.wait()
            latest = self._run.saver.latest()
            where = "there is no checkpoint yet" if latest is None else f"the last checkpoint is that of step {latest:,}"
            raise LlamaError(
                ExitCode.NOT_FINITE_STEP,
                f"{said}. Nothing of it was kept; {where}. Look at these documents, lower optimizer.peak_lr, or go on with "
                "--config.train.nonfinite=skip",
            )
        self._log.note(f"{said}: skipped")

    def _look_for_spike(self, step: int, loss: float) -> None:
        if len(self._losses) == SPIKE_WINDOW:
            mean, sigma = float(np.mean(self._losses)), float(np.std(self._losses))
            if loss > mean + SPIKE_SIGMAS * max(sigma, 1e-3 * mean):
                self._log.note(
                    f"step {step:,}: a loss of {loss:.4f} after a mean of {mean:.4f}; its documents: {self._documents(step)}"
                )
        self._losses.append(loss)

    def _documents(self, step: int) -> str:
        names = self._run.documents(step)
        more = f" and {len(names) - NAMED_DOCUMENTS} more" if len(names) > NAMED_DOCUMENTS else ""
        return ", ".join(names[:NAMED_DOCUMENTS]) + more


class _Profiler(contextlib.AbstractContextManager):
    """Writes a trace of the steps that the recipe names into WORKDIR/profile, for TensorBoard or Perfetto."""

    def __init__(self, run: Run):
        self._steps, self._folder = run.recipe.profile, str(run.workdir / "profile")
        self._on = False

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, numbers: Any) -> None:
        if self._on and step == self._steps[1]:
            jax.block_until_ready(numbers)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


class _Report:
    """Draws report.png now and then; in process 0."""

    def __init__(self, run: Run):
        self._workdir, self._every = run.workdir, run.recipe.log.report_seconds
        self._last = time.monotonic()

    def draw_when_due(self) -> None:
        if time.monotonic() - self._last >= self._every:
            self.draw()

    def draw(self) -> None:
        if distributed.is_main():
            draw_report(self._workdir)
        self._last = time.monotonic()


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _mean_loss(found: dict[str, Any]) -> float | None:
    """Of all held-out sets: what the best checkpoint has least of."""
    values = [value for name, value in found.items() if name.endswith("/loss")]
    return math.fsum(values) / len(values) if values else None


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: a preempted machine, `kill`, a scheduler at its time limit."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _agreed(told: threading.Event, step: int) -> bool:
    """Whether any process was told to stop; all of them say the same at the same step."""
    if jax.process_count() == 1:
        return told.is_set()
    return step % AGREE_STEPS == 0 and bool(multihost_utils.process_allgather(np.int32(told.is_set())).any())
