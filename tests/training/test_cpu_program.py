"""What XLA:CPU makes of a training step: products of 16-bit floats are multiplied as such, angles are computed once."""

import re

import jax
import pytest

from llama_jax.model import param_shapes
from llama_jax.ops.attention import attend_causal
from llama_jax.ops.norm import rms_norm
from llama_jax.plan.hlo import instructions
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import StateForm, state_shapes, trained_axes
from llama_jax.training.step import StepConfig, make_train_step
from tests.training.make import CFG, OPTIMIZER, TIED, batch_of, training_mesh


def step_program(cfg, *, scan: bool, dtype: str = "bfloat16"):
    mesh, form = training_mesh(None), StateForm(scan=scan)
    optimizer = make_optimizer(OPTIMIZER, trained_axes(cfg, form))
    step = make_train_step(cfg, StepConfig(dtype=dtype, remat="none", scan_layers=scan), optimizer, mesh)
    with jax.set_mesh(mesh):
        text = step.lower(state_shapes(cfg, optimizer, form, tensor=1), batch_of(cfg)).compile().as_text()
    return list(instructions(text))


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["", "tied"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_product_of_a_bfloat16_step_is_of_bfloat16(cfg, scan):
    """Of two operands whose tokens come first XLA:CPU would make float32 arrays."""
    found = step_program(cfg, scan=scan)
    made = {(i.computation, i.name): i.arrays[0] for i in found if i.arrays}
    operands = [
        [made[i.computation, name] for name in re.findall(r"%?([\w.-]+)", i.operands)[:2]] for i in found if i.opcode == "dot"
    ]
    assert len(operands) >= 30
    assert [pair for pair in operands if {dtype for dtype, _ in pair} != {"bf16"}] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_angles_have_their_cosines_taken_once(dtype):
    found = step_program(CFG, scan=False, dtype=dtype)
    assert [sum(i.opcode == name and i.arrays[0][1] != () for i in found) for name in ("cosine", "sine")] == [1, 1]


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["", "tied"])
def test_weights_and_moments_are_replaced_where_they_lie(cfg):
    matrices = {leaf.shape for leaf in jax.tree.leaves(param_shapes(cfg)) if len(leaf.shape) > 1}
    found = step_program(cfg, scan=False)
    assert any(i.arrays[0][1] in matrices for i in found if i.opcode == "parameter")
    assert [str(i) for i in found if i.opcode == "copy" and i.arrays[0][0] == "f32" and i.arrays[0][1] in matrices] == []


def opcodes(f, *args) -> set[str]:
    return {i.opcode for i in instructions(jax.jit(f).lower(*args).compile().as_text())}


def test_gradients_of_norms_are_summed_in_one_pass():
    """XLA:CPU sums 16-bit floats over tokens by windows, at a twentieth of the memory's speed."""
    x = jax.ShapeDtypeStruct((2, 512, 768), "bfloat16")
    weight = jax.ShapeDtypeStruct((768,), "float32")

    def gradient(x, weight, cotangent):
        return jax.vjp(lambda weight: rms_norm(x, weight, 1e-5), weight)[1](cotangent)

    assert not opcodes(gradient, x, weight, x) & {"reduce-window"}


def test_gradients_of_keys_and_values_are_not_padded_before_they_are_added():
    q, k = (jax.ShapeDtypeStruct((2, 512, heads, 64), "bfloat16") for heads in (4, 2))

    def gradient(q, k, v, cotangent):
        return jax.vjp(attend_causal, q, k, v)[1](cotangent)

    found = opcodes(gradient, q, k, k, q)
    assert "dot" in found
    assert "pad" not in found
