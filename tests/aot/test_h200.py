"""Real programs, compiled for an H200 that is not here."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape
from llama_jax.plan.compile import compiler_devices
from llama_jax.plan.hlo import COLLECTIVES, Instruction, instructions
from llama_jax.plan.programs import lower_program
from llama_jax.plan.request import make_request
from llama_jax.sharding import make_mesh
from tests.aot.cases import compiled, copies, kernels_of_a_layer, reading_on

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="jax's CUDA plugin is not installed; make test-aot installs it",
    ),
]


def attention_kernels(program: list[Instruction]) -> int:
    return sum(i.opcode == "custom-call" and "__gpu$xla.gpu.triton" in i.operands for i in program)


def scores(program: list[Instruction], elements: int) -> list[str]:
    """Arrays as large as the scores of one sequence, in whatever shape: nothing else in these programs is."""
    return [str(i) for i in program if any(math.prod(shape) >= elements for _, shape in i.arrays)]


def text_of(model: str, task: str, options: dict[str, Any], *, num_layers: int, **more) -> str:
    """The program of a model with few layers, compiled with options of XLA's."""
    request = make_request(model, "h200", task, **more)
    request = dataclasses.replace(request, config=dataclasses.replace(request.config, num_layers=num_layers))
    devices, _ = compiler_devices(request.topology)
    return lower_program(request, MeshShape(), make_mesh(MeshShape(), devices)).compile(compiler_options=options).as_text()


def thunks(folder: Path, model: str, task: str, **more) -> str:
    """What the compiled program launches, as XLA writes it down: a line each, what is inside another further in."""
    text_of(model, task, {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}, **more)
    [file] = folder.glob("*thunk_sequence_after_thunk_passes.txt")
    return file.read_text()


def bodies(text: str) -> list[list[str]]:
    """Of every loop, what its body launches: the lines in it that are in nothing else."""
    lines = text.splitlines()
    depths = [len(line) - len(line.lstrip()) for line in lines]
    found = []
    for i in (i for i, line in enumerate(lines) if line.strip() == "body:"):
        last = next((j for j in range(i + 1, len(lines)) if depths[j] <= depths[i]), len(lines))
        found.append(
            [line for line, depth in zip(lines[i + 1 : last], depths[i + 1 : last], strict=True) if depth == depths[i + 1]]
        )
    return found


@pytest.mark.parametrize(
    ("batch", "quantize", "attention", "products", "kernels"), [(1, "", 2, 4, 6), (1, "int8", 2, 4, 6), (8, "", 1, 0, 11)]
)
def test_decode_of_7b_copies_no_cache_and_no_weight_in_few_kernels(batch, quantize, attention, products, kernels):
    """Eight rows occupy the GPU without sharing a row's slots: their attention needs no merge."""
    cfg, length = PRESETS["llama2_7b"], 2048
    options = dict(batch=batch, length=length, quantize=quantize)
    _, report, program = compiled("llama2_7b", "h200", "decode", MeshShape(), **options)
    cache = 2 * cfg.num_layers * batch * cfg.num_kv_heads * length * cfg.head_dim * 2
    assert cache <= report.alias_bytes < 1.001 * cache
    assert not copies(program, (batch, cfg.num_kv_heads, length, cfg.head_dim))
    assert not copies(program, (cfg.mlp_dim, cfg.embed_dim)) and not copies(program, (cfg.embed_dim, cfg.embed_dim))
    assert report.temporary_bytes < 32 * 2**20
    calls = [i.op_name for i in program if i.opcode == "custom-call"]
    assert sum("decode_attention" in name for name in calls) == attention * cfg.num_layers
    assert sum("multiply_row" in name for name in calls) == products * cfg.num_layers + bool(products)
    assert kernels_of_a_layer(program, cfg.num_layers) <= kernels


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_decoding_is_one_cuda_graph(tmp_path, batch):
    """The body of decode's loop launches one command buffer and nothing else: sampling is in it, too."""
    text = thunks(tmp_path, "llama2_7b", "decode", num_layers=2, batch=batch, length=2048)
    [step] = bodies(text)
    assert len(step) == 1 and "kCommandBuffer" in step[0], text


def test_decode_of_7b_casts_no_cache_in_int8_in_memory():
    cfg, batch, length = PRESETS["llama2_7b"], 8, 2048
    _, report, program = compiled("llama2_7b", "h200", "decode", MeshShape(), batch=batch, length=length, cache_dtype="int8")
    vectors = 2 * cfg.num_layers * batch * cfg.num_kv_heads * length
    cache = vectors * (cfg.head_dim + 4)
    assert cache <= report.alias_bytes < 1.001 * cache
    assert not copies(program, (batch, cfg.num_kv_heads, length, cfg.head_dim))
    assert not copies(program, (batch, cfg.num_kv_heads, length))
    assert report.temporary_bytes < 32 * 2**20  # a layer's keys in bfloat16 are 128 MiB


def test_training_of_7b_on_a_node_gathers_weights_twice_and_scatters_float32_gradients():
    cfg = PRESETS["llama2_7b"]
    *_, program = compiled("llama2_7b", "h200-8", "train", MeshShape(fsdp=8), batch=8, length=4096)
    gathers = [i for i in program if i.opcode == "all-gather"]
    # Operand and result each. XLA:GPU gathers 192 of them in float32 and casts after: a barrier keeps it from that, and makes
    # the backward pass gather those twice.
    assert sum(len(i.arrays) // 2 for i in gathers) == 14 * cfg.num_layers + 2
    scattered = [dtype for i in program if i.opcode == "reduce-scatter" for dtype, shape in i.arrays if len(shape) > 1]
    assert set(scattered) == {"f32"} and len(scattered) // 2 >= 7 * cfg.num_layers + 2
    norms = 4 * (2 * cfg.num_layers + 1) * cfg.embed_dim  # bytes of their gradients, which no axis divides; and a few numbers
    assert not [i for i in program if i.opcode == "all-reduce" and i.nbytes > norms + 4096]
    assert attention_kernels(program) == 4 * cfg.num_layers  # forward, again, dq, dk and dv


@pytest.mark.parametrize(("remat", "kernels"), [("full", 4), ("projections", 3)])
def test_training_of_1b_holds_no_scores_and_saves_attention_by_name(remat, kernels):
    cfg, length = PRESETS["llama3_2_1b"], 4096
    *_, program = compiled("llama3_2_1b", "h200", "train", MeshShape(), batch=4, length=length, remat=remat)
    assert not scores(program, cfg.num_heads * length**2)
    assert attention_kernels(program) == kernels * cfg.num_layers


def test_a_prompt_s_products_write_no_float32_sums_to_memory_and_join_no_weights():
    """By the library that a card's autotuner prefers for them (it cannot run here). XLA joins products of the same x by itself,
    where their weights are small enough, and copies these side by side at every call."""
    cfg, length, library = PRESETS["llama2_7b"], 2048, {"xla_gpu_enable_triton_gemm": False}
    program = list(instructions(text_of("llama2_7b", "prefill", library, num_layers=2, batch=1, length=length)))
    sums = [i.arrays[0] for i in program if i.opcode == "custom-call" and "__cublas" in i.operands and length in i.arrays[0][1]]
    assert len(sums) == 2 * 4 and {dtype for dtype, _ in sums} == {"bf16"}
    joined = [i for i in program if "concatenate" in i.name]
    assert joined and max(i.nbytes for i in joined) < 2 * cfg.embed_dim**2  # bytes of a weight


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_reading_on_after_a_part_of_a_prompt_holds_no_scores_and_copies_no_cache(cache_dtype):
    program = reading_on("llama3_1_8b", "h200", MeshShape(), cache_dtype=cache_dtype)
    assert attention_kernels(program) == 2


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_gpus_that_share_7b_sum_twice_a_layer_and_move_no_weight(quantize):
    cfg = PRESETS["llama2_7b"]
    options = dict(num_layers=2, batch=8, length=1024, quantize=quantize)
    *_, program = compiled("llama2_7b", "h200-8", "decode", MeshShape(tensor=8), **options)
    moved = [i for i in program if i.opcode in COLLECTIVES and len(i.arrays[0][1]) > 1]
    largest = 8 * cfg.vocab_size * 4  # the last position's logits, once
    assert sum(i.opcode == "all-reduce" for i in moved) <= 2 * 2 + 1  # + 1: the lookup
    assert max(i.nbytes for i in moved) <= largest < cfg.embed_dim**2 // 8
    assert sum("decode_attention" in i.op_name for i in program if i.opcode == "custom-call") >= 2


def test_prefill_of_13b_uses_the_kernel():
    cfg, length = PRESETS["llama2_13b"], 2048
    *_, program = compiled("llama2_13b", "h200", "prefill", MeshShape(), batch=2, length=length)
    assert not scores(program, cfg.num_heads * length**2)
    assert attention_kernels(program) == cfg.num_layers
