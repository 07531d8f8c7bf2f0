"""Quantised weights on disk: what is loaded is what rounding at load gives, to the bit, wherever it lies."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.checkpoint import load as loading
from llama_jax.checkpoint import save as saving
from llama_jax.checkpoint import save_quantized as rounding
from llama_jax.checkpoint.adapter import reader
from llama_jax.checkpoint.load import load_params, read_part
from llama_jax.checkpoint.quantized import (
    DequantizedArray,
    PackedArray,
    QuantizedReader,
    named_parts,
    pack,
    quantized_form,
    stored_bytes,
    unpack,
)
from llama_jax.checkpoint.save import ARRAY_BYTES, ROOM_BYTES
from llama_jax.checkpoint.save_quantized import save_quantized
from llama_jax.checkpoint.store import DTYPES, MANIFEST, Checkpoint, to_flat
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.ops.qarray import METHODS, QArray, W8A8Array, dequantize, quantize
from tests.checkpoint.make import meta_tiny, random_params
from tests.checkpoint.mesh import run
from tests.checkpoint.test_adapter import InMemory
from tests.checkpoint.test_mesh_load import counted
from tests.checkpoint.test_mesh_save import mesh_of
from tests.checkpoint.test_save import save

CFG = meta_tiny(vocab_size=331, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=256)
ODD = meta_tiny(vocab_size=41, embed_dim=45, mlp_dim=81)  # the last axis of most weights cannot be cut in two
BIG = meta_tiny(
    vocab_size=64, embed_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=2048, num_layers=1, tied_head=True
)


def stored(
    folder: Path, cfg: ModelConfig, method: str, dtype: str = "float32", **options: Any
) -> tuple[Checkpoint, Checkpoint]:
    """Float weights in folder/float, and the same quantised in folder/METHOD; both opened."""
    if not (folder / "float").exists():
        save(folder / "float", cfg, random_params(cfg, 0, DTYPES[dtype]))
    floats = Checkpoint.open(folder / "float")
    save_quantized(described(folder / method, floats, method), floats)
    return floats, Checkpoint.open(folder / method)


def described(path: Path, floats: Checkpoint, method: str) -> Checkpoint:
    return dataclasses.replace(floats, path=epath.Path(path), quantize=method, command="quantize --checkpoint float")


def assert_same(found: Any, wanted: Any) -> None:
    """Kinds, dtypes, places and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) and ours.committed == theirs.committed
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


# --- two to a byte


@given(st.data(), st.integers(1, 9))
def test_packed_values_and_every_part_of_them_come_back(data, size):
    values = np.random.default_rng(size).integers(-8, 8, (3, size)).astype(ml_dtypes.int4)
    packed = pack(values)
    assert packed.dtype == np.uint8 and packed.shape == (3, math.ceil(size / 2))
    array = PackedArray(InMemory(packed), size)
    parts = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in values.shape)
    assert array.shape == values.shape and array.read().dtype == ml_dtypes.int4
    np.testing.assert_array_equal(array.read(), values)
    np.testing.assert_array_equal(array.read(parts), values[parts])


def test_the_first_of_two_is_in_the_low_bits_whoever_made_them():
    expected = np.array([[0x81, 0xF7, 0x03]], np.uint8)
    values = np.array([[1, -8, 7, -1, 3]], np.int8)
    np.testing.assert_array_equal(pack(values.astype(ml_dtypes.int4)), expected)
    np.testing.assert_array_equal(pack(np.asarray(jnp.asarray(values, jnp.int4))), expected)
    np.testing.assert_array_equal(unpack(expected).astype(np.int8), [[1, -8, 7, -1, 3, 0]])


@given(st.data(), st.sampled_from(sorted(METHODS)))
def test_a_part_of_what_quantised_weights_stand_for_is_that_part_of_it(data, method):
    """Of what is [D, N, H] with two axes of inputs and, in int4, three groups: a head has parts in two."""
    weight = np.random.default_rng(0).normal(size=(5, 6, 64)).astype(np.float32)
    rounded = quantize(jnp.asarray(weight), 2, method)
    array = DequantizedArray(*(InMemory(np.asarray(part)) for part in rounded))
    parts = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in weight.shape)
    exact = np.asarray(dequantize(rounded, jnp.float32))
    assert array.read().dtype == np.float32
    np.testing.assert_array_equal(array.read(), exact)
    np.testing.assert_array_equal(array.read(parts), exact[parts])


# --- loaded


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_and_rounded_at_load_are_the_same_bits_on_one_device(tmp_path, method, dtype):
    floats, checkpoint = stored(tmp_path, CFG, method, dtype)
    assert (checkpoint.quantize, checkpoint.dtype, checkpoint.config) == (method, DTYPES[dtype], CFG)
    for scan in (False, True):
        wanted = load_params(floats, DTYPES[dtype], quantize=method, scan=scan)
        found = load_params(checkpoint, DTYPES[dtype], scan=scan)
        assert_same(found, wanted)
        assert_same(load_params(checkpoint, DTYPES[dtype], quantize=method, scan=scan), wanted)
    assert type(found["lm_head"]) is (W8A8Array if method == "w8a8" else QArray)
    assert found["lm_head"].value.dtype == METHODS[method][0]


@pytest.mark.parametrize("method", METHODS)
def test_axes_of_odd_size_are_stored_too(tmp_path, method):
    floats, checkpoint = stored(tmp_path, ODD, method)
    assert_same(load_params(checkpoint, DTYPES["float32"]), load_params(floats, DTYPES["float32"], quantize=method))


@pytest.mark.parametrize(
    ("sizes", "scan", "method"),
    [("1x2x4", False, method) for method in METHODS]
    + [("2x2x2", True, method) for method in METHODS]
    + [("1x1x8", True, "int4"), ("1x8x1", False, "int4")],
)
def test_stored_and_rounded_at_load_are_the_same_bits_on_a_mesh(tmp_path, sizes, scan, method):
    """Rows of padding, and key/value heads that do not divide, too."""
    floats, checkpoint = stored(tmp_path, CFG, method, "bfloat16")
    where = dict(mesh=mesh_of(sizes), scan=scan)
    wanted = load_params(floats, DTYPES["bfloat16"], quantize=method, **where)
    assert_same(load_params(checkpoint, DTYPES["bfloat16"], **where), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_is_of_what_is_not_rounded(tmp_path, method):
    _, checkpoint = stored(tmp_path, CFG, method)
    exact, cast = (to_flat(load_params(checkpoint, DTYPES[dtype])) for dtype in ("float32", "bfloat16"))
    assert cast["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast["embedding"], exact["embedding"].astype(jnp.bfloat16))
    assert_same(cast["layers.0.q_proj"], exact["layers.0.q_proj"])


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_read_as_the_floats_that_they_stand_for(tmp_path, method):
    _, checkpoint = stored(tmp_path, CFG, method)
    for name, weight in to_flat(load_params(checkpoint, DTYPES["float32"])).items():
        exact = dequantize(weight, jnp.float32) if isinstance(weight, QArray) else weight
        np.testing.assert_array_equal(reader(checkpoint)(name).read(), exact, err_msg=name)


# --- bytes


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_on_disk_has_the_bytes_it_should(tmp_path, method):
    cfg = dataclasses.replace(BIG, embed_dim=512, num_heads=4, num_kv_heads=4, mlp_dim=1024)
    floats, checkpoint = stored(tmp_path, cfg, method, "bfloat16")
    each = {"int8": 1, "w8a8": 1, "fp8": 1, "int4": 0.5}[method]
    weights = 4 * 512 * 512 + 3 * 1024 * 512
    scales = 4 * (4 * 512 + 2 * 1024 + 512) if each == 1 else 2 * weights // 128
    rest = 2 * (cfg.vocab_size * 512 + 3 * 512)
    assert stored_bytes(checkpoint) == weights * each + scales + rest
    assert stored_bytes(floats) == cfg.num_params * 2
    assert 0 <= size_of(tmp_path / method / "params") - stored_bytes(checkpoint) <= 18 * ARRAY_BYTES + ROOM_BYTES


def bytes_of_one_device(folder: str) -> list[dict[str, Any]]:
    """What the last device's parts have in bytes on disk, and what reading them costs; then of loading all devices'."""
    table = []
    for method in METHODS:
        checkpoint = Checkpoint.open(Path(folder) / method)
        for sizes in ("1x2x4", "2x2x2"):
            mesh, parts = mesh_of(sizes), QuantizedReader(checkpoint)
            targets = loading._targets(BIG, np.dtype(np.float32), mesh, False)
            found: dict[str, int] = {}
            size = 0.0
            with counted(found):
                for name, form in loading._quantized(BIG, targets, method, mesh, False).items():
                    for part, target in named_parts(name, form).items():
                        index = target.sharding.devices_indices_map(target.shape)[mesh.devices.flat[-1]]
                        ranges = tuple(axis.indices(n)[:2] for axis, n in zip(index, target.shape, strict=True))
                        size += (
                            read_part([parts.part(part)], ranges, target.dtype).size
                            * np.dtype(target.dtype).itemsize
                            * (0.5 if target.dtype == jnp.int4 else 1)
                        )
            everything: dict[str, int] = {}
            with counted(everything):
                jax.block_until_ready(load_params(checkpoint, np.dtype(np.float32), mesh=mesh))
            table.append(
                {"method": method, "mesh": sizes, "part": size, "read": found["files"], "all": everything["files"]}
                | {"whole": stored_bytes(checkpoint)}
            )
    return table


def test_a_device_reads_little_more_than_its_part_and_each_part_is_read_once(tmp_path):
    """On meshes whose parts are chunks; weights of 2 MiB, which is int4's here, have 8 chunks of the least size."""
    for method in METHODS:
        stored(tmp_path, BIG, method)
    (table,) = run(bytes_of_one_device, tmp_path)
    assert len(table) == 8
    for row in table:
        copies = 2 if row["mesh"] == "2x2x2" else 1
        assert row["part"] <= 1.1 * copies * row["whole"] / 8, row  # scales are cut along one axis only
        assert row["part"] <= row["read"] <= 1.3 * row["part"], row
        assert row["whole"] <= row["all"] <= 1.2 * row["whole"], row


# --- written


def test_few_weights_are_in_memory_together(tmp_path, monkeypatch):
    floats, together = Checkpoint.open(save(tmp_path / "float", CFG, random_params(CFG)).path), []
    first = rounding._round

    def watched(leaf: str, weight: Any, method: str) -> Any:
        together.append(sum(array.nbytes > 4096 for array in jax.live_arrays()))
        return first(leaf, weight, method)

    before = sum(array.nbytes > 4096 for array in jax.live_arrays())
    monkeypatch.setattr(rounding, "_round", watched)
    monkeypatch.setattr(saving, "TOGETHER_BYTES", 1)  # as for weights of a size that makes each go alone
    save_quantized(described(tmp_path / "int8", floats, "int8"), floats)
    assert len(together) == 2 * 7 + 1 and max(together) <= before + 2  # the one before, which may not be collected yet
    assert_same(
        load_params(Checkpoint.open(tmp_path / "int8"), DTYPES["float32"]),
        load_params(floats, DTYPES["float32"], quantize="int8"),
    )


@pytest.mark.parametrize("method", METHODS)
def test_orbax_itself_restores_what_is_stored(tmp_path, method):
    _, checkpoint = stored(tmp_path, CFG, method)
    with ocp.StandardCheckpointer() as checkpointer:
        found = to_flat(checkpointer.restore((tmp_path / method / "params").absolute()))
    for name, weight in to_flat(load_params(checkpoint, DTYPES["float32"])).items():
        for part, array in named_parts(name, weight).items():
            restored = np.asarray(found.pop(part))
            np.testing.assert_array_equal(unpack(restored) if array.dtype == jnp.int4 else restored, np.asarray(array))
    assert not found


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["layers.1.up_proj", "embedding"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path, bad, name):
    params = random_params(CFG)
    params[name][3, 5] = bad
    floats = save(tmp_path / "float", CFG, params)
    with pytest.raises(LlamaError, match=f"{name} has NaN or infinite values in float32") as caught:
        save_quantized(described(tmp_path / "int4", floats, "int4"), floats)
    assert caught.value.code == ExitCode.NOT_FINITE and not (tmp_path / "int4").exists()


def save_until_killed(folder: str) -> None:
    floats = Checkpoint.open(f"{folder}/float")

    def written(name: str, nbytes: int) -> None:
        if name == "layers.1.up_proj.value":
            os._exit(9)

    save_quantized(described(Path(folder) / "int8", floats, "int8"), floats, written=written)


def test_a_killed_run_leaves_no_checkpoint_and_the_next_begins_anew(tmp_path):
    save(tmp_path / "float", CFG, random_params(CFG))
    with pytest.raises(AssertionError, match=r"exit 9"):
        run(save_until_killed, tmp_path, devices=1)
    assert (tmp_path / "int8").exists()
    with pytest.raises(LlamaError, match="holds no complete llama_jax checkpoint"):
        Checkpoint.open(tmp_path / "int8")
    floats, checkpoint = stored(tmp_path, CFG, "int8")
    assert_same(load_params(checkpoint, DTYPES["float32"]), load_params(floats, DTYPES["float32"], quantize="int8"))


# --- refused


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Checkpoint:
    return stored(tmp_path_factory.mktemp("stored"), CFG, "int8")[1]


def rewritten(checkpoint: Checkpoint, folder: Path, **changes: Any) -> Checkpoint:
    """The same arrays under another checkpoint.json."""
    folder.mkdir()
    (folder / "params").symlink_to(Path(checkpoint.path) / "params")
    manifest = json.loads((checkpoint.path / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("method", ["int4", "w8a8", "fp8"])
def test_another_method_than_the_stored_one_is_refused_with_what_to_do(int8, method):
    words = f"holds int8 weights, and quantize is '{method}': .* checkpoint .* \\(quantize --checkpoint float\\), or leave"
    with pytest.raises(LlamaError, match=words) as caught:
        load_params(int8, DTYPES["float32"], quantize=method)
    assert caught.value.code == ExitCode.BAD_REQUEST


def test_who_needs_floats_is_told_where_they_are(int8):
    with pytest.raises(LlamaError, match=r"holds int8 weights, and this needs floats: .* \(quantize --checkpoint float\)"):
        int8.arrays()


def test_readers_of_floats_only_refuse_it_by_its_version(int8, tmp_path):
    floats = save(tmp_path / "float", CFG, random_params(CFG))
    assert json.loads((int8.path / MANIFEST).read_text())["version"] == 2
    manifest = json.loads((floats.path / MANIFEST).read_text())
    assert manifest["version"] == 1 and "quantize" not in manifest


def test_a_method_of_a_later_version_is_refused(int8, tmp_path):
    with pytest.raises(LlamaError, match="quantised by 'int2', this llama_jax knows int8, w8a8, int4, fp8: update it"):
        rewritten(int8, tmp_path / "c", quantize="int2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(quantize="fp8"), r"array 'layers.0.q_proj.value' is int8, expected float8_e4m3fn: quantise the float checkpoint"),
        (dict(quantize="int4"), r"array 'layers.0.q_proj.value' is int8, expected uint8"),
        (
            dict(quantize="int8", config=dict(mlp_dim=96)),
            r"array 'layers.0.gate_proj.value' has shape \[256, 64\], expected",
        ),
        (
            dict(quantize="int8", config=dict(num_layers=3)),
            r"no readable array 'layers.2.attn_norm' .*: quantise the float",
        ),
    ],
)
def test_arrays_that_are_not_what_the_checkpoint_says_are_refused(int8, tmp_path, changes, message):
    config = dataclasses.asdict(CFG) | changes.pop("config", {})
    with pytest.raises(LlamaError, match=message):
        load_params(rewritten(int8, tmp_path / "c", config=config, **changes), DTYPES["float32"])


def test_packed_values_of_another_size_are_refused(tmp_path):
    _, checkpoint = stored(tmp_path, ODD, "int4")
    other = dataclasses.replace(checkpoint, config=dataclasses.replace(ODD, mlp_dim=83))
    with pytest.raises(LlamaError, match=r"array 'layers.0.gate_proj.value' has shape \[81, 45\], expected \[83, 45\]"):
        load_params(other, DTYPES["float32"])
    assert quantized_form("norm", jax.ShapeDtypeStruct((3,), np.float32), "int4").dtype == np.float32
