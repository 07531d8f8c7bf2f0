"""Runs the blocks of README.md and docs/*.md as they stand there, in a copy of the checkout with small weights under the names
they use.

    python .ci/readme.py [PAGE ...]       # all of them, the README first, when none is named

Every fenced `sh` and `python` block runs, one after the other in all pages; the Python blocks of a page share one process. The
line before a block may be a mark: `<!-- not run: REASON -->`, or `<!-- exits: CODE -->` for an `sh` block that fails with this
code and says, on stderr, what the `text` block after it shows. Weights come from ../shared (a real trained model) when it is
there, and are made at random otherwise.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkout import ROOT, copy_checkout

SHARED = ROOT.parent / "shared"
BLOCK = re.compile(
    r"(?:<!-- (?:not run: (?P<reason>[^\n]*)|exits: (?P<code>\d+)) -->\n)?"
    r"```(?P<language>sh|python)\n(?P<text>.*?)```(?:\n+```text\n(?P<said>.*?)```)?",
    re.DOTALL,
)
# Runs Python blocks in one process: each comes as a line of JSON on stdin, and is answered by a line on another descriptor.
WORKER = """
import json, os, sys
page, answers = sys.argv[1], os.fdopen(int(sys.argv[2]), "w", buffering=1)
names = {"__name__": "__main__"}
for line in sys.stdin:
    exec(compile(json.loads(line), page, "exec"), names)
    print("done", file=answers)
"""


class Page:
    """Runs a page's blocks in a folder."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]):
        self.name, self.folder, self.environment = name, folder, environment
        self.worker: subprocess.Popen | None = None
        self.ran = 0

    def run(self, block: re.Match) -> None:
        text = block["text"]
        if block["reason"]:
            print(f"not run ({block['reason']}): {json.dumps(text.splitlines()[0])}", flush=True)
            return
        print(text, flush=True)
        start = time.monotonic()
        if block["language"] == "python":
            self._python(text)
        elif block["code"]:
            self._fails(text, int(block["code"]), block["said"])
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, env=self.environment, check=True)
        self.ran += 1
        print(f"# {time.monotonic() - start:.1f} s\n", flush=True)

    def close(self) -> None:
        if self.worker:
            self.worker.stdin.close()
            self.worker.wait()
            self.answers.close()

    def _python(self, text: str) -> None:
        if not self.worker:
            read, write = os.pipe()
            command = [sys.executable, "-c", WORKER, self.name, str(write)]
            self.worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, pass_fds=[write], cwd=self.folder, env=self.environment
            )
            os.close(write)
            self.answers = os.fdopen(read)
        self.worker.stdin.write(json.dumps(text) + "\n")
        self.worker.stdin.flush()
        if not self.answers.readline():
            sys.exit(f"error: a Python block of {self.name} failed")

    def _fails(self, text: str, code: int, said: str | None) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, env=self.environment, stderr=subprocess.PIPE
        )
        found = done.stderr.decode()
        print(found, flush=True)
        if done.returncode != code:
            sys.exit(f"error: a block of {self.name} ended with {done.returncode}, and the page says {code}")
        if not said or said not in found:
            sys.exit(f"error: {self.name} shows another message than that: {said}")


def make_weights(folder: Path) -> None:
    """Small: llama-2-7b (Meta's), Llama-3.2-1B (Hugging Face's), llama-flax (transformers' Flax), stories (llama2.c's)."""
    sys.path.insert(0, str(ROOT))
    from tests.checkpoint import make
    from tests.text.make import small_llama2c, small_sentencepiece

    real = SHARED / "checkpoints" / "stories260K" / "meta"
    if real.is_dir():
        shutil.copytree(real, folder / "llama-2-7b")
    cfg = make.meta_tiny(vocab_size=420)
    params = make.random_params(cfg)
    for name, write in (("llama-2-7b", make.write_meta), ("Llama-3.2-1B", make.write_huggingface), ("llama-flax", write_flax)):
        if not (folder / name).exists():
            (folder / name).mkdir()
            write(folder / name, cfg, params)
            small_sentencepiece(folder / name / "tokenizer.model", vocab_size=420)
    (folder / "stories").mkdir()
    make.write_llama2c(folder / "stories" / "model.bin", cfg, params)
    small_llama2c(folder / "stories" / "tokenizer.bin", folder / "Llama-3.2-1B" / "tokenizer.model")


def write_flax(folder: Path, cfg: Any, params: Any) -> None:
    """As FlaxLlamaForCausalLM.save_pretrained does: kernels are [in, out], the embedding as it is."""
    from flax import serialization, traverse_util

    from tests.checkpoint import make

    tree = {}
    for name, value in make.to_flat(cfg, params, make.HUGGING_FACE, interleave=False).items():
        kind = "weight" if "norm" in name else "embedding" if "embed" in name else "kernel"
        tree[*name.split(".")[:-1], kind] = value.T if kind == "kernel" else value
    data = serialization.msgpack_serialize(traverse_util.unflatten_dict(tree))
    (folder / "flax_model.msgpack").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(make.huggingface_config(cfg)))


def main() -> None:
    pages = [Path(page).resolve() for page in sys.argv[1:]] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    start, ran = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "llama_jax"
        copy_checkout(copy)
        os.symlink(ROOT / ".venv", copy / ".venv")
        make_weights(copy)
        environment = os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(copy)}
        for path in pages:
            page = Page(str(path.relative_to(ROOT)), copy, environment)
            print(f"== {page.name}", flush=True)
            try:
                for block in BLOCK.finditer(path.read_text()):
                    page.run(block)
            finally:
                page.close()
            ran += page.ran
    if not ran:
        sys.exit("error: no block ran")
    print(f"{ran} blocks of {len(pages)} pages ran in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
