"""Numbers of a run, as they come: WORKDIR/metrics.jsonl and eval.jsonl always, TensorBoard, Weights & Biases, the console."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from etils import epath
from tqdm import tqdm

from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError
from train.recipe import LogConfig

METRICS, EVALS = "metrics.jsonl", "eval.jsonl"
LINES_SECONDS = 10.0  # between two lines of a console that is no terminal


class Log:
    """Writes a line for every step and every evaluation; in process 0, the others' does nothing.

    A run that goes on after step N first drops the lines of later steps: they are made again.
    """

    def __init__(self, workdir: epath.Path, config: LogConfig, *, first_step: int, steps: int, settings: Mapping[str, Any]):
        self._writers: list[Any] = []
        self._files: dict[str, TextIO] = {}
        self._bar: tqdm | None = None
        self._last_line = -math.inf
        self._steps = steps
        if not distributed.is_main():
            return
        if config.wandb:  # first: it may not be installed, and nothing is open yet
            self._writers.append(_WandB(config.wandb, workdir, settings))
        if config.tensorboard:
            self._writers.append(_TensorBoard(workdir / "tensorboard", first_step))
        for name in (METRICS, EVALS):
            _drop_later(workdir / name, first_step)
            self._files[name] = (workdir / name).open("a")
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step that is done; steps come in order, each once."""
        if not self._files:
            return
        self._write(METRICS, {"step": step, **values})
        for writer in self._writers:
            writer.write(step, {f"train/{name}": value for name, value in values.items()})
        said = _said(values)
        if self._bar is not None:
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= LINES_SECONDS or step == self._steps:
            self._last_line = time.monotonic()
            left = (self._steps - step) * values.get("step_seconds", 0.0)
            print(f"step {step:,}/{self._steps:,}  {said}  {_clock(left)} left", file=sys.stderr, flush=True)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """What an evaluation found: numbers, and texts (which are not drawn)."""
        if not self._files:
            return
        self._write(EVALS, {"step": step, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        for writer in self._writers:
            writer.write(step, {f"eval/{name}": value for name, value in numbers.items()})
        self.note(f"step {step:,}  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        for sample in values.get("samples", ()):
            self.note(f"  {sample['prompt']!r} -> {sample['text']!r}")

    def note(self, message: str) -> None:
        """A line on stderr, above the progress bar."""
        if not self._files:
            return
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for file in self._files.values():
            file.close()
        for writer in self._writers:
            writer.close()

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        self._files[name].flush()


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a file of this module; a last one that a kill cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class _TensorBoard:
    def __init__(self, folder: epath.Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, workdir: epath.Path, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise LlamaError(
                ExitCode.BAD_CONFIG, f"log.wandb is {project!r} and wandb is not installed: pip install 'llama_jax[wandb]'"
            ) from None
        name = Path(workdir).absolute().name
        self._run = wandb.init(project=project, id=name, name=name, dir=str(workdir), config=dict(settings), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _drop_later(path: epath.Path, step: int) -> None:
    """Lines of later steps are made again, and so is one that a kill cut short."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    beside = path.parent / f"{path.name}.new"
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
    beside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and what they are is told beside them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(values: Mapping[str, float]) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu_causal" in values:
        parts.append(f"MFU {values['mfu_causal']:.1%} (PaLM's {values['mfu_palm']:.1%})")
    if "hbm_bytes" in values:
        parts.append(f"HBM {values['hbm_bytes'] / 2**30:.1f} GiB")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
