"""What every test runs under: matrix products in full float32, eight CPU devices to build meshes of, and examples of hypothesis
that are the same on every run."""

import os
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

QUICKLY = "--xla_backend_optimization_level=0"
# jax 0.10's newer emitters take twice as long as its old ones; later versions have no others.
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quickly", action="store_true", help="compile in less than half the time, to slower code than users run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quickly"):  # read when the first program is compiled, and by processes that tests start
        os.environ["XLA_FLAGS"] = f"{QUICKLY} {OLD_EMITTERS} {os.environ.get('XLA_FLAGS', '')}"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real tokenizers and checkpoints beside the repository; it is not part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: it holds the tokenizers and checkpoints that this test reads")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared) -> pathlib.Path:
    """The folder of Karpathy's trained model."""
    folder = shared / "checkpoints" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
