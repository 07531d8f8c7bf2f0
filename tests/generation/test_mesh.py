"""Generation on meshes: the tokens, texts and numbers of one device, from `load` on."""

import dataclasses

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation import programs
from llama_jax.generation.llama import Llama
from llama_jax.generation.request import Settings
from llama_jax.mesh import MeshShape
from llama_jax.ops.qarray import QArray
from tests.generation.make import CFG, counting_compilations, full_logprobs, ids, log_softmax, tokenizer_of
from tests.generation.test_load import save
from tests.make_mesh import MESHES, mesh_of, place, without_rematerialisation
from tests.model.make import params_of

pytestmark = pytest.mark.slow  # together they take minutes

SHARED_HEADS = dataclasses.replace(CFG, num_layers=1, num_heads=16, head_dim=6)  # 2 key/value heads; 8 does not divide V = 420
PROMPTS = [ids(length, seed=length) for length in (1, 7, 16, 11, 3, 5, 2, 9)]
GREEDY = Settings(temperature=0, max_new_tokens=20, logprobs=0, ignore_eos=True)
DRAWN = Settings(temperature=1.0, top_p=0.95, seed=3, max_new_tokens=20, logprobs=5, ignore_eos=True)
MIXED = [
    DRAWN,
    dataclasses.replace(DRAWN, temperature=0),  # greedy
    dataclasses.replace(DRAWN, repetition_penalty=1.5),
    dataclasses.replace(DRAWN, temperature=0, frequency_penalty=0.7, presence_penalty=0.3),
    dataclasses.replace(DRAWN, logit_bias={7: 5.0, 419: 4.0, 0: -100.0}, seed=2**40),
    dataclasses.replace(DRAWN, top_k=9, min_p=0.05, max_new_tokens=7),
    dataclasses.replace(DRAWN, temperature=2.0, top_p=1.0, seed=5),
    dataclasses.replace(DRAWN, stop=["e", "t"], seed=6),
]


@pytest.fixture(scope="module")
def alone() -> Llama:
    return Llama(SHARED_HEADS, params_of(SHARED_HEADS), tokenizer_of(), batch_size=8)


@pytest.fixture(scope="module", params=list(MESHES))
def spread(request) -> Llama:
    """The same on a mesh; the rows that pad its vocabulary are large, so that they would win if anything looked at them."""
    mesh = mesh_of(request.param)
    params = place(SHARED_HEADS, params_of(SHARED_HEADS), mesh, fill=100)
    return Llama(SHARED_HEADS, params, tokenizer_of(), batch_size=8, mesh=mesh)


def assert_same(ours: list, wanted: list) -> None:
    """Two lists of completions: text and tokens equal, log-probabilities to 1e-5."""
    assert len(ours) == len(wanted)
    for a, b in zip(ours, wanted, strict=True):
        assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        for top, expected in zip(a.top_logprobs, b.top_logprobs, strict=True):
            assert list(top) == list(expected)
            np.testing.assert_allclose(list(top.values()), list(expected.values()), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def greedy(alone):
    """Of each prompt, eight in one batch."""
    return alone.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("spread", ["8x1x1", "2x2x2"], indirect=True)
def test_rows_that_only_fill_the_mesh_are_dropped(spread, greedy):
    """Five prompts run in the programs of eight; where the mesh has eight groups of devices, so do three and one."""
    groups = spread.engine.mesh.shape["data"] * spread.engine.mesh.shape["fsdp"]
    for rows in (8, 5, 3, 1) if groups == 8 else (8, 5):
        with without_rematerialisation():
            assert_same(spread.generate(PROMPTS[8 - rows :], GREEDY), greedy[8 - rows :])
    assert len({tuple(completion.tokens) for completion in greedy}) == 8


@pytest.fixture(scope="module")
def mixed(alone):
    """Eight prompts with settings of their own."""
    return alone.generate(PROMPTS, MIXED)


def test_answers_are_the_same_on_every_mesh(spread, mixed):
    """Greedy, drawn and penalised ones in one batch."""
    with without_rematerialisation():
        assert_same(spread.generate(PROMPTS, MIXED), mixed)
    assert {completion.finish_reason for completion in mixed} == {"stop", "length"}


@pytest.fixture(scope="module")
def scored(alone):
    return alone.score(PROMPTS[2], num_top=20)


def test_scores_are_the_same_on_every_mesh(spread, scored):
    with without_rematerialisation():
        ours = spread.score(PROMPTS[2], num_top=20)
    np.testing.assert_array_equal(ours.tokens, scored.tokens)
    np.testing.assert_array_equal(ours.top_ids, scored.top_ids)
    assert ours.top_ids.max() < SHARED_HEADS.vocab_size
    for name in ("logprobs", "top_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(scored, name), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def expected_logits(alone):
    return alone.logits([PROMPTS[2]] * 3)


def test_logits_are_the_same_on_every_mesh_and_without_padding(spread, expected_logits):
    with without_rematerialisation():
        ours = spread.logits([PROMPTS[2]] * 3)
    assert ours.shape == (3, 16, SHARED_HEADS.vocab_size) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected_logits, rtol=0, atol=1e-5)
    assert ours.std() > 0.5


@pytest.mark.parametrize("spread", ["2x2x2"], indirect=True)
def test_a_cache_grows_on_a_mesh(spread):
    """A hundred tokens, and each is what a forward pass on one device says."""
    with without_rematerialisation():
        completions = spread.generate(PROMPTS, GREEDY, max_new_tokens=100)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = full_logprobs([*prompt, *completion.tokens], SHARED_HEADS)[len(prompt) - 1 : -1]
        assert len(completion.tokens) == 100
        np.testing.assert_array_equal(completion.tokens, expected.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, expected.max(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", ["8x1x1", "2x2x2"], indirect=True)
def test_prompts_in_chunks_and_after_a_prefix_are_the_same_on_a_mesh(spread, alone, monkeypatch):
    shared = ids(40, seed=4)
    prompts = [[*shared, *prompt] for prompt in PROMPTS]
    expected = alone.generate(prompts, DRAWN)
    assert_same(spread.generate(prompts, DRAWN, prefix=spread.prefill(shared)), expected)
    monkeypatch.setattr(spread.engine, "chunk", 32)
    assert_same(spread.generate(prompts, DRAWN), expected)


@pytest.mark.parametrize("spread", ["2x2x2"], indirect=True)
def test_a_mesh_s_programs_are_compiled_once(spread, greedy):
    """States come back from a step as they went in, wherever they lie; so a stream, or another batch, finds all compiled."""
    spread.generate(PROMPTS[4:8], GREEDY)
    with counting_compilations() as compiled:
        spread.generate(PROMPTS[:4], GREEDY, max_new_tokens=33)
        assert "".join(spread.stream(PROMPTS[1], GREEDY)) == greedy[1].text
    assert compiled == []


# int8 keys and values


@pytest.fixture(scope="module")
def rounded() -> Llama:
    return Llama(SHARED_HEADS, params_of(SHARED_HEADS), tokenizer_of(), batch_size=8, cache_dtype="int8")


@pytest.fixture(scope="module")
def mixed_rounded(rounded):
    return rounded.generate(PROMPTS, MIXED)


@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_a_cache_in_int8_gives_the_same_text_on_every_mesh(name, mixed_rounded, mixed):
    mesh = mesh_of(name)
    params = place(SHARED_HEADS, params_of(SHARED_HEADS), mesh, fill=100)
    spread = Llama(SHARED_HEADS, params, tokenizer_of(), batch_size=8, mesh=mesh, cache_dtype="int8")
    with without_rematerialisation():
        ours = spread.generate(PROMPTS, MIXED)
    assert [(a.text, a.tokens, a.finish_reason) for a in ours] == [(b.text, b.tokens, b.finish_reason) for b in mixed_rounded]
    assert [a.logprobs for a in mixed_rounded] != [b.logprobs for b in mixed]


def test_rows_of_any_length_in_a_growing_cache_in_int8_are_what_they_are_alone(rounded):
    """A hundred tokens through several buckets, in a batch; scores read keys and values as those steps did, but a prompt's."""
    together = rounded.generate(PROMPTS, GREEDY, max_new_tokens=100)
    for prompt, ours in zip(PROMPTS[:3], together, strict=False):
        (alone,) = rounded.generate([prompt], GREEDY, max_new_tokens=100)
        assert ours.tokens == alone.tokens and len(ours.tokens) == 100
        np.testing.assert_allclose(ours.logprobs, alone.logprobs, rtol=0, atol=1e-3)  # a tie may be rounded either way
    for prompt, ours in zip(PROMPTS, together, strict=True):
        scored = rounded.score([*prompt, *ours.tokens]).logprobs[len(prompt) - 1 :]
        exact = full_logprobs([*prompt, *ours.tokens], SHARED_HEADS)[np.arange(len(prompt) - 1, len(prompt) + 99), ours.tokens]
        np.testing.assert_allclose(ours.logprobs, scored, rtol=0, atol=0.1)
        assert 1e-5 < np.abs(scored - exact).mean() < 0.02


def test_scores_and_logits_of_a_cache_in_int8_are_those_of_steps(rounded, monkeypatch):
    """However many tokens are read at once."""
    tokens = [*PROMPTS[2], *PROMPTS[3]]
    scored, logits = rounded.score(tokens).logprobs, rounded.logits([tokens])
    monkeypatch.setattr(programs, "CACHED_SLICE", 5)
    jax.clear_caches()
    np.testing.assert_allclose(rounded.score(tokens).logprobs, scored, rtol=0, atol=1e-3)
    np.testing.assert_allclose(rounded.logits([tokens]), logits, rtol=0, atol=1e-2)
    monkeypatch.undo()
    jax.clear_caches()
    exact = full_logprobs(tokens, SHARED_HEADS)
    assert 1e-4 < np.abs(log_softmax(logits[0]) - exact).max() < 0.2


# load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, config=SHARED_HEADS)
    return folder


@pytest.fixture(scope="module")
def loaded_logits(checkpoint):
    """By how weights are rounded, of one device."""
    return {quantize: llama_jax.load(checkpoint, quantize=quantize).logits([PROMPTS[2]] * 2) for quantize in ("", "int8")}


@pytest.mark.parametrize("quantize", ["", "int8"])
@pytest.mark.parametrize(
    "mesh, sizes",
    [
        ({"tensor": 8}, (1, 1, 8)),
        ({"tensor": -1}, (1, 1, 8)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        (MeshShape(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
    ids=str,
)
def test_a_checkpoint_is_loaded_onto_a_mesh(checkpoint, loaded_logits, mesh, sizes, quantize):
    llama = llama_jax.load(checkpoint, mesh=mesh, quantize=quantize)
    assert tuple(llama.engine.mesh.shape.values()) == sizes
    weight = llama.params["layers"][0]["gate_proj"]
    assert isinstance(weight, QArray) == bool(quantize)
    value = weight.value if quantize else weight
    assert len(value.sharding.device_set) == 8
    assert value.addressable_shards[0].data.size == value.size // (sizes[1] * sizes[2])
    np.testing.assert_allclose(llama.logits([PROMPTS[2]] * 2), loaded_logits[quantize], rtol=0, atol=1e-5)


def test_a_model_names_the_mesh_it_lies_on(checkpoint, alone):
    assert llama_jax.load(checkpoint, mesh={"tensor": 8}).mesh.shape["tensor"] == 8
    assert alone.mesh is None


def test_devices_that_the_model_cannot_be_cut_for_hold_copies_and_a_note_says_so(tmp_path, capsys):
    save(tmp_path, config=dataclasses.replace(SHARED_HEADS, num_heads=6))
    llama = llama_jax.load(tmp_path, mesh={"tensor": -1})
    assert tuple(llama.engine.mesh.shape.values()) == (4, 1, 2)
    assert "tensor=2 is the most this model allows; the other devices hold copies: data=4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mesh, message",
    [
        ({"tensors": 8}, "no such mesh axis: tensors; there are data, fsdp, tensor"),
        ({"model": 4, "batch": 2}, "no such mesh axis: model, batch"),
        ({"tensor": 3}, "tensor=3 is 3 devices, and there are 8"),
        ({}, "is 1 devices, and there are 8"),
        ({"tensor": 16}, "tensor=16 is 16 devices, and there are 8"),
        ({"tensor": 0}, "mesh.tensor is 0, expected 1 or more, or -1"),
        ({"tensor": -2}, "mesh.tensor is -2, expected 1 or more, or -1"),
        ({"tensor": -1, "fsdp": -1}, "mesh.fsdp and mesh.tensor are both -1"),
        ({"tensor": "8"}, "mesh.tensor is '8'"),
        ({"tensor": 8.0}, "mesh.tensor is 8.0"),
    ],
    ids=str,
)
def test_a_mesh_that_cannot_be_is_refused(checkpoint, mesh, message):
    with pytest.raises(LlamaError, match=message) as caught:
        llama_jax.load(checkpoint, mesh=mesh)
    assert caught.value.code == ExitCode.BAD_MESH


def test_a_mesh_that_the_model_does_not_allow_is_refused_with_one_that_it_does(tmp_path):
    save(tmp_path, config=dataclasses.replace(SHARED_HEADS, num_heads=6))
    with pytest.raises(LlamaError, match=r"6 heads are not divisible by tensor=8.*data=4 fsdp=1 tensor=2") as caught:
        llama_jax.load(tmp_path, mesh={"tensor": 8})
    assert caught.value.code == ExitCode.BAD_MESH
