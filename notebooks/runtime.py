"""What a notebook runs on: packages that are missing, what the hardware is good at, and where weights come from."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("jax", "jaxlib", "ml-dtypes", "numpy", "scipy")  # Colab's own, which match its TPU and CUDA plugins
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def install_missing() -> None:
    """Installs the packages that are missing or too old, each by itself: jax and what it stands on stay as they are.

    Raises:
        RuntimeError: jax itself is missing or too old.
    """
    wanted = missing(installed)
    if wanted:
        print("installing", *wanted, file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *wanted]
        subprocess.run(command, check=True)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for lines that begin with !


def missing(installed: Callable[[str], str | None]) -> list[str]:
    """What to install, as "NAME==VERSION" of requirements.txt.

    Args:
        installed: the version of a package, None where there is none.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {canonicalize_name(need.name): need.specifier for need in map(Requirement, project["dependencies"])}
    have = installed("jax")
    if have is None or not needs["jax"].contains(have, prereleases=True):
        raise RuntimeError(
            f"jax is {have or 'not installed'}, and llama_jax needs jax{needs['jax']}: in Colab choose the latest runtime "
            "(Runtime > Change runtime type), elsewhere an environment with llama_jax (make sample makes .venv)"
        )
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = []
    for pin in (Requirement(line) for line in lines if line):
        name, have = canonicalize_name(pin.name), installed(pin.name)
        if name in KEPT or (pin.marker and not pin.marker.evaluate()):
            continue
        if have is None or (name in needs and not needs[name].contains(have, prereleases=True)):
            wanted.append(f"{pin.name}{pin.specifier}")
    return wanted


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The devices, and what was chosen for them.

    Attributes:
        platform: cpu, gpu or tpu.
        devices: how many.
        kind: their name.
        memory_bytes: of one device; the host's on a CPU.
        dtype: of weights and activations when sampling.
        train_dtype: of the computation when training.
        rounding: how weights become 8 bits when the floats are too large.
    """

    platform: str
    devices: int
    kind: str
    memory_bytes: int
    dtype: str
    train_dtype: str
    rounding: str

    def __str__(self) -> str:
        return f"{self.devices} x {self.kind}: {self.dtype} to sample, {self.train_dtype} to train, {self.rounding} for 8 bits"

    def quantize(self, num_params: int) -> str | None:
        """`rounding` for a model whose floats would fill more than half of a device, None for a smaller one."""
        return self.rounding if self.float_bytes(num_params) > self.memory_bytes / 2 else None

    def float_bytes(self, num_params: int) -> int:
        return num_params * (4 if self.dtype == "float32" else 2)


def find_runtime() -> Runtime:
    """Asks jax for its devices.

    TPUs and GPUs since Ampere multiply bfloat16. Older ones (a T4) multiply float16, which has too small a range to train in.
    A CPU is fastest in float32, and with int8 weights where activations are rounded, too.
    """
    import jax
    import psutil

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    dtypes = {"tpu": ("bfloat16", "bfloat16"), "cpu": ("float32", "float32")}
    if device.platform == "gpu":
        old = float(getattr(device, "compute_capability", "8.0")) < 8
        dtypes["gpu"] = ("float16", "float32") if old else ("bfloat16", "bfloat16")
    return Runtime(
        device.platform,
        jax.device_count(),
        device.device_kind,
        stats.get("bytes_limit") or psutil.virtual_memory().total,
        *dtypes[device.platform],
        "w8a8" if device.platform == "cpu" else "int8",
    )


def find_weights(model: str) -> Path:
    """The folder of a model's weights.

    Args:
        model: "bundled"; a folder, also of Google Drive, which is mounted; or OWNER/NAME on Hugging Face, which is downloaded
            to checkpoints/NAME with the token that Colab's secrets, `hf auth login` or HF_TOKEN hold.
    """
    if model == "bundled":
        return Path("bundled/checkpoint")
    mount_drive(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    folder = Path("checkpoints") / model.split("/")[-1]
    snapshot_download(model, local_dir=folder, allow_patterns=WEIGHT_FILES, ignore_patterns="original/*", token=_token())
    return folder


def mount_drive(path: str) -> None:
    """Makes a path of Google Drive, /content/drive/..., be there; asks for permission in Colab."""
    if path.startswith("/content/drive/") and not Path("/content/drive/MyDrive").exists():
        from google.colab import drive

        drive.mount("/content/drive")


def _token() -> str | None:
    """Colab's secret; None lets huggingface_hub look where it always does."""
    try:
        from google.colab import userdata
    except ImportError:
        return None
    return userdata.get("HF_TOKEN")
