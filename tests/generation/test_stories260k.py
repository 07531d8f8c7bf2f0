"""A real model end to end: Karpathy's stories260K, converted from Meta's format, tells the story it is known to tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import llama_jax
from llama_jax.commands.convert import convert

ROOT = Path(__file__).resolve().parents[2]
NEW = 200


@pytest.fixture(scope="module")
def expected(stories260k) -> str:
    return json.loads((stories260k / "expected.json").read_text())["greedy_text_200_tokens"]


@pytest.fixture(scope="module")
def checkpoint(stories260k, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stories260K") / "checkpoint"
    convert(stories260k / "meta", path)
    return path


@pytest.fixture(scope="module")
def programs_kept(tmp_path_factory) -> Path:
    """A folder in which compiled programs are kept, so that the command line finds what the library compiled."""
    folder = tmp_path_factory.mktemp("programs")
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in zip(names, (True, str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_the_library_tells_the_story(checkpoint, expected, stories260k, programs_kept):
    llama = llama_jax.load(checkpoint)
    settings = dict(temperature=0, max_new_tokens=NEW)
    (completion,) = llama.generate([""], **settings)
    ids = json.loads((stories260k / "expected.json").read_text())["first_200_ids_with_bos"]
    assert [*completion.prompt_tokens, *completion.tokens][: len(ids)] == ids
    assert completion.text == expected
    assert "".join(llama.stream("", **settings)) == expected
    assert [c.text for c in llama.generate([""], max_new_tokens=NEW, temperature=1.0, top_k=1, seed=3)] == [expected]


@pytest.mark.slow
def test_the_command_line_tells_the_story(checkpoint, expected, programs_kept):
    command = [
        *(sys.executable, "-m", "infer.sample", "--config=configs/sample.py", f"--config.checkpoint={checkpoint}"),
        *("--config.sampling.temperature=0", f"--config.max_new_tokens={NEW}"),
    ]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(programs_kept),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # as the tests have it
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
