"""What compiled programs may contain: which collectives, how large, what they copy and what they multiply in float32.

Compiled here for eight CPU devices, whose compiler sums where a TPU or GPU would reduce and scatter, and computes bfloat16 in
float32; so the dtypes of products are read before it, from StableHLO. tests/aot reads the TPU's and the H200's own programs.
"""

import collections
import dataclasses
import re

import jax
import pytest

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape
from llama_jax.plan.hlo import COLLECTIVES, Instruction, instructions
from llama_jax.plan.programs import lower_program
from llama_jax.plan.request import PlanRequest
from llama_jax.plan.topology import parse_topology
from llama_jax.sharding import make_mesh

# No two products of axes are equal, so that an array is known by its size.
CFG = dataclasses.replace(
    PRESETS["tiny"], embed_dim=64, num_heads=16, num_kv_heads=8, head_dim=16, mlp_dim=96, num_layers=2, vocab_size=328
)
L, D, F, V, N, K, H = CFG.num_layers, 64, 96, 328, 16, 8, 16
B, T = 8, 24
SCANNED, UNROLLED = parse_topology("v5e-8"), parse_topology("h200-8")  # which form training takes
LAYER_WEIGHTS = {"q_proj": N * H * D, "k_proj": K * H * D, "v_proj": K * H * D, "o_proj": D * N * H}
LAYER_WEIGHTS |= {"gate_proj": F * D, "up_proj": F * D, "down_proj": D * F}


def lowered(task: str, mesh: MeshShape, topology=SCANNED, **more) -> jax.stages.Lowered:
    request = PlanRequest("contract", CFG, topology, task, B, T, **more)
    return lower_program(request, mesh, make_mesh(mesh, jax.devices()[: mesh.num_devices]))


def compiled(task: str, mesh: MeshShape, topology=SCANNED, **more) -> tuple[list[Instruction], object]:
    done = lowered(task, mesh, topology, **more).compile()
    return list(instructions(done.as_text())), done.memory_analysis()


def moved(program: list[Instruction]) -> collections.Counter:
    """(opcode, elements of the largest array) of the collectives of a program, single numbers and vectors left out."""
    found = collections.Counter()
    for i in program:
        sizes = [_elements(shape) for _, shape in i.arrays if len(shape) > 1]
        if i.opcode in COLLECTIVES and sizes:
            found[i.opcode, max(sizes)] += 1
    return found


def _elements(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def test_decode_on_tensor_has_two_all_reduces_a_layer_and_gathers_no_weight():
    program, memory = compiled("decode", MeshShape(tensor=8))
    expected = {("all-reduce", B * D): 2 * L + 1, ("all-gather", B * V): 1}  # + 1: the lookup; the last position's logits
    assert moved(program) == expected
    cache = L * 2 * B * K // 8 * T * H * 2
    assert cache <= memory.alias_size_in_bytes <= cache + 4096  # the cache, and the small arrays of the state
    assert memory.temp_size_in_bytes < 12 * B * V * 4 + 8 * cache // L  # logits, and a layer's cache (in float32 on a CPU)


def test_decode_on_every_axis_gathers_each_weight_once_a_step_and_never_the_cache():
    program, _ = compiled("decode", MeshShape(2, 2, 2))
    found = moved(program)
    gathers = collections.Counter({("all-gather", size // 2): 0 for size in LAYER_WEIGHTS.values()})
    for size in LAYER_WEIGHTS.values():
        gathers["all-gather", size // 2] += L
    gathers["all-gather", V // 2 * D] += 2  # embedding, head
    gathers["all-gather", B // 4 * V] += 1  # logits
    found = collections.Counter({key: n for key, n in found.items() if key not in _output_gathers()})
    assert {key: n for key, n in found.items() if key[0] == "all-gather"} == gathers
    assert {key: n for key, n in found.items() if key[0] != "all-gather"} == {("all-reduce", B // 4 * D): 2 * L + 1}
    assert not [i for i in program if i.opcode in COLLECTIVES and any(shape[-2:] == (T, H) for _, shape in i.arrays)]


def _output_gathers() -> set[tuple[str, int]]:
    return {("all-gather", B * 32)}  # tokens and log-probabilities of a chunk, once, for every process


def test_prefill_on_tensor_moves_activations_only_and_logits_of_one_position():
    program, _ = compiled("prefill", MeshShape(tensor=8))
    assert moved(program) == {
        ("all-reduce", B * T * D): 2 * L + 1,  # reduce-scatters on TPU and GPU; + 1: the lookup
        ("all-gather", B * T * D): 2 * L,
        ("all-reduce", B * D): 1,  # the last position
        ("all-gather", B * V): 1,
    }


@pytest.mark.parametrize("topology", [SCANNED, UNROLLED], ids=["scanned", "unrolled"])
def test_training_on_fsdp_gathers_each_weight_once_forward_and_once_backward(topology):
    program, memory = compiled("train", MeshShape(fsdp=8), topology)
    found = collections.Counter(i.arrays[0][1] for i in program if i.opcode == "all-gather")
    loops = 1 if topology is SCANNED else L
    sizes = collections.Counter()
    for size in LAYER_WEIGHTS.values():
        sizes[size] += 2 * loops
    sizes[V * D] += 2  # embedding, and head once for both
    by_size = collections.Counter()
    for shape, count in found.items():
        by_size[_elements(shape)] += count
    assert by_size == sizes
    summed = [
        i for i in program if i.opcode == "all-reduce" for _, shape in i.arrays if _elements(shape) in set(sizes) - {V * D}
    ]
    assert len(summed) == len(LAYER_WEIGHTS) * loops  # every gradient once (cut after, on a CPU)
    assert sum(i.opcode == "reduce-scatter" and i.arrays[0][1] == (V, D // 8) for i in program) == 2
    assert memory.alias_size_in_bytes > 0.99 * 3 * 4 * CFG.num_params / 8  # parameters and both moments, in place


@pytest.mark.parametrize("mesh", [MeshShape(fsdp=8), MeshShape(tensor=8), MeshShape(2, 2, 2)], ids=str)
def test_no_program_holds_or_moves_logits_of_all_positions(mesh):
    for task in ("train", "prefill"):
        rows = B // mesh.batch_shards
        whole = {rows * T * V, B * T * V}
        program, _ = compiled(task, mesh)
        moved_logits = [str(i) for i in program if i.opcode in COLLECTIVES and {_elements(s) for _, s in i.arrays} & whole]
        assert not moved_logits
    held = [str(i) for i in program if {_elements(shape) for _, shape in i.arrays} & {B * T * V, B * T * V // mesh.tensor}]
    assert not held  # prefill


@pytest.mark.parametrize("task", ["decode", "prefill", "train"])
@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(2, 2, 2)], ids=str)
def test_no_product_is_of_float32_operands(task, mesh):
    products = re.findall(r"stablehlo\.dot_general.*?: \((.*?)\) ->", lowered(task, mesh).as_text())
    assert len(products) >= 7
    assert not [types for types in products if "f32" in types]


def test_int8_weights_are_cast_to_the_dtype_of_activations_and_never_wider():
    text = lowered("decode", MeshShape(data=4, tensor=2), quantize="int8").as_text()
    assert len(re.findall(r"stablehlo\.convert.*xi8>\) -> tensor<.*xbf16>", text)) == len(LAYER_WEIGHTS) * L + 1
    assert not re.search(r"stablehlo\.convert.*xi8>\) -> tensor<.*xf32>", text)
