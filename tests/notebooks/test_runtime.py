"""What the notebooks install and choose, for machines that are not here."""

import types

import jax
import pytest

from notebooks import runtime


def colab(name: str) -> str | None:
    """Everything in the newest version, as it would be found there."""
    return "999.0"


def test_nothing_is_installed_where_all_is_there():
    assert runtime.missing(colab) == []
    assert runtime.missing(runtime.installed) == []  # and this environment, in which the tests run


def test_what_is_missing_or_too_old_is_installed_as_pinned_and_nothing_else():
    found = runtime.missing(lambda name: {"grain": None, "flax": "0.10.0", "tqdm": "1.0", "rich": "1.0"}.get(name, "999.0"))
    assert [line.split("==")[0] for line in found] == ["flax", "grain", "tqdm"]  # rich has no lower bound of ours
    assert all("==" in line for line in found)


def test_jax_and_what_it_stands_on_are_never_replaced():
    only_jax = {"jax": "0.10.2"}
    found = {line.split("==")[0].replace("_", "-").lower() for line in runtime.missing(only_jax.get)}
    assert not found & set(runtime.KEPT)
    assert {"flax", "orbax-checkpoint", "sentencepiece"} <= found


@pytest.mark.parametrize("version", [None, "0.7.2", "0.10.1"])
def test_a_jax_that_is_too_old_is_refused_with_what_to_do(version):
    with pytest.raises(RuntimeError, match=r"needs jax>=0\.10\.2: in Colab choose the latest runtime"):
        runtime.missing({"jax": version}.get)


@pytest.mark.parametrize(
    ("platform", "capability", "dtypes", "rounding"),
    [
        ("tpu", None, ("bfloat16", "bfloat16"), "int8"),
        ("gpu", "7.5", ("float16", "float32"), "int8"),
        ("gpu", "9.0", ("bfloat16", "bfloat16"), "int8"),
        ("cpu", None, ("float32", "float32"), "w8a8"),
    ],
)
def test_the_dtype_is_one_that_the_hardware_multiplies(monkeypatch, platform, capability, dtypes, rounding):
    device = types.SimpleNamespace(platform=platform, device_kind="a device", memory_stats=lambda: {"bytes_limit": 16 * 10**9})
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "devices", lambda: [device])
    found = runtime.find_runtime()
    assert ((found.dtype, found.train_dtype), found.rounding) == (dtypes, rounding)


def test_weights_are_rounded_where_floats_would_fill_more_than_half_of_the_memory():
    tpu = runtime.Runtime("tpu", 1, "TPU v5 lite", 16 * 10**9, "bfloat16", "bfloat16", "int8")
    assert tpu.quantize(1_235_814_400) is None  # Llama 3.2 1B
    assert tpu.quantize(6_738_415_616) == "int8"  # Llama 2 7B
