"""Real programs, compiled for an H200 that is not here."""

import importlib.util

import pytest

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape
from tests.aot.cases import compiled, copies

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="jax's CUDA plugin is not installed; make test-aot installs it",
    ),
]


def test_decode_of_7b_copies_no_cache_and_no_weight():
    cfg, batch, length = PRESETS["llama2_7b"], 8, 2048
    _, report, program = compiled("llama2_7b", "h200", "decode", MeshShape(), batch=batch, length=length)
    cache = 2 * cfg.num_layers * batch * cfg.num_kv_heads * length * cfg.head_dim * 2
    assert cache <= report.alias_bytes < 1.001 * cache
    assert not copies(program, (batch, cfg.num_kv_heads, length, cfg.head_dim))
    assert not copies(program, (cfg.mlp_dim, cfg.embed_dim)) and not copies(program, (cfg.embed_dim, cfg.embed_dim))
    assert report.temporary_bytes < 32 * 2**20


def test_training_of_7b_on_a_node_gathers_weights_twice_and_scatters_float32_gradients():
    cfg = PRESETS["llama2_7b"]
    *_, program = compiled("llama2_7b", "h200-8", "train", MeshShape(fsdp=8), batch=8, length=4096)
    gathers = [i for i in program if i.opcode == "all-gather"]
    # Operand and result each. XLA:GPU gathers 192 of them in float32 and casts after: a barrier keeps it from that, and makes
    # the backward pass gather those twice.
    assert sum(len(i.arrays) // 2 for i in gathers) == 14 * cfg.num_layers + 2
    scattered = [dtype for i in program if i.opcode == "reduce-scatter" for dtype, shape in i.arrays if len(shape) > 1]
    assert set(scattered) == {"f32"} and len(scattered) // 2 >= 7 * cfg.num_layers + 2
    assert not [i for i in program if i.opcode == "all-reduce" and i.nbytes > 2**20]
