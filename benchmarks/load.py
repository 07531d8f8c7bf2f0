"""How fast weights are loaded, next to reading their files, and how much memory of the host's own that takes.

    python benchmarks/load.py --preset tinyllama_1b --folder DIR [--quantize int8]
    python benchmarks/load.py --checkpoint DIR

Without a checkpoint, random bfloat16 weights of the preset are written to DIR in Hugging Face's form first. Then, --rounds
times in turn: `cat` of the files to /dev/null, and llama_jax.load in a process of its own, until the weights are on the device,
on a CPU until each of their bytes was read once: what is mapped is not there before. Prints JSON: the best of each, the load's
share of cat's speed, with what it imports and without, and the most RssAnon that the process had (weights that were copied are
in it, mapped ones are not). Reads come from the page cache where the files fit there.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from convert import ROOT, write_source  # beside this file; puts the checkout on the path

from llama_jax.config import PRESETS


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load(folder: str, quantize: str) -> None:
    """Prints seconds and memory of one load."""
    import jax

    import llama_jax

    jax.devices()
    before = most = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    read = llama_jax.load  # with all that it imports
    imported = time.perf_counter()
    params = jax.block_until_ready(read(folder, quantize=quantize).engine.params)
    leaves = jax.tree.leaves(params)
    if jax.devices()[0].platform == "cpu":
        for leaf in leaves:
            np.max(np.asarray(leaf).reshape(-1).view(np.uint8))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    found = {"load_seconds": seconds, "import_seconds": imported - start}
    memory = {"anonymous_before": before, "anonymous_most": most, "weights_bytes": sum(leaf.nbytes for leaf in leaves)}
    print(json.dumps(found | memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tinyllama_1b")
    parser.add_argument("--folder", type=Path, help="where the random weights are, or go")
    parser.add_argument("--checkpoint", help="instead: ours, Meta's or Hugging Face's")
    parser.add_argument("--quantize", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        return load(args.checkpoint, args.quantize)
    if not args.checkpoint and not args.folder:
        parser.error("--folder says where to write the random weights; or give a --checkpoint")
    if not args.checkpoint and not args.folder.exists():
        write_source(args.folder, PRESETS[args.preset])
    folder = args.checkpoint or str(args.folder)
    files = [str(path) for path in Path(folder).rglob("*") if path.is_file()]
    command = [sys.executable, __file__, "--once", "--checkpoint", folder, "--quantize", args.quantize]
    reads, loads = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        subprocess.run("cat > /dev/null " + " ".join(map(repr, files)), shell=True, check=True)
        reads.append(time.perf_counter() - start)
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        loads.append(json.loads(done.stdout.splitlines()[-1]))
    best = min(loads, key=lambda found: found["load_seconds"])
    size, cat = sum(Path(file).stat().st_size for file in files), min(reads)
    best |= {"share": cat / best["load_seconds"], "weights_share": cat / (best["load_seconds"] - best["import_seconds"])}
    print(json.dumps({"quantize": args.quantize, "file_bytes": size, "cat_seconds": cat, **best}))


if __name__ == "__main__":
    main()
