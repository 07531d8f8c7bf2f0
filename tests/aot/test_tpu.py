"""Real programs, compiled for TPU slices that are not here: they fit, and contain what they should."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape, cache_heads
from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import probe
from llama_jax.ops.loss import LOGITS_BYTES
from llama_jax.plan.compile import compiler_devices
from llama_jax.plan.hlo import instructions
from llama_jax.plan.topology import parse_topology
from tests.aot.cases import compiled, copies, reading_on

pytest.importorskip("libtpu", reason="libtpu is not installed; make test-aot installs it")
pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("model", "topology", "mesh", "batch", "length", "quantize"),
    [
        ("llama2_7b", "v5e-8", MeshShape(tensor=8), 64, 2048, None),
        ("llama2_70b", "v5e-16", MeshShape(tensor=16), 8, 2048, "int8"),
        ("llama2_70b", "v5p-16", MeshShape(tensor=8), 8, 2048, None),
        pytest.param("llama3_1_8b", "v6e-8", MeshShape(tensor=8), 64, 4096, None, marks=pytest.mark.slow),
    ],
)
def test_decode(model, topology, mesh, batch, length, quantize):
    cfg = PRESETS[model]
    _, report, program = compiled(model, topology, "decode", mesh, batch=batch, length=length, quantize=quantize)
    summed = [i for i in program if i.opcode == "all-reduce" and i.nbytes >= batch * cfg.embed_dim * 2]
    assert len(summed) == 2 * cfg.num_layers + 1  # two a layer, and the lookup
    gathered = [i for i in program if i.opcode == "all-gather"]
    assert [i.nbytes for i in gathered] == [batch * cfg.vocab_size * 4]  # the last position's logits, once a step
    assert not [i for i in program if i.opcode in ("reduce-scatter", "all-to-all", "collective-permute")]
    heads = cache_heads(cfg.num_kv_heads, mesh.tensor) // mesh.tensor
    cache = 2 * cfg.num_layers * batch * heads * length * cfg.head_dim * 2
    assert cache <= report.alias_bytes < 1.001 * cache + 2**20  # overwritten in place
    assert not copies(program, (batch, heads, length, cfg.head_dim))
    assert report.temporary_bytes < 0.10 * report.argument_bytes
    assert sum(i.opcode == "custom-call" and "ragged_attention" in i.name for i in program) == cfg.num_layers


def test_decode_copies_no_cache_in_int8():
    cfg, batch, length = PRESETS["llama2_7b"], 64, 2048
    options = dict(batch=batch, length=length, cache_dtype="int8", num_layers=2)
    *_, program = compiled("llama2_7b", "v5e-8", "decode", MeshShape(tensor=8), **options)
    slots = (batch, cfg.num_kv_heads // 8, length)
    assert not copies(program, slots)  # the scales
    assert not copies(program, (*slots, cfg.head_dim))


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_decode_lays_out_no_cache_of_narrow_heads_anew(cache_dtype):
    """That would fill heads of 64 up to the lanes, 128, in memory: twice the cache."""
    options = dict(batch=16, length=2048, cache_dtype=cache_dtype, num_layers=2)
    _, report, _ = compiled("llama3_2_1b", "v5e-1", "decode", MeshShape(), **options)
    assert report.temporary_bytes < 0.10 * report.argument_bytes


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_reading_on_after_a_part_of_a_prompt_holds_no_scores_and_copies_no_cache(cache_dtype):
    program = reading_on("llama3_1_8b", "v5e-8", MeshShape(tensor=8), cache_dtype=cache_dtype)
    assert sum(i.opcode == "custom-call" and "ragged_chunk_attention" in i.name for i in program) == 2


def test_prefill_of_70b_uses_splash_attention_and_gathers_no_weight():
    options = dict(num_layers=8, batch=1, length=2048)  # of 80, which take the compiler two minutes and are alike
    request, report, program = compiled("llama2_70b", "v5p-16", "prefill", MeshShape(tensor=8), **options)
    cfg = request.config
    kernels = [i for i in program if i.opcode == "custom-call" and "splash" in i.name]
    assert len(kernels) == cfg.num_layers
    activations = 2048 * cfg.embed_dim * 2
    assert max(i.nbytes for i in program if i.opcode == "all-gather") <= activations
    assert report.temporary_bytes < 2**30


@pytest.mark.parametrize(
    ("model", "topology", "mesh", "batch"),
    [
        ("llama2_7b", "v5e-16", MeshShape(fsdp=16), 64),
        ("llama2_70b", "v5p-128", MeshShape(fsdp=16, tensor=4), 16),
        pytest.param("llama2_70b", "v5p-128", MeshShape(fsdp=64), 128, marks=pytest.mark.slow),
        ("llama2_70b", "v6e-256", MeshShape(fsdp=128, tensor=2), 128),  # 64 x 4 takes the compiler half as long again
        ("llama3_1_405b", "v5p-1024", MeshShape(fsdp=64, tensor=8), 64),
    ],
)
def test_training(model, topology, mesh, batch):
    cfg = PRESETS[model]
    _, report, program = compiled(model, topology, "train", mesh, batch=batch, length=4096)
    D, F, H, t = cfg.embed_dim, cfg.mlp_dim, cfg.head_dim, mesh.tensor
    N, K, V = cfg.num_heads // t, cfg.num_kv_heads // t, cfg.vocab_size // t
    sizes = sorted([N * H * D, K * H * D, K * H * D, D * N * H, F // t * D, F // t * D, D * F // t] * 2 + [V * D] * 2)
    tokens = batch // mesh.batch_shards * 4096
    weights = {size * 2 for size in sizes} - {tokens * D * 2}
    gathered = [i.nbytes // 2 for i in program if i.opcode == "all-gather" and i.nbytes in weights]
    assert sorted(gathered) == [size for size in sizes if size * 2 in weights]  # bfloat16; forward, and backward
    # A reduce-scatter that XLA:TPU runs itself stands as an all-reduce in a function of that name.
    summed = [i for i in program if i.opcode == "all-reduce" and "all-reduce-scatter" not in i.computation]
    activation = (batch // mesh.batch_shards, 4096, D)  # on 128 x 2 it has as many numbers as q_proj and o_proj
    gradients = [(i, shape) for i in summed for dtype, shape in i.arrays if dtype == "f32" and math.prod(shape) in sizes]
    assert not [str(i) for i, shape in gradients if shape != activation]
    logits = [
        str(i)
        for i in program
        for dtype, shape in i.arrays
        if dtype == "f32" and shape[-1:] == (V,) and math.prod(shape) == tokens * V
    ]
    assert not logits or tokens * V * 4 <= LOGITS_BYTES  # of all tokens, where they are more than one chunk
    assert any(i.opcode == "custom-call" and "splash" in i.name for i in program)
    assert report.alias_bytes > 0.99 * report.argument_bytes  # the old state's memory is the new one's


@pytest.fixture(scope="module")
def on_chip() -> Callable[[Any], jax.ShapeDtypeStruct]:
    """Of an array, one on a chip that is not here."""
    devices, _ = compiler_devices(parse_topology("v5e-1"))
    where = NamedSharding(Mesh(np.array(devices[:1]), "x"), PartitionSpec())
    return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


@pytest.mark.parametrize("precision", ["highest", "float32"])
def test_attention_compiles_at_whatever_precision_the_user_set(on_chip, precision):
    """XLA:TPU has no kernel that multiplies bfloat16 at another than its own."""
    x, ids = (on_chip(jax.ShapeDtypeStruct(*a)) for a in (((1, 256, 2, 64), jnp.bfloat16), ((1, 256), jnp.int32)))

    def gradients(q, k, v, ids):
        return jax.grad(lambda *a: jnp.sum(attend_causal(*a, ids).astype(jnp.float32)), argnums=(0, 1, 2))(q, k, v)

    with jax.default_matmul_precision(precision):
        text = jax.jit(gradients).lower(x, x, x, ids).compile().as_text()
    assert sum(i.opcode == "custom-call" and "splash" in i.name for i in instructions(text)) == 3


def test_what_is_tried_on_a_tpu_before_it_is_used_compiles_for_it(on_chip):
    names = []
    for case in probe.tpu_cases(lambda *shape: jnp.ones(shape, jnp.bfloat16), 128):
        text = jax.jit(case.kernel).lower(*jax.tree.map(on_chip, case.inputs)).compile().as_text()
        names += [i.name for i in instructions(text) if i.opcode == "custom-call"]
    assert sum("splash" in name for name in names) == 3  # forward, dq, dk and dv
    assert sum("ragged_attention" in name for name in names) == 2  # of a cache in bfloat16, and of one in int8
    assert sum("ragged_chunk_attention" in name for name in names) == 2
