"""Runs on one GPU what this repository claims of GPUs: python benchmarks/gpu.py OUTPUT_DIR -> OUTPUT_DIR/*.json

Text, scores and training steps in float32 against the same on this machine's CPU; the attention kernel (gpu_attention.py);
training speed of TinyLlama-1.1B's shape and of a LoRA over 7B's. Each part is a process of its own with a time limit; one that
fails leaves its error, and the others run.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ["-m", "train.bench"]
TINYLLAMA = ["--config=configs/train_bench.py:tinyllama_1b", "--config.parts=False", "--config.train.length=2048"]
SEVEN = [
    "--config=configs/train_bench.py:llama2_7b",
    "--config.parts=False",
    "--config.train.length=4096",
    "--config.train.remat=full",
]
LORA = ["--config.lora.rank=16", "--config.lora.base_dtype=bfloat16", "--config.documents=8"]
PARTS: dict[str, tuple[list[str], int]] = {  # arguments of python, seconds
    "attention": (["benchmarks/gpu_attention.py", "85"], 110),
    "tinyllama_none": ([*BENCH, *TINYLLAMA, "--config.train.batch_size=8", "--config.train.remat=none"], 130),
    "tinyllama_projections": ([*BENCH, *TINYLLAMA, "--config.train.batch_size=16", "--config.train.remat=projections"], 130),
    "lora_7b": ([*BENCH, *SEVEN, *LORA, "--config.train.batch_size=2", "--config.train.scan_layers=true"], 100),
}
STEPS = """
import json, sys
from pathlib import Path
import jax
sys.path.insert(0, ".")
from configs import pretrain
from tests.train.make import config_of, run, write_texts, numbers
folder = Path(sys.argv[1])
folder.mkdir()
config = config_of(pretrain, data__train=str(write_texts(folder / "texts.jsonl")), tokenizer="bundled/checkpoint",
    model__vocab_size=4096, train__steps=10, train__batch_size=4, train__length=128, train__dtype="float32", data__workers=1,
    save__every=0, log__tensorboard=False)
run(config, folder / "run")
print(json.dumps([line["loss"] for line in numbers(folder / "run")]))
"""
SCORES = """
import json, llama_jax
llama = llama_jax.load("bundled/checkpoint", dtype="float32")
text = llama.generate([""], temperature=0, max_new_tokens=100)[0]
print(json.dumps({"tokens": list(text.tokens), "logprobs": [float(x) for x in llama.score([1, *text.tokens]).logprobs]}))
"""


def python(arguments: list[str], seconds: int, platform: str) -> dict[str, object]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        out, error, code = done.stdout, done.stderr[-3000:], done.returncode
    except subprocess.TimeoutExpired as late:
        out, error, code = (late.stdout or b"").decode(), f"stopped after {seconds} s", 124
    lines = []
    for line in out.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            lines.append(line)
    found = {"seconds": round(time.monotonic() - start, 1), "lines": lines}
    return found if code == 0 else found | {"code": code, "stderr": error}


def equal_to_cpu(name: str, output: Path) -> dict[str, object]:
    """Greedy text and its log-probabilities (score), or ten losses (train), on the GPU and on the CPU."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:

        def run(platform: str) -> concurrent.futures.Future:
            arguments = ["-c", SCORES] if name == "score" else ["-c", STEPS, str(output / f"steps_{platform}")]
            return pool.submit(python, arguments, 90, platform)

        found = {platform: future.result() for platform, future in [(p, run(p)) for p in ("cuda", "cpu")]}
    if all(part["lines"] for part in found.values()):
        ours, wanted = (found[platform]["lines"][-1] for platform in ("cuda", "cpu"))
        if name == "score":
            found["same_tokens"] = ours["tokens"] == wanted["tokens"]
            ours, wanted = ours["logprobs"], wanted["logprobs"]
        found["largest_difference"] = max(abs(a - b) for a, b in zip(ours, wanted, strict=False))
    return found


def main() -> None:
    output = Path(sys.argv[1])
    for name in sys.argv[2:] or ["score", "train", *PARTS]:
        found = python(*PARTS[name], "cuda") if name in PARTS else equal_to_cpu(name, output)
        (output / f"gpu_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found)[:1500], flush=True)


if __name__ == "__main__":
    main()
