"""Names of accelerators."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.plan.chips import CHIPS, GIB
from llama_jax.plan.topology import FAMILIES, GPUS, CompileTarget, cube_shape, next_larger, parse_topology, slice_sizes


def refused(name: str) -> str:
    with pytest.raises(LlamaError) as caught:
        parse_topology(name)
    assert caught.value.code == ExitCode.UNKNOWN_TOPOLOGY
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "devices", "target"),
    [  # the rows of AI-Hypercomputer/maxtext's accelerator_to_spec_map.py
        ("v5e-1", 1, CompileTarget("v5e:1x1", "default", (1, 1, 1), 1, (False, False, False))),
        ("v5e-16", 16, CompileTarget("v5e:4x4", "default", (2, 2, 1), 1, (False, False, False))),
        ("v6e-128", 128, CompileTarget("v6e:8x16", "default", (2, 2, 1), 1, (False, True, False))),
        ("v6e-256", 256, CompileTarget("v6e:16x16", "default", (2, 2, 1), 1, (True, True, False))),
        ("v4-16", 8, CompileTarget("v4:2x2x2", "megacore", (2, 2, 1), 1, (False, False, False))),
        ("v4-4096", 2048, CompileTarget("v4:8x16x16", "megacore", (2, 2, 1), 1, (True, True, True))),
        ("v5p-32", 16, CompileTarget("v5:2x2x4", "megacore", (2, 2, 1), 1, (False, False, False))),
        ("v5p-128", 64, CompileTarget("v5:4x4x4", "megacore", (2, 2, 1), 1, (True, True, True))),
        ("v5p-1280", 640, CompileTarget("v5:4x8x20", "megacore", (2, 2, 1), 1, (True, True, True))),
        ("v5p-12288", 6144, CompileTarget("v5:16x16x24", "megacore", (2, 2, 1), 1, (True, True, True))),
        ("v7x-2", 2, CompileTarget("tpu7x:1x1x1", "default", (1, 1, 1), 1, (False, False, False))),
        ("v7x-8", 8, CompileTarget("tpu7x:2x2x1", "default", (2, 2, 1), 1, (False, False, False))),
        ("tpu7x-18432", 18432, CompileTarget("tpu7x:16x24x24", "default", (2, 2, 1), 1, (True, True, True))),
        ("2xv5e-256", 512, CompileTarget("v5e:16x16", "default", (2, 2, 1), 2, (True, True, False))),
    ],
)
def test_tpu_slices(name, devices, target):
    topology = parse_topology(name)
    assert (topology.num_devices, topology.target) == (devices, target)
    assert topology.slices == target.num_slices


@pytest.mark.parametrize(
    ("name", "chip", "devices", "per_host"),
    [
        ("h200", "h200", 1, 1),
        ("H200-8", "h200", 8, 8),
        ("h100-8x4", "h100", 32, 8),
        ("a100-40-8", "a100-40", 8, 8),
        ("a100-80-4x2", "a100-80", 8, 4),
        ("l4", "l4", 1, 1),
        ("t4-4", "t4", 4, 4),
    ],
)
def test_gpus(name, chip, devices, per_host):
    topology = parse_topology(name)
    assert (topology.chip, topology.num_devices, topology.devices_per_host) == (CHIPS[chip], devices, per_host)
    assert topology.target is None and topology.slices == 1


def test_aliases_have_one_name():
    assert parse_topology("v5litepod-16") == parse_topology("v5e-16")
    assert parse_topology("tpu7x-64") == parse_topology("v7x-64")
    assert parse_topology("1xv5e-16").name == "v5e-16" and parse_topology("b200-1").name == "b200"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e-12", ["no v5e slice has 12 chips", "1, 4, 8, 16, 32, 64, 128, 256", "nearest are v5e-8 and v5e-16"]),
        ("v5p-100", ["100 TensorCores", "every multiple of 128 up to 12,288", "v5p-64 and v5p-128"]),
        ("v5p-0", ["no v5p slice has 0"]),
        ("0xv5e-16", ["0 slices"]),
        ("h10", ["unknown topology 'h10'", "v4-N, v5e-N", "a100-40, a100-80, h100", "the nearest is h100"]),
        ("a100-8", ["unknown", "the nearest is a100-80"]),
        ("v6-256", ["the nearest is v6e-256"]),
        ("", ["unknown topology ''"]),
        ("h100-9", ["9 GPUs in a node, expected 1 to 8"]),
        ("h100-8x0", ["0 nodes"]),
        ("h100x4", ["unknown"]),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(name, said):
    message = refused(name)
    assert all(part in message for part in said), message


@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data(), slices=st.integers(1, 4))
def test_every_listed_size_parses_to_that_many_devices(family, data, slices):
    size = data.draw(st.sampled_from(slice_sizes(family)))
    topology = parse_topology(f"{slices}x{family}-{size}")
    per_number = {"v4": 0.5, "v5p": 0.5}.get(family, 1)
    assert topology.num_devices == slices * size * per_number
    assert slices * math.prod(topology.torus) * topology.chip.devices_per_chip == topology.num_devices
    assert parse_topology(topology.name) == topology
    assert topology.target.topology_name.endswith(":" + "x".join(map(str, topology.torus)))


@given(text=st.text(max_size=12) | st.from_regex(r"\A(v5e|v5p|h100|2xv4)-[0-9x]{0,6}\Z"))
def test_any_other_text_is_refused_in_a_sentence(text):
    try:
        topology = parse_topology(text)
    except LlamaError as error:
        assert error.code == ExitCode.UNKNOWN_TOPOLOGY
    else:
        assert topology.num_devices >= 1


@given(cubes=st.integers(1, 144))
def test_a_slice_of_cubes_is_as_like_a_cube_as_can_be(cubes):
    a, b, c = cube_shape(64 * cubes)
    assert a * b * c == 64 * cubes and a <= b <= c and all(side % 4 == 0 for side in (a, b, c))
    others = [(x, y) for x in range(4, c, 4) for y in range(x, c, 4) if 64 * cubes % (x * y) == 0]
    assert all(x + y + 64 * cubes // (x * y) >= a + b + c for x, y in others if 64 * cubes // (x * y) % 4 == 0)


@pytest.mark.parametrize("name", ["v5e-16", "v5p-128", "2xv6e-64", "h100", "h100-8x2", *GPUS])
def test_larger_topologies_have_more_of_the_same_chip(name):
    here = parse_topology(name)
    counts = [larger.num_devices for larger in next_larger(here)]
    assert counts == sorted(counts) and counts[0] > here.num_devices
    assert {larger.chip for larger in next_larger(here)} == {here.chip}
    assert not next_larger(parse_topology("v5e-256"))


@pytest.mark.parametrize(("chip", "gib"), [("v4", 30.75), ("v5e", 15.75), ("v5p", 95.74), ("v6e", 31.25), ("v7x", 94.75)])
def test_memory_of_a_tpu_is_what_its_compiler_allows(chip, gib):
    assert CHIPS[chip].hbm_bytes == gib * GIB


def test_what_is_assumed_of_a_chip_is_one_of_its_fields():
    for chip in CHIPS.values():
        assert all(isinstance(getattr(chip, field), float) for field in chip.assumed)
        assert chip.peak("bfloat16") == chip.peak_bfloat16 and chip.peak("float32") == chip.peak_float32
