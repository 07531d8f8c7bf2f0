"""Choosing between the GPU's attention kernel and plain attention; the CPU's interpreter stands for a GPU on which it works."""

import functools
import types

import jax
import pytest

from llama_jax.errors import LlamaError
from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import decode, flash, gemv, probe
from llama_jax.ops.kernels.probe import choose_attention

GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100")
CPU = jax.devices("cpu")[0]


@pytest.fixture
def found(monkeypatch):
    """Faults to be found on a GPU, each once."""
    faults = []
    monkeypatch.setattr(probe, "find_fault", lambda device, head_dim: faults.pop())
    return faults


def interpret(monkeypatch, module, name: str) -> None:
    monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))


@pytest.fixture
def working_flash(monkeypatch):
    monkeypatch.setattr(flash, "attend_flash", functools.partial(attend_causal, kernels=False))


def test_kernels_that_work_have_no_fault(monkeypatch):
    interpret(monkeypatch, flash, "attend_flash")
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

    def wrong(x, weights, **options):
        kinds.append(len(kinds))
        return (1.1 if kinds[-1] == broken else 1.0) * right(x, weights, **options)

    monkeypatch.setattr(gemv, "multiply_row", wrong)
    jax.clear_caches()  # what was traced with the right one
    assert said in probe.find_fault.__wrapped__(CPU, 64)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch, factor):
    def wrong(q, k, v, segment_ids):
        return q * factor

    monkeypatch.setattr(flash, "attend_flash", wrong)
    assert "out is wrong by" in probe.find_fault.__wrapped__(CPU, 64)


def test_a_gpu_uses_the_kernel_where_it_works_and_is_warned_once_where_it_does_not(found):
    notes = []
    found[:] = ["no such instruction", ""]
    assert choose_attention("auto", GPU, 64, notes.append) and not notes
    assert not choose_attention("auto", GPU, 64, notes.append)
    assert len(notes) == 1 and "A100 (no such instruction)" in notes[0]


@pytest.mark.parametrize(
    "wanted, device, head_dim, kernels",
    [
        ("kernel", GPU, 64, True),
        ("plain", GPU, 64, False),
        ("auto", GPU, 48, True),  # the op knows that it has none
        ("auto", CPU, 64, True),
        ("plain", CPU, 64, False),
    ],
)
def test_nothing_is_tried_where_there_is_nothing_to_find_out(found, wanted, device, head_dim, kernels):
    assert choose_attention(wanted, device, head_dim, pytest.fail) == kernels


def test_an_unknown_choice_is_refused():
    with pytest.raises(LlamaError, match="attention is 'cudnn', expected one of auto, kernel, plain"):
        choose_attention("cudnn", GPU, 64, pytest.fail)
