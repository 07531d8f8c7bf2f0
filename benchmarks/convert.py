"""How fast llama_jax.convert is, next to copying the same files: a conversion should cost little more than the disk.

    python benchmarks/convert.py --gib 3 --folder /path/on/the/disk

Writes a synthetic Hugging Face checkpoint (bfloat16, several files), then measures in turn, so that a disk that slows down
slows both: `cp -r` and `python -m llama_jax.convert`, each until its files are on the disk (`sync -f`). Prints JSON. A
conversion includes the start of Python, reads everything twice (weights and hashes) and writes once; a copy reads once.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llama_jax.checkpoint.huggingface_writer import write_huggingface  # noqa: E402
from llama_jax.checkpoint.layout import leaf_of, shapes  # noqa: E402
from llama_jax.config import ModelConfig  # noqa: E402
from llama_jax.config_files import to_huggingface  # noqa: E402

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def config_of(nbytes: int) -> ModelConfig:
    """Wide enough that tensors are large, as many layers as the size asks for."""

    def config(num_layers: int) -> ModelConfig:
        return ModelConfig(32000, 2048, num_layers, 32, 8, 64, 5632, 4096, 1e-5, 1e4)

    one, two = config(1).num_params, config(2).num_params
    return config(max(1, 1 + round((nbytes / BFLOAT16.itemsize - one) / (two - one))))


def write_source(folder: Path, cfg: ModelConfig) -> None:
    """Random finite weights: nothing that a file system or a format could leave out."""
    block = np.random.default_rng(0).normal(0, 0.02, 2**22).astype(np.float32).astype(BFLOAT16)

    def read(name: str) -> np.ndarray:
        return np.resize(np.roll(block, zlib.crc32(name.encode()) % block.size), shapes(cfg)[leaf_of(name)])

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_huggingface(cfg)))
    write_huggingface(folder, cfg, BFLOAT16, read, shard_bytes=cfg.num_params * BFLOAT16.itemsize // 3)


def timed(argv: list[str], output: Path) -> tuple[float, float, int]:
    """Seconds until the program ended, seconds until its files were on the disk, and its largest anonymous memory."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        ended = time.monotonic() - start
        if process.returncode:
            err.seek(0)
            raise SystemExit(f"{' '.join(argv)} failed: {err.read()[-2000:]}")
    subprocess.run(["sync", "-f", str(output)], check=True)
    return ended, time.monotonic() - start, peak


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def drop_caches() -> bool:
    """Empties the page cache, so that sources come from the disk; only root may, elsewhere they come from memory."""
    if not os.access(DROP_CACHES, os.W_OK):
        return False
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:  # a container without the right
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0, help="size of the checkpoint (default: 3)")
    parser.add_argument("--runs", type=int, default=3, help="of each program (default: 3)")
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    args = parser.parse_args()
    cfg = config_of(int(args.gib * 2**30))
    nbytes = cfg.num_params * BFLOAT16.itemsize
    found: dict[str, list[tuple[float, float, int]]] = {"copy": [], "convert": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, output = Path(scratch, "source"), Path(scratch, "output")
        write_source(source, cfg)
        files = len(list(source.glob("*.safetensors")))
        os.sync()
        programs = {
            "copy": ["cp", "-r", str(source), str(output)],
            "convert": [sys.executable, "-m", "llama_jax.convert", "--source", str(source), "--output", str(output)],
        }
        for _ in range(args.runs):
            for name, argv in programs.items():
                dropped = drop_caches()
                found[name].append(timed(argv, output))
                shutil.rmtree(output)
    report = {
        "bytes": nbytes,
        "files": files,
        "page_cache": "dropped before each run" if dropped else "not dropped (not root): the source may be in memory",
        "cores": os.cpu_count(),
        **{
            name: {
                "mb_per_second": [round(nbytes / 1e6 / synced, 1) for _, synced, _ in runs],
                "seconds_until_ended": [round(ended, 2) for ended, _, _ in runs],
                "seconds_until_on_disk": [round(synced, 2) for _, synced, _ in runs],
            }
            for name, runs in found.items()
        },
        "median_ratio_convert_to_copy": round(
            statistics.median(b[1] / a[1] for a, b in zip(found["copy"], found["convert"], strict=True)), 2
        ),
        "convert_peak_rss_anon_mb": round(max(run[2] for run in found["convert"]) / 1e6),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
