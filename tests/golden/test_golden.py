"""Logits recorded with transformers (record.py) against ours: the whole model, every family, every kind of RoPE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import model
from llama_jax.config import ModelConfig
from llama_jax.config_files import from_huggingface
from llama_jax.reference.llama import forward as reference_forward
from llama_jax.reference.rope import interleave

from .models import CASES, PROMPT, RECORDED, checksum, weights

GREEDY = [name for name, case in CASES.items() if case.greedy]


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def config_of(name: str) -> ModelConfig:
    cfg, notes = from_huggingface(CASES[name].config_json)
    assert notes == []
    return cfg


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_recording(name):
    assert checksum(weights(CASES[name])) == recorded()[f"{name}.crc32"]


def test_every_recording_has_its_case():
    assert {name.partition(".")[0] for name in recorded()} == set(CASES)


# The float64 reference.


def reference_logits(name: str, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[T, V] float64, from the weights under HF's names."""
    cfg, hf = config_of(name), weights(CASES[name])

    def layer(i: int) -> dict[str, np.ndarray]:
        w = {key: hf[f"model.layers.{i}.{name}.weight"] for key, name in META_TO_HF.items()}
        return w | {"wq": interleave(w["wq"], cfg.num_heads), "wk": interleave(w["wk"], cfg.num_kv_heads)}

    embedding = hf["model.embed_tokens.weight"]
    output = embedding if cfg.tied_head else hf["lm_head.weight"]
    return reference_forward(cfg, tokens, layer, embedding, hf["model.norm.weight"], output, positions)


META_TO_HF = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w3": "mlp.up_proj",
    "w2": "mlp.down_proj",
}


@pytest.mark.parametrize("name", CASES)
def test_reference_computes_the_recorded_logits(name):
    case = CASES[name]
    np.testing.assert_allclose(reference_logits(name, case.tokens, case.positions), recorded()[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GREEDY)
def test_reference_continues_with_the_recorded_tokens(name):
    tokens = np.concatenate([CASES[name].tokens[:PROMPT], recorded()[f"{name}.greedy"]])
    chosen = reference_logits(name, tokens, np.arange(len(tokens))).argmax(axis=-1)
    np.testing.assert_array_equal(chosen[PROMPT - 1 : -1], tokens[PROMPT:])


# The model in JAX.

OURS_TO_HF = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@functools.cache
def params_of(name: str) -> model.Params:
    cfg, hf = config_of(name), weights(CASES[name])
    tree = {"embedding": hf["model.embed_tokens.weight"], "final_norm": hf["model.norm.weight"]}
    if not cfg.tied_head:
        tree["lm_head"] = hf["lm_head.weight"]
    layers = range(cfg.num_layers)
    tree["layers"] = [{ours: hf[f"model.layers.{i}.{theirs}.weight"] for ours, theirs in OURS_TO_HF.items()} for i in layers]
    return jax.tree.map(lambda shape, value: jnp.asarray(value).reshape(shape.shape), model.param_shapes(cfg), tree)


forward_jit = jax.jit(model.forward, static_argnums=0)


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_the_recorded_logits(name):
    case = CASES[name]
    ours = forward_jit(config_of(name), params_of(name), case.tokens[None], case.positions[None].astype(np.int32))
    np.testing.assert_allclose(ours[0], recorded()[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GREEDY)
def test_the_model_continues_with_the_recorded_tokens(name):
    """Token by token, each from a forward pass over its own; the rest of the row is not written yet."""
    wanted = recorded()[f"{name}.greedy"]
    tokens = np.zeros(len(CASES[name].positions), np.int32)
    tokens[:PROMPT] = CASES[name].tokens[:PROMPT]
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    for at in range(PROMPT, PROMPT + len(wanted)):
        tokens[at] = forward_jit(config_of(name), params_of(name), tokens[None], positions)[0, at - 1].argmax()
    np.testing.assert_array_equal(tokens[PROMPT : PROMPT + len(wanted)], wanted)
