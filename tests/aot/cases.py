"""What is compiled ahead of time, and what any of it has to keep."""

import collections
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.generation.programs import extend
from llama_jax.mesh import MeshShape
from llama_jax.plan import programs
from llama_jax.plan.compile import CompilerReport, compile_with_text, compiler_devices
from llama_jax.plan.hlo import COLLECTIVES, Instruction, distinct_collectives, instructions
from llama_jax.plan.request import PlanRequest, make_request
from llama_jax.sharding import make_mesh

# Of the processor, tracing included: seconds on the clock depend on what else runs. 10 to 130 were measured.
MOST_SECONDS = 240


def compiled(
    model: str,
    topology: str,
    task: str,
    mesh: MeshShape,
    *,
    num_layers: int | None = None,
    **more,
) -> tuple[PlanRequest, CompilerReport, list[Instruction]]:
    """Compiles a case, of all its layers or `num_layers`; fits, was soon done, and is what the closed form said."""
    request = make_request(model, topology, task, **more)
    if num_layers:
        request = dataclasses.replace(request, config=dataclasses.replace(request.config, num_layers=num_layers))
    start = time.process_time()
    report, text = compile_with_text(request, mesh)
    seconds = time.process_time() - start
    print(f"\n{model} {topology} {task} {mesh}\n{report}\n{seconds:.0f} s of the processor")
    assert report.peak_bytes < report.hbm_bytes
    assert abs(report.predicted_argument_bytes / report.argument_bytes - 1) < 0.10
    assert abs(report.predicted_peak_bytes / report.peak_bytes - 1) < 0.25
    assert seconds < MOST_SECONDS
    program = list(instructions(text))
    return request, report, [i for i in program if i.opcode not in COLLECTIVES] + distinct_collectives(program)


def reading_on(model: str, topology: str, mesh: MeshShape, *, cache_dtype: str) -> list[Instruction]:
    """The program of a long prompt's second chunk and of those that follow, 4,096 of 16,384 tokens through two layers. It holds
    no scores, copies no cache, and overwrites the one that it is given."""
    request = make_request(model, topology, "prefill", batch=1, length=16384, cache_dtype=cache_dtype)
    request = dataclasses.replace(request, config=dataclasses.replace(request.config, num_layers=2))
    cfg, T, S = request.config, 4096, request.length
    placed = make_mesh(mesh, compiler_devices(request.topology)[0])
    state, one = programs._decode_state(request, mesh, placed), np.zeros(1, np.int32)
    last, tokens = np.zeros((1, 1, cfg.embed_dim), jnp.bfloat16), np.zeros((1, T), np.int32)
    with jax.set_mesh(placed):
        params = programs._params(request, mesh, placed)
        done = extend.lower(cfg, params, state.cache, last, tokens, np.int32(0), one, one).compile()
    program = list(instructions(done.as_text()))
    assert not [str(i) for i in program if any(shape[-1:] == (S,) and math.prod(shape) > 64 * S for _, shape in i.arrays)]
    cache = jax.tree.leaves(state.cache)
    slots = [i for i in program if any(S in shape for _, shape in i.arrays)]  # o_proj may be as large as a layer's keys
    assert not copies(slots, cache[0].sharding.shard_shape(cache[0].shape))
    used = done.memory_analysis()
    assert used.alias_size_in_bytes >= sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in cache)
    assert used.temp_size_in_bytes < 2**29
    return program


def copies(program: list[Instruction], shape: tuple[int, ...]) -> list[str]:
    """The instructions that copy or transpose an array of this shape into memory; fetching it onto the chip, whose memory is
    S(1), is reading."""
    moves = [i for i in program if i.opcode in ("copy", "transpose") and "S(1)" not in i.results.split("}")[0]]
    return [str(i) for i in moves if any(math.prod(s) == math.prod(shape) for _, s in i.arrays)]


def kernels_of_a_layer(program: list[Instruction], num_layers: int) -> int:
    """Kernels that a step launches for each layer: those of the computation that has most, which decode's loop repeats; what
    is there once, around the layers and in sampling, is less than one a layer."""
    kernels = collections.Counter(i.computation for i in program if i.opcode in ("fusion", "custom-call"))
    [(step, _)] = kernels.most_common(1)
    idle = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")
    return sum(i.computation == step and i.opcode not in idle for i in program) // num_layers
