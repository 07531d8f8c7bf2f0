"""--help of every program answers at once, which is before jax is loaded, and has an example."""

import subprocess
import sys

import pytest

PROGRAMS = (
    *(f"llama_jax.{name}" for name in ("convert", "verify", "export", "inspect", "quantize", "plan", "data.prepare")),
    *(f"infer.{name}" for name in ("sample", "chat", "score", "bench", "compare")),
    *(f"train.{name}" for name in ("main", "bench")),
)
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert ended.code in (None, 0, 1), ended.code  # absl leaves with 1
loaded = {"jax", "flax", "optax", "orbax", "grain", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_an_example_and_loads_no_jax(program):
    done = subprocess.run([sys.executable, "-c", HELP, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"python -m {program} " in done.stdout
