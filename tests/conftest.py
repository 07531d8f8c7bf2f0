"""What every test runs under: matrix products in full float32, eight CPU devices to build meshes of, and examples of hypothesis
that are the same on every run."""

import pathlib
import signal

import hypothesis
import jax
import pytest

# A TPU multiplies float32 in bfloat16 unless told otherwise (jax-ml/jax#1856): parity at 1e-5 would be lost.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 8)
# What an earlier run has kept is not compiled, and what the compiler would have said of it not heard.
jax.config.update("jax_enable_compilation_cache", False)

# A shell that runs the suite in the background has Ctrl-C ignored, and programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("llama_jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("llama_jax")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real tokenizers and checkpoints beside the repository; it is not part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: it holds the tokenizers and checkpoints that this test reads")
    return SHARED
