"""Runs a function of a test module in fresh Pythons with several CPU devices: how many there are is settled once per process.

def both_sums(folder): ...                       # at the top of a test module; its own asserts, a JSON value back
first, second = run(both_sums, tmp_path, processes=2, devices=4)
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]


def run(function: Callable, *args: Any, devices: int = 8, processes: int = 1, seconds: float = 180) -> list[Any]:
    """What function(*args) returns in each process, in their order.

    Args:
        function: of the top of a module; called with args as strings.
        devices: of each process.
        seconds: after which they are killed.

    Raises:
        AssertionError: one of them failed; with what all of them printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.checkpoint.mesh", function.__module__, function.__name__]
    started = [
        subprocess.Popen(
            [*command, str(devices), str(processes), str(process), str(port), *map(str, args)],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process in range(processes)
    ]  # fmt: skip
    try:
        printed = [child.communicate(timeout=seconds) for child in started]
    finally:
        for child in started:
            child.kill()
    said = "\n".join(f"process {i} (exit {child.returncode}):\n{printed[i][1]}" for i, child in enumerate(started))
    assert not any(child.returncode for child in started), said
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def main() -> None:
    module, function, devices, processes, process, port, *args = sys.argv[1:]
    warnings.simplefilter("error")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    assert len(jax.local_devices()) == int(devices)
    print(json.dumps(getattr(importlib.import_module(module), function)(*args)), flush=True)


if __name__ == "__main__":
    main()
