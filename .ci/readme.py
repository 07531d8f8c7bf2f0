"""Runs the README's commands as they stand there, in a copy of the checkout with small weights under the names it uses.

Every fenced `sh` block runs, one after the other, unless the line before it is `<!-- not run: REASON -->`. Weights come from
../shared (a real trained model) when it is there, and are made at random otherwise.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?```sh\n(?P<commands>.*?)```", re.DOTALL)


def make_weights(folder: Path) -> None:
    """llama-2-7b (Meta's files) and Llama-3.2-1B (Hugging Face's), both small."""
    sys.path.insert(0, str(ROOT))
    from tests.checkpoint import make
    from tests.text.make import small_sentencepiece

    real = SHARED / "checkpoints" / "stories260K" / "meta"
    if real.is_dir():
        shutil.copytree(real, folder / "llama-2-7b")
    cfg = make.meta_tiny(vocab_size=420)
    params = make.random_params(cfg)
    for name, write in (("llama-2-7b", make.write_meta), ("Llama-3.2-1B", make.write_huggingface)):
        if not (folder / name).exists():
            (folder / name).mkdir()
            write(folder / name, cfg, params)
            small_sentencepiece(folder / name / "tokenizer.model", vocab_size=420)


def main() -> None:
    blocks = list(BLOCK.finditer((ROOT / "README.md").read_text()))
    assert blocks, "no sh block in README.md"
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "llama_jax"
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
        for name in filter(None, tracked):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        os.symlink(ROOT / ".venv", copy / ".venv")
        make_weights(copy)
        environment = os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
        ran = 0
        for block in blocks:
            if block["reason"]:
                print(f"not run ({block['reason']}): {json.dumps(block['commands'].splitlines()[0])}", flush=True)
                continue
            print(block["commands"], flush=True)
            start = time.monotonic()
            subprocess.run(["bash", "-euo", "pipefail", "-c", block["commands"]], cwd=copy, env=environment, check=True)
            print(f"# {time.monotonic() - start:.1f} s\n", flush=True)
            ran += 1
        print(f"{ran} blocks of the README ran")


if __name__ == "__main__":
    main()
