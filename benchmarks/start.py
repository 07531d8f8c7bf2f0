"""How long `python -m infer.sample` takes from the start of the process to the first character it writes.

    python benchmarks/start.py [--checkpoint DIR] [--runs 5]

Cold: an empty cache of compiled programs. Warm: the cache of the run before. Prints JSON; seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds_to_first_character(checkpoint: str, cache: str) -> tuple[float, float]:
    """From process start to the first character, and to the end."""
    command = [sys.executable, "-m", "infer.sample", "--config=configs/sample.py", f"--config.checkpoint={checkpoint}"]
    command += ["--prompt=Once upon a time", "--config.sampling.echo=False", "--config.max_new_tokens=100"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(1), "nothing was written"
        first = time.monotonic() - start
        process.stdout.read()
    return first, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="bundled/checkpoint")
    parser.add_argument("--runs", type=int, default=5, help="cold ones, and warm ones (default: 5)")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as cache:
            for kind in found:
                found[kind].append(seconds_to_first_character(args.checkpoint, cache))
    report = {
        kind: {
            "first_character_seconds": [round(first, 2) for first, _ in runs],
            "median": round(statistics.median(first for first, _ in runs), 2),
            "end_seconds_median": round(statistics.median(end for _, end in runs), 2),
        }
        for kind, runs in found.items()
    }
    print(json.dumps(report | {"cores": os.cpu_count()}, indent=1))


if __name__ == "__main__":
    main()
