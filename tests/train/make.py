"""Small runs of train.main, in this process or in one that can be killed: recipes, data, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from llama_jax.checkpoint.store import STEPS, ArrayReader, complete_steps
from tests.text.make import small_sentencepiece
from train.loop import run_recipe
from train.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 420
MODEL = dict(vocab_size=VOCAB, num_layers=2)  # changes of the preset `tiny`
NAMES = ("Lily", "Tom", "Ben", "Anna")


def write_texts(file: Path, count: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    stories = [f"Once upon a time, {rng.choice(NAMES)} met {rng.choice(NAMES)}. " * rng.integers(1, 4) for _ in range(count)]
    file.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return file


def write_chats(file: Path, count: int = 40) -> Path:
    def turns(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Who is {i}?"}, {"role": "assistant", "content": NAMES[i % len(NAMES)]}]

    file.write_text("".join(json.dumps({"messages": turns(i)}) + "\n" for i in range(count)))
    return file


def write_tokenizer(file: Path) -> Path:
    small_sentencepiece(file, vocab_size=VOCAB)
    return file


def config_of(module: ModuleType, preset: str = "tiny", **settings: Any) -> ml_collections.ConfigDict:
    """A config with settings changed, as `--config.KEY=VALUE` would: dots are written as two underscores."""
    config = module.get_config(preset)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in settings.items()})
    return config


def run(config: ml_collections.ConfigDict, workdir: Path, devices: int = 1) -> None:
    """In this process, on so many of its devices."""
    run_recipe(read_recipe(config), epath.Path(workdir), "python -m train.main", jax.devices()[:devices])


def command(workdir: Path, name: str = "pretrain", preset: str = "tiny", **settings: Any) -> list[str]:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "train.main", f"--config=configs/{name}.py:{preset}", f"--workdir={workdir}", *flags]


def environment(cache: Path) -> dict[str, str]:
    """Of a process whose programs are compiled once for all of a test's."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def start(arguments: list[str], cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """Exit code and stderr."""
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def signal_after(process: subprocess.Popen, workdir: Path, step: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal as soon as so many steps have a line in metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < step):
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(number)


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def numbers(workdir: Path) -> list[dict[str, float]]:
    """Of every step, what does not depend on the clock."""
    timed = ("step_seconds", "input_seconds", "tokens_per_second", "hbm_bytes")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines(workdir)]


def stored(workdir: Path, step: int | None = None) -> Mapping[str, bytes]:
    """Every array of a checkpoint, the newest's when no step is given, as bytes."""
    step = max(complete_steps(epath.Path(workdir))) if step is None else step
    folder = epath.Path(workdir) / STEPS / str(step)
    arrays = json.loads((folder / "state" / "run.json").read_text())["arrays"]
    found = {}
    for name in arrays:
        room, _, array = name.partition("/")
        found[name] = np.ascontiguousarray(ArrayReader(folder / room).read(array)).tobytes()
    return found
