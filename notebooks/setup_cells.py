"""The first cells of every notebook. Change them here; `.ci/notebooks.py --write` puts them into the notebooks."""
# ruff: noqa: E402

# %% checkout
# @title Get llama_jax
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "llama-jax/llama_jax"  # on GitHub

here = Path.cwd()
root = next((p for p in (here, *here.parents) if (p / "llama_jax" / "config.py").exists()), here / "llama_jax")
if not root.exists():  # Colab has this notebook and nothing else
    subprocess.run(["git", "clone", "--depth=1", f"https://github.com/{REPOSITORY}", root], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# %% runtime
# @title Install what is missing, and find the hardware
from notebooks.runtime import find_runtime, install_missing

install_missing()
runtime = find_runtime()
print(runtime)
