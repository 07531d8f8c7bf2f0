"""Reading a compiled program's text."""

from llama_jax.plan.hlo import collectives, distinct_collectives, instructions

TEXT = """\
HloModule jit_step, is_scheduled=true

%fused_computation.1 (p: bf16[256,8]) -> bf16[256,128] {
  %p = bf16[256,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[256,128]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={1}, metadata={op_name="jit(f)/a"}
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %ar = (f32[4,8]{1,0}, f32[]) all-reduce-start(%x, %c), channel_id=1, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %done = (f32[4,8]{1,0}, f32[]) all-reduce-done(%ar)
  %pmax = f32[4]{0} all-reduce(%y), channel_id=1, to_apply=%max, metadata={op_name="jit(f)/pmax"}
  %all-gather.2 = bf16[256,128]{1,0} all-gather(%p), channel_id=3, dimensions={1}, metadata={op_name="jit(f)/a"}
  ROOT %dot = f32[4,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}
}
"""


def test_instructions_have_opcode_shapes_bytes_and_place():
    found = {i.name: i for i in instructions(TEXT)}
    assert found["ar"].opcode == "all-reduce" and found["ar"].arrays == (("f32", (4, 8)), ("f32", ()))
    assert found["ar"].nbytes == 128 and found["all-gather.1"].nbytes == 256 * 128 * 2
    assert found["all-gather.1"].computation == "%fused_computation.1" and found["dot"].computation == "%main"
    assert found["pmax"].op_name == "jit(f)/pmax" and "done" not in found
    assert str(found["pmax"]) == "all-reduce f32[4] (jit(f)/pmax)"


def test_a_collective_that_stands_in_several_fusions_counts_once_and_two_of_one_channel_twice():
    assert collectives(TEXT) == {"all-gather": 1, "all-reduce": 2}
    assert [i.name for i in distinct_collectives(instructions(TEXT))] == ["all-gather.1", "ar", "pmax"]
