"""Adapters on disk: saved alone, added to whatever base as it is read, and never to another base in silence."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.checkpoint.adapter import (
    MergedArray,
    adapter_record,
    fingerprint,
    stored_adapter,
)
from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.source import Source, open_source
from llama_jax.checkpoint.store import DTYPES, Checkpoint, to_flat, to_tree
from llama_jax.commands.inspect import describe
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.load import open_weights
from llama_jax.model import LoraConfig, adapter_shapes, merge_adapter, quantize_params, stack_layers
from tests.checkpoint.make import meta_tiny, random_params, write_huggingface, write_meta
from tests.checkpoint.save_adapter import save_adapter
from tests.checkpoint.test_save import save
from tests.make_mesh import mesh_of

CFG = meta_tiny(num_heads=8, num_kv_heads=2, head_dim=6)
LORA = LoraConfig(rank=3, alpha=2.0, targets=("q_proj", "o_proj", "down_proj"))
DORA = dataclasses.replace(LORA, dora=True, rslora=True)


def random_adapter(lora: LoraConfig) -> dict[str, np.ndarray]:
    """By dotted names; its products are as large as the weights of random_params."""
    rng = np.random.default_rng(1)
    shapes = to_flat(adapter_shapes(CFG, lora, scan=False))
    size = {"a": 0.2, "b": 0.2, "magnitude": 0.5}
    return {n: size[n.rpartition(".")[2]] * np.abs(rng.normal(size=s.shape)).astype(np.float32) for n, s in shapes.items()}


def save_lora(path: Path, base: Checkpoint | Source, lora: LoraConfig, *, scan: bool = False, tokenizer_files=()) -> Checkpoint:
    """The checkpoint of random_adapter over a base."""
    tree = jax.tree.map(jnp.asarray, to_tree(random_adapter(lora)))
    checkpoint = Checkpoint(
        path=epath.Path(path),
        config=CFG,
        dtype=np.dtype(np.float32),
        chat_format="llama2",
        tokenizer=tuple(file.name for file in tokenizer_files),
        source={"kind": "trained"},
        command="train",
        adapter=adapter_record(lora, base),
    )
    return save_adapter(checkpoint, stack_layers(tree) if scan else tree, tokenizer_files=tokenizer_files)


merge = jax.jit(merge_adapter, static_argnums=(0, 3))


def merged(params: dict[str, np.ndarray], lora: LoraConfig) -> dict[str, jax.Array]:
    """By dotted names, float32."""
    tree = to_tree({name: jnp.asarray(value, jnp.float32) for name, value in params.items()})
    return to_flat(merge(CFG, tree, to_tree(random_adapter(lora)), lora))


def assert_equal(loaded, wanted, **tolerance) -> None:
    loaded = to_flat(loaded)
    assert loaded.keys() == wanted.keys()
    for name, array in loaded.items():
        np.testing.assert_allclose(np.float32(array), np.float32(wanted[name]), err_msg=name, **tolerance)


# --- saved and loaded


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_is_saved_alone_and_comes_back_to_the_bit(tmp_path, scan):
    base = save(tmp_path / "base", CFG, random_params(CFG))
    save_lora(tmp_path / "lora", base, DORA, scan=scan)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter", "checkpoint.json"]
    found = stored_adapter(Checkpoint.open(tmp_path / "lora"))
    assert found.lora == DORA
    for name, array in random_adapter(DORA).items():
        np.testing.assert_array_equal(found.arrays[name], array)


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["ours", "huggingface", "meta"])
def test_loading_an_adapter_loads_its_base_with_it(tmp_path, kind, lora):
    params = random_params(CFG, 0, ml_dtypes.bfloat16)
    if kind == "ours":
        base = save(tmp_path / "base", CFG, params)
    else:
        {"huggingface": write_huggingface, "meta": write_meta}[kind](tmp_path / "base", CFG, params)
        base = open_source(tmp_path / "base", max_length=None if kind == "huggingface" else 64)
    save_lora(tmp_path / "lora", base, lora)
    opened = open_weights(tmp_path / "lora")
    assert (opened.config, opened.dtype, opened.chat_format) == (CFG, np.dtype(ml_dtypes.bfloat16), "llama2")
    wanted = merged(params, lora)
    assert_equal(load_params(opened, DTYPES["float32"]), wanted, rtol=0, atol=1e-6)
    assert_equal(load_params(opened, DTYPES["bfloat16"]), wanted, rtol=2**-8, atol=1e-7)  # rounded once, from that


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_on_a_mesh_every_device_gets_its_part_of_the_sum(tmp_path, lora):
    params = random_params(CFG)
    save_lora(tmp_path / "lora", save(tmp_path / "base", CFG, params), lora)
    loaded = load_params(open_weights(tmp_path / "lora"), DTYPES["float32"], mesh=mesh_of("2x2x2"), scan=True)
    assert loaded["layers"]["q_proj"].addressable_shards[0].data.shape == (2, 4, 6, 24)
    wanted = to_flat(stack_layers(to_tree(merged(params, lora))))
    assert_equal(loaded, wanted, rtol=0, atol=1e-6)


def test_int8_is_of_the_sum(tmp_path):
    params = random_params(CFG)
    save_lora(tmp_path / "lora", save(tmp_path / "base", CFG, params), LORA)
    loaded = load_params(open_weights(tmp_path / "lora"), DTYPES["float32"], quantize="int8")
    wanted = jax.jit(quantize_params)(to_tree(merged(params, LORA)))
    for ours, exact in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-6 if ours.dtype != jnp.int8 else 1)


@given(st.data(), st.booleans())
def test_a_part_of_a_sum_is_that_part_of_it(data, dora):
    """Of what is [D, N, H], with two axes of inputs."""
    rng = np.random.default_rng(0)
    weight, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 4, 3), (2, 4, 3), (5, 2)))
    array = MergedArray(InMemory(weight), a, b, np.arange(1, 6, dtype=np.float32) if dora else None, 0.5)
    parts = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in weight.shape)
    np.testing.assert_allclose(array.read(parts), array.read()[parts], rtol=0, atol=1e-6)
    total = weight + 0.5 * np.einsum("DR,RNH->DNH", b, a)
    exact = total * (np.arange(1, 6) / np.linalg.norm(total.reshape(5, -1), axis=1))[:, None, None] if dora else total
    np.testing.assert_allclose(array.read(), exact, rtol=0, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class InMemory:
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, index=None) -> np.ndarray:
        return self.array if index is None else self.array[index]

    def release(self) -> None: ...


# --- whose base


def test_a_fingerprint_is_of_values_and_not_of_formats(tmp_path):
    params = random_params(CFG, 0, ml_dtypes.bfloat16)
    ours = save(tmp_path / "ours", CFG, params)
    write_huggingface(tmp_path / "hf", CFG, params)
    write_meta(tmp_path / "meta", CFG, params)
    wide = save(tmp_path / "wide", CFG, {name: array.astype(np.float32) for name, array in params.items()})
    found = {fingerprint(base) for base in (ours, wide, open_source(tmp_path / "hf"), open_source(tmp_path / "meta"))}
    assert len(found) == 1
    changed = params | {"layers.1.v_proj": params["layers.1.v_proj"] + params["layers.1.v_proj"]}
    found |= {fingerprint(save(tmp_path / "changed", CFG, changed))}
    for lora in (LORA, DORA):
        save_lora(tmp_path / f"lora {lora.dora}", ours, lora)
        found |= {fingerprint(open_weights(tmp_path / f"lora {lora.dora}"))}
    assert len(found) == 4


def test_an_adapter_of_an_adapted_model_is_loaded_over_both(tmp_path):
    params = random_params(CFG)
    save_lora(tmp_path / "first", save(tmp_path / "base", CFG, params), LORA)
    save_lora(tmp_path / "second", open_weights(tmp_path / "first"), DORA)
    first = {name: np.asarray(array) for name, array in merged(params, LORA).items()}
    loaded = load_params(open_weights(tmp_path / "second"), DTYPES["float32"])
    assert_equal(loaded, merged(first, DORA), rtol=0, atol=1e-6)


def test_another_base_in_its_place_is_refused_and_may_be_given(tmp_path, capsys):
    base, other = random_params(CFG, 0), random_params(CFG, 1)
    save_lora(tmp_path / "lora", save(tmp_path / "base", CFG, base), LORA)
    save(tmp_path / "base", CFG, other, overwrite=True)
    with pytest.raises(
        LlamaError, match=r"has other weights than the base .* trained on.*give the base as the checkpoint"
    ) as e:
        open_weights(tmp_path / "lora")
    assert e.value.code == ExitCode.NOT_EQUAL
    capsys.readouterr()
    loaded = load_params(open_weights(tmp_path / "base", tmp_path / "lora"), DTYPES["float32"])
    assert "warning: " in (said := capsys.readouterr().err) and "has other weights" in said
    assert_equal(loaded, merged(other, LORA), rtol=0, atol=1e-6)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(LlamaError, match=r"lora is an adapter, and its base is not there \(.*base does not exist"):
        open_weights(tmp_path / "lora")
    wider = dataclasses.replace(CFG, mlp_dim=96)
    save(tmp_path / "wider", wider, random_params(wider))
    with pytest.raises(LlamaError, match=r"lora is an adapter for mlp_dim 80, and .*wider has 96"):
        open_weights(tmp_path / "wider", tmp_path / "lora")


def test_an_adapter_is_no_model_and_a_model_no_adapter(tmp_path):
    base = save(tmp_path / "base", CFG, random_params(CFG))
    adapter = save_lora(tmp_path / "lora", base, LORA)
    with pytest.raises(LlamaError, match=r"lora holds an adapter and no model .its base is .*base.*export --merge"):
        Checkpoint.open(tmp_path / "lora").arrays()
    with pytest.raises(LlamaError, match="base holds a whole model"):
        open_weights(tmp_path / "base", tmp_path / "base")
    lines = describe(adapter).splitlines()
    assert lines[1] == "adapter      LoRA, rank 3, alpha 2, of q_proj, o_proj, down_proj"
    assert lines[2].startswith(f"parameters   {sum(a.size for a in random_adapter(LORA).values()):,} in float32, beside the ")
    assert lines[3] == f"base         {tmp_path / 'base'}"
