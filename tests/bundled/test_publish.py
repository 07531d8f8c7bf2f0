import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

import llama_jax
from bundled.publish import publish
from bundled.tokenizer import VOCAB_SIZE
from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.save import save_params
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.config import PRESETS
from llama_jax.errors import LlamaError
from llama_jax.model import init_params


@pytest.fixture
def run(tmp_path, tokenizer_file):
    """What a training run leaves: float32, and the paths of the machine it ran on."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file)
    trained = Checkpoint(
        path=epath.Path(tmp_path) / "run" / "checkpoints" / "7",
        config=dataclasses.replace(PRESETS["tiny"], vocab_size=VOCAB_SIZE),
        dtype=np.dtype(np.float32),
        chat_format="llama2",
        tokenizer=("tokenizer.model",),
        source={"kind": "llama_jax", "path": str(tmp_path)},
        command="python -m train.main",
    )
    params = init_params(trained.config, jax.random.key(0), np.float32)
    save_params(trained, params, tokenizer_files=[tmp_path / "tokenizer.model"])
    return tmp_path / "run"


def test_a_run_is_published_in_bfloat16_without_the_paths_of_its_machine(run, tmp_path, tokenizer_file):
    published = publish(run, tmp_path / "out")
    assert published.dtype.name == "bfloat16" and published.chat_format == "llama2"
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer_file
    for file in (file for file in (tmp_path / "out").rglob("*") if file.is_file()):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    trained, ours = (load_params(Checkpoint.open(path), np.dtype(np.float32)) for path in (run, tmp_path / "out"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("bfloat16"), b.astype("bfloat16")), trained, ours)
    with pytest.raises(LlamaError, match="out"):
        publish(run, tmp_path / "out")
    publish(run, tmp_path / "out", overwrite=True)
    assert llama_jax.load(tmp_path / "out").chat_format == "llama2"
