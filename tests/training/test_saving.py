"""Training states on disk: to the bit, from any form and mesh to any other; what is refused; what is kept."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath

from llama_jax.checkpoint.arrays import on_host
from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.save_quantized import save_quantized
from llama_jax.checkpoint.store import Checkpoint, to_flat
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape
from llama_jax.model import LoraConfig
from llama_jax.sharding import make_mesh
from llama_jax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from llama_jax.training.restoring import initial_params, restore
from llama_jax.training.state import StateForm, TrainState, evaluated, state_shapes, state_shardings, trained_axes
from llama_jax.training.stored import state_layout
from tests.checkpoint.test_save import save
from tests.training.make import CFG, training_mesh
from tests.training.states import IDENTITY, assert_is, assert_stored, layout_of, saver_of, state_of


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_to_the_bit_on_any_mesh_and_in_either_form(tmp_path, name):
    saved = layout_of(name, "2x2x2", scan=True)
    with jax.set_mesh(training_mesh("2x2x2")), saver_of(tmp_path, saved) as saver:  # as the steps are called
        saver.save(state_of(saved, step=7), extra={"seed": 3})
    assert_stored(tmp_path / "checkpoints/7", saved)
    others = ("8x1x1", "1x8x1", "1x1x8") if name == "adamw" else ()
    for layout in (saved, layout_of(name), *(layout_of(name, mesh) for mesh in others)):
        state, extra = restore(tmp_path, layout, identity=IDENTITY)
        assert_is(state, layout, step=7)
        assert extra == {"seed": 3}


FORMS = {
    "bf16 moments": (OptimizerConfig(moment_dtype="bfloat16"), {}),
    "frozen": (OptimizerConfig("muon"), dict(freeze=("embedding", "layers[.].*_norm"))),
    "average": (OptimizerConfig("adafactor"), dict(ema=True, freeze=("lm_head",))),
    "lora": (OptimizerConfig(), dict(lora=LoraConfig(rank=3, targets=("q_proj", "down_proj"), dora=True), ema=True)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_state_of_any_form_comes_back_to_the_bit(tmp_path, name):
    optimizer, form = FORMS[name]
    saved, restored = layout_of(optimizer, **form), layout_of(optimizer, "2x2x2", scan=True, **form)
    with saver_of(tmp_path, saved) as saver:
        saver.save(state_of(saved))
    assert_stored(tmp_path / "checkpoints/1", saved)
    assert_is(restore(tmp_path, restored, identity=IDENTITY)[0], restored)


def test_an_optimizer_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    """To the bit, from arrays that it has made, with a row of padding (whose own moments start anew)."""
    form, mesh = StateForm(True), make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    optimizer = make_optimizer(OptimizerConfig("adafactor", warmup_steps=1, total_steps=9), trained_axes(CFG, form))
    layout = state_layout(CFG, optimizer, form, mesh=mesh)
    places = state_shardings(CFG, optimizer, form, mesh=mesh)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    def step(state):
        gradients = jax.tree.map(lambda weight: jax.numpy.sin(weight * state.step), state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), {}, opt_state, {})

    with jax.set_mesh(mesh), saver_of(tmp_path, layout) as saver:
        drawn = state_of(layout)
        state = step(dataclasses.replace(drawn, opt_state=jax.tree.map(lambda leaf: leaf * 0, drawn.opt_state)))
        saver.save(state)
        straight = step(step(state))
        saver.wait()
        again = step(step(restore(tmp_path, layout, identity=IDENTITY)[0]))
    for room, of in layout.rooms(straight).items():
        one, other = on_host(of.leaves), on_host(layout.rooms(again)[room].leaves)
        for name, leaf in one.items():
            for (_, piece), (_, same) in zip(leaf.pieces, other[name].pieces, strict=True):
                assert piece.tobytes() == same.tobytes(), name


@pytest.mark.parametrize("kind", ["average", "schedule_free"])
def test_params_have_the_weights_to_sample_with_and_state_those_that_train(tmp_path, kind):
    """Nothing is stored twice but schedule_free's, whose average is in no array of the state."""
    layout = layout_of("schedule_free") if kind == "schedule_free" else layout_of("sgd", ema=True, freeze=("lm_head",))
    state = state_of(layout)
    with saver_of(tmp_path, layout) as saver:
        saver.save(state)
    checkpoint = Checkpoint.open(tmp_path)
    found = to_flat(load_params(checkpoint, np.dtype(np.float32)))
    wanted = to_flat(jax.jit(evaluated, static_argnums=0)(layout.form, state)[0])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value)[: found[name].shape[0]].tobytes(), name
        assert np.asarray(found[name]).tobytes() != np.asarray(to_flat(state.params)[name]).tobytes() or name == "lm_head"
    assert bool(layout.averages) == (kind == "schedule_free")


def test_the_weights_of_a_run_are_loaded_like_those_of_any_checkpoint(tmp_path):
    layout = layout_of("adamw", "1x1x8", scan=True)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"tokens")
    options = dict(tokenizer_files=[file], chat_format="llama2", source={"kind": "training"}, command="train")
    with saver_of(tmp_path / "run", layout, **options) as saver:
        saver.save(state_of(layout, step=1))
        saver.save(state_of(layout, step=20, seed=1))
        saver.save(state_of(layout, step=3, seed=2))
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert checkpoint.path == epath.Path(tmp_path / "run/checkpoints/20")
    assert (checkpoint.config, checkpoint.dtype, checkpoint.chat_format) == (layout.cfg, np.float32, "llama2")
    assert (checkpoint.tokenizer, checkpoint.source, checkpoint.command) == (
        ("tokenizer.model",),
        {"kind": "training"},
        "train",
    )
    assert (checkpoint.path / "tokenizer.model").read_bytes() == b"tokens"
    params = load_params(checkpoint, np.dtype(np.float32))
    plain = layout_of()
    expected = to_flat(state_of(plain, step=20, seed=1).params)
    assert {name: np.asarray(value).tobytes() for name, value in to_flat(params).items()} == {
        name: np.asarray(value).tobytes() for name, value in expected.items()
    }


def test_names_and_chunks_on_disk_do_not_depend_on_mesh_and_form():
    """Moments are cut as their parameters are, on meshes of the widest axes too."""
    one, other = layout_of("muon"), layout_of("muon", "1x8x1", scan=True)
    assert one.arrays() == other.arrays()
    axes = [{name: leaf.axes for leaf in layout.leaves.values() for name in leaf.names} for layout in (one, other)]
    assert axes[0] == axes[1]
    assert axes[0]["opt_state.1.layers.0.k_proj.0.mu"] == axes[0]["layers.0.k_proj"] == ("kv_heads", "head_dim", "embed")
    assert axes[0]["opt_state.1.embedding.mu"] == ("vocab", "embed") and axes[0]["step"] == ()


# --- what is refused


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    layout = layout_of()
    with saver_of(folder, layout) as saver:
        saver.save(state_of(layout, step=1))
        saver.save(state_of(layout, step=2, seed=1))
    return folder


DEEPER = dataclasses.replace(CFG, num_layers=3)
BF16 = OptimizerConfig(moment_dtype="bfloat16")
OTHERS = {
    "model": (dict(cfg=DEEPER), {}, "model.num_layers is 2 in the checkpoint and 3 in the config"),
    "context": (dict(cfg=dataclasses.replace(CFG, max_length=99)), {}, "model.max_length is 256 in the .* 99 in the config"),
    "optimizer": (dict(optimizer="lion"), {"optimizer.name": "lion"}, "optimizer.name is adamw in the .* lion in the config"),
    "moments": (dict(optimizer=BF16), {}, r"state/opt_state.1.mu.embedding is float32\[321, 48\] in .* bfloat16\[321, 48\] in"),
    "lora": (dict(lora=LoraConfig(2)), {}, "lora.rank is 0 in the checkpoint and 2 in the config; .*; and .* more"),
    "average": (dict(ema=True), {}, "train.ema is False in the checkpoint and True in the config"),
    "frozen": (dict(freeze=("embedding",)), {}, r"train.freeze is \[\] in the checkpoint and \['embedding'\] in the config"),
    "seed": ({}, {"seed": 1}, "seed is absent in the checkpoint and 1 in the config"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_run_is_refused_by_name_with_what_to_do(workdir, name):
    options, identity, message = OTHERS[name]
    with pytest.raises(LlamaError, match=f"{message}.*another --workdir") as caught:
        restore(workdir, layout_of(**options), identity=IDENTITY | identity)
    assert caught.value.code == ExitCode.BAD_CONFIG and "--config.init_from=" in str(caught.value)


def test_a_converted_checkpoint_has_nothing_to_go_on_from(tmp_path):
    save(tmp_path / "c", CFG, to_flat(jax.tree.map(np.asarray, state_of(layout_of()).params)))
    with pytest.raises(LlamaError, match=r"c has weights and no state/run.json, it is no training run's: .*init_from=.*c and"):
        restore(tmp_path / "c", layout_of(), identity=IDENTITY)


def test_an_adapter_comes_back_beside_the_base_it_is_given(tmp_path):
    layout = layout_of(lora=LoraConfig(2, targets=("k_proj",)), base_dtype="bfloat16", quantize="int8")
    base = {"embedding": jax.numpy.ones(3)}
    with saver_of(tmp_path, layout) as saver:
        saver.save(state_of(layout, base=base))
    assert sorted(file.name for file in (tmp_path / "checkpoints/1").iterdir()) == ["adapter", "checkpoint.json", "state"]
    state, _ = restore(tmp_path, layout, identity=IDENTITY, base=base)
    assert state.params is base
    assert_is(state, layout)


@pytest.mark.parametrize("damage", ["missing", "short", "run.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_still_restores(workdir, tmp_path, damage):
    shutil.copytree(workdir, tmp_path / "run")
    if damage == "run.json":
        (tmp_path / "run/checkpoints/2/state/run.json").write_text("{")
    for file in (tmp_path / "run/checkpoints/2/state").rglob("d/*"):
        file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:99]) if damage == "short" else None
    with pytest.raises(
        LlamaError, match=r"checkpoints/2/state.*: remove .*checkpoints/2 to go on from the checkpoint"
    ) as caught:
        restore(tmp_path / "run", layout_of(), identity=IDENTITY)
    assert caught.value.code == ExitCode.TRUNCATED
    saver_of(tmp_path / "run", layout_of()).close()  # which is not in the way of the others
    assert_is(restore(tmp_path / "run/checkpoints/1", layout_of(), identity=IDENTITY)[0], layout_of())


# --- starting from weights


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_a_run_starts_from_anybodys_weights_in_its_own_form(tmp_path, base):
    """A context of another length is the config's business; other shapes are another model."""
    value = jax.tree.map(lambda leaf: np.asarray(leaf.astype("bfloat16")), state_of(layout_of()).params)
    save(tmp_path / "c", CFG, to_flat(value))
    opened = Checkpoint.open(tmp_path / "c")
    form = StateForm(True, LoraConfig(2), "bfloat16", "int8") if base == "int8" else StateForm(True)
    mesh = training_mesh("2x2x2")
    params = initial_params(opened, dataclasses.replace(CFG, max_length=512), form, mesh=mesh)
    wanted = state_shapes(CFG, make_optimizer(OptimizerConfig(), trained_axes(CFG, form)), form, tensor=2).params
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    assert np.asarray(params["embedding"]).astype("bfloat16")[:321].tobytes() == value["embedding"].tobytes()
    with pytest.raises(LlamaError, match=r"c is another model: num_layers is 2 in the checkpoint and 3 in the config. Leave"):
        initial_params(opened, DEEPER, form, mesh=mesh)


QLORA = StateForm(True, LoraConfig(2), "bfloat16", "int8")


def stored_quantised(folder: Path, method: str) -> tuple[Checkpoint, Checkpoint]:
    """Float weights and the same quantised, both of them on disk."""
    value = jax.tree.map(lambda leaf: np.asarray(leaf.astype("bfloat16")), state_of(layout_of()).params)
    floats = save(folder / "floats", CFG, to_flat(value))
    made = dataclasses.replace(floats, path=epath.Path(folder / method), quantize=method, command="quantize")
    return floats, save_quantized(made, floats)


def test_a_base_that_is_stored_in_int8_is_what_qlora_makes_of_its_floats(tmp_path):
    floats, int8 = stored_quantised(tmp_path, "int8")
    found, wanted = (initial_params(opened, CFG, QLORA, mesh=training_mesh("2x2x2")) for opened in (int8, floats))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize(
    ("method", "form", "words"),
    [
        ("int8", StateForm(True), r"the run needs floats: .* \(quantize\), or train an adapter .* --config.lora.quantize=int8"),
        ("int8", StateForm(True, LoraConfig(2), "bfloat16"), r"the run needs floats: .*--config.lora.quantize=int8"),
        ("int4", StateForm(True), r"the run needs floats: start from the checkpoint that it was made from \(quantize\)$"),
        ("w8a8", QLORA, r"the run needs int8: start from the checkpoint that it was made from \(quantize\)$"),
    ],
)
def test_stored_quantised_weights_are_not_trained_and_no_base_of_another_form(tmp_path, method, form, words):
    _, opened = stored_quantised(tmp_path, method)
    with pytest.raises(LlamaError, match=f"holds {method} weights, and {words}") as caught:
        initial_params(opened, CFG, form, mesh=training_mesh("2x2x2"))
    assert caught.value.code == ExitCode.BAD_CONFIG
