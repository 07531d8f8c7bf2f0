"""Several Python processes on this machine, as if they were hosts: each with 4 CPU devices, none left over."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 4  # of each process


@dataclasses.dataclass
class Process:
    """A process that runs, or has ended; `stdout` and `stderr` grow while it runs, `ended` is in time.monotonic() seconds."""

    popen: subprocess.Popen
    stdout: str = ""
    stderr: str = ""
    ended: float = 0.0
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Returns once the process has printed the text, on stdout or stderr."""
        with self.changed:
            came = self.changed.wait_for(lambda: text in self.stdout + self.stderr or self.ended, timeout)
            assert came and text in self.stdout + self.stderr, f"no {text!r} in:\n{self.stdout}{self.stderr}"

    @property
    def code(self) -> int:
        """Exit code; minus the signal's number for one that was killed."""
        return self.popen.returncode


class Processes:
    """`with Processes([[script, "0"], [script, "1"]]) as processes`: starts them, and kills what is left at the end."""

    def __init__(self, arguments: Sequence[Sequence[str]], *, devices: int = DEVICES, env: Mapping[str, str] | None = None):
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "SLURM_", "OMPI_"))},
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        }
        self.arguments = arguments
        self.threads: list[threading.Thread] = []
        self.all: list[Process] = []

    def __enter__(self) -> "Processes":
        for arguments in self.arguments:
            popen = subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            process = Process(popen)
            self.all.append(process)
            for name in ("stdout", "stderr"):
                thread = threading.Thread(target=_collect, args=(process, name), daemon=True)
                thread.start()
                self.threads.append(thread)
        return self

    def __getitem__(self, index: int) -> Process:
        return self.all[index]

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes of all, once they have ended.

        Raises:
            subprocess.TimeoutExpired: one has not.
        """
        deadline = time.monotonic() + timeout
        for process in self.all:
            process.popen.wait(max(deadline - time.monotonic(), 0.01))
        for thread in self.threads:
            thread.join(5)
        return [process.code for process in self.all]

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait()
        for thread in self.threads:
            thread.join(5)
        for process in self.all:
            process.popen.stdout.close()
            process.popen.stderr.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _collect(process: Process, name: str) -> None:
    for line in getattr(process.popen, name):
        with process.changed:
            setattr(process, name, getattr(process, name) + line)
            process.changed.notify_all()
    process.popen.wait()
    with process.changed:
        process.ended = process.ended or time.monotonic()
        process.changed.notify_all()
