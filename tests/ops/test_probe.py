"""Choosing between a platform's kernels and plain attention; the CPU's interpreter stands for a GPU or TPU where they work."""

import functools
import types

import jax
import pytest

from llama_jax.errors import LlamaError
from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import cudnn, decode, flash, gemv, probe, ragged, ragged_chunk, splash
from llama_jax.ops.kernels.probe import choose_attention, choose_kernels

GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
CPU = jax.devices("cpu")[0]


@pytest.fixture
def found(monkeypatch):
    """Faults to be found on a device, each once."""
    faults = []
    monkeypatch.setattr(probe, "find_fault", lambda device, head_dim: faults.pop())
    return faults


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setitem(probe.CASES, "cpu", probe.gpu_cases)


@pytest.fixture
def on_tpu(on_gpu, monkeypatch):
    monkeypatch.setitem(probe.CASES, "cpu", probe.tpu_cases)
    jax.clear_caches()  # of what another test has traced with another kernel


def interpret(monkeypatch, module, name: str) -> None:
    monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))


@pytest.fixture
def working_flash(monkeypatch):
    monkeypatch.setattr(flash, "attend_flash", functools.partial(attend_causal, kernels=False))
    interpret(monkeypatch, flash, "attend_flash_cached")


@pytest.fixture
def working_splash(on_tpu, monkeypatch):
    monkeypatch.setattr(splash, "attend_splash", functools.partial(attend_causal, kernels=False))


def test_kernels_that_work_have_no_fault(monkeypatch):
    interpret(monkeypatch, flash, "attend_flash")
    interpret(monkeypatch, flash, "attend_flash_cached")
    interpret(monkeypatch, decode, "rotate_append_attend")
    interpret(monkeypatch, gemv, "multiply_row")
    with jax.default_matmul_precision("default"):
        assert probe.find_fault.__wrapped__(CPU, 64) == ""


def test_a_kernel_that_does_not_compile_says_why():
    assert "interpret mode" in probe.find_fault.__wrapped__(CPU, 64)


def test_a_decode_kernel_that_does_not_compile_says_why(working_flash):
    assert "interpret mode" in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("broken, said", [(0, "a token's out is wrong by"), (1, "its cached key is wrong by")])
def test_a_decode_kernel_that_computes_something_else_is_found_out(working_flash, monkeypatch, broken, said):
    interpret(monkeypatch, decode, "rotate_append_attend")
    right = decode.rotate_append_attend

    def wrong(*args):
        results = list(right(*args))
        results[broken] = 1.1 * results[broken]
        return tuple(results)

    monkeypatch.setattr(decode, "rotate_append_attend", wrong)
    assert said in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("broken, said", [(0, "a row times bfloat16 is wrong by"), (2, "a row times int4 is wrong by")])
def test_a_product_of_a_row_that_is_something_else_is_found_out(working_flash, monkeypatch, broken, said):
    interpret(monkeypatch, decode, "rotate_append_attend")
    right, kinds = functools.partial(gemv.multiply_row, interpret=True), []

    def wrong(x, weight, **options):
        kinds.append(len(kinds))
        return (1.1 if kinds[-1] == broken else 1.0) * right(x, weight, **options)

    monkeypatch.setattr(gemv, "multiply_row", wrong)
    jax.clear_caches()  # what was traced with the right one
    assert said in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("broken", ["bfloat16", "int8"])
def test_tokens_attention_to_a_cache_that_is_something_else_is_found_out(working_flash, monkeypatch, broken):
    interpret(monkeypatch, decode, "rotate_append_attend")
    right = flash.attend_flash_cached

    def wrong(q, k, *rest):
        return (1.1 if k.dtype == broken else 1.0) * right(q, k, *rest)

    monkeypatch.setattr(flash, "attend_flash_cached", wrong)
    jax.clear_caches()  # what was traced with the right one
    assert f"tokens' out of a cache in {broken} is wrong by" in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch, factor):
    def wrong(q, k, v, segment_ids):
        return q * factor

    monkeypatch.setattr(flash, "attend_flash", wrong)
    assert "out is wrong by" in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("head_dim", [64, 128])  # of 64 the TPU has a kernel for whole sequences only
def test_a_tpu_s_kernels_that_work_have_no_fault(on_tpu, monkeypatch, head_dim):
    interpret(monkeypatch, splash, "attend_splash")
    if head_dim == 128:
        interpret(monkeypatch, ragged, "attend_ragged")
        interpret(monkeypatch, ragged_chunk, "attend_ragged_chunk")
    with jax.default_matmul_precision("default"):
        assert probe.find_fault.__wrapped__(CPU, head_dim) == ""


def test_a_tpu_s_kernel_of_sequences_that_does_not_compile_says_why(on_tpu):
    assert "interpret mode" in probe.find_fault.__wrapped__(CPU, 64)


def test_a_tpu_s_kernel_of_tokens_that_does_not_compile_says_why(working_splash):
    assert "interpret mode" in probe.find_fault.__wrapped__(CPU, 128)


def test_a_tpu_s_gradient_that_is_something_else_is_found_out(on_tpu, monkeypatch):
    @jax.custom_gradient
    def wrong(q, k, v, segment_ids):
        out, pull = jax.vjp(lambda *a: attend_causal(*a, segment_ids, kernels=False), q, k, v)
        return out, lambda d_out: (*pull(1.1 * d_out), None)

    monkeypatch.setattr(splash, "attend_splash", wrong)
    assert "dq is wrong by" in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("broken", ["bfloat16", "int8"])
def test_a_token_s_attention_on_a_tpu_that_is_something_else_is_found_out(working_splash, monkeypatch, broken):
    right = functools.partial(ragged.attend_ragged, interpret=True)

    def wrong(q, k, *rest):
        return (1.1 if k.dtype == broken else 1.0) * right(q, k, *rest)

    monkeypatch.setattr(ragged, "attend_ragged", wrong)
    assert f"a token's out of a cache in {broken} is wrong by" in probe.find_fault.__wrapped__(CPU, 128)


@pytest.mark.parametrize("broken", ["bfloat16", "int8"])
def test_tokens_attention_on_a_tpu_that_is_something_else_is_found_out(working_splash, monkeypatch, broken):
    interpret(monkeypatch, ragged, "attend_ragged")
    right = functools.partial(ragged_chunk.attend_ragged_chunk, interpret=True)

    def wrong(q, k, *rest):
        return (1.1 if k.dtype == broken else 1.0) * right(q, k, *rest)

    monkeypatch.setattr(ragged_chunk, "attend_ragged_chunk", wrong)
    assert f"tokens' out of a cache in {broken} is wrong by" in probe.find_fault.__wrapped__(CPU, 128)


@pytest.mark.parametrize("device, kind", [(GPU, "A100"), (TPU, "TPU v5 lite")])
def test_a_device_uses_the_kernels_where_they_work_and_is_warned_once_where_they_do_not(found, device, kind):
    notes = []
    found[:] = ["no such instruction", ""]
    assert choose_attention("auto", device, 64, notes.append) and not notes
    assert not choose_attention("auto", device, 64, notes.append)
    assert len(notes) == 1 and f"{kind} (no such instruction)" in notes[0]


@pytest.mark.parametrize(
    "wanted, device, head_dim, kernels",
    [
        ("kernel", GPU, 64, True),
        ("plain", GPU, 64, False),
        ("auto", GPU, 48, True),  # the op knows that it has none
        ("kernel", TPU, 128, True),
        ("plain", TPU, 128, False),
        ("auto", TPU, 80, True),
        ("auto", CPU, 64, True),
        ("plain", CPU, 64, False),
    ],
)
def test_nothing_is_tried_where_there_is_nothing_to_find_out(found, wanted, device, head_dim, kernels):
    assert choose_attention(wanted, device, head_dim, pytest.fail) == kernels


@pytest.fixture
def cudnn_as_xla(monkeypatch):
    """A stand-in for cuDNN's attention, on a device that has no fault of its own."""
    by_xla = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    monkeypatch.setattr(probe, "find_fault", lambda device, head_dim: "")
    monkeypatch.setattr(cudnn, "attend_cudnn", by_xla)
    return by_xla


def test_a_gpu_on_which_cudnn_works_reads_prompts_by_it(cudnn_as_xla, monkeypatch):
    find = probe.find_cudnn_fault.__wrapped__
    monkeypatch.setattr(probe, "find_cudnn_fault", lambda device, head_dim: find(CPU, head_dim))
    assert choose_kernels(GPU, 64, pytest.fail) == "cudnn"
    assert choose_kernels(GPU, 80, pytest.fail) == "cudnn"
    assert choose_kernels(GPU, 60, pytest.fail) is True  # it has no such heads
    assert choose_kernels(TPU, 64, pytest.fail) is True and choose_kernels(CPU, 64, pytest.fail) is True


def test_a_gpu_on_which_it_does_not_keeps_its_kernels_and_says_why(cudnn_as_xla, monkeypatch):
    notes = []
    monkeypatch.setattr(probe, "find_cudnn_fault", lambda device, head_dim: "cuDNN is not detected.")
    assert choose_kernels(GPU, 64, notes.append) is True
    assert notes == [
        "note: cuDNN's attention does not work on this NVIDIA A100 (cuDNN is not detected.): prompts take longer without it"
    ]


def test_a_gpu_without_kernels_does_not_try_it(found):
    found[:] = ["no such instruction"]
    notes = []
    assert choose_kernels(GPU, 64, notes.append) is False and len(notes) == 1


def test_cudnn_is_found_out_where_it_is_not_there_or_wrong(cudnn_as_xla, monkeypatch):
    find = probe.find_cudnn_fault.__wrapped__
    assert find(CPU, 64) == ""
    monkeypatch.setattr(cudnn, "attend_cudnn", lambda *inputs: 1.1 * cudnn_as_xla(*inputs))
    assert "out is wrong by" in find(CPU, 64)
    monkeypatch.undo()
    assert find(CPU, 64)  # jax's words, which differ by version


def test_an_unknown_choice_is_refused():
    with pytest.raises(LlamaError, match="attention is 'cudnn', expected one of auto, kernel, plain"):
        choose_attention("cudnn", GPU, 64, pytest.fail)
