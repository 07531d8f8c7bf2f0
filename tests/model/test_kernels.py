"""Whether attention may use a platform's kernel is decided once, by whoever runs a program, and reaches every layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.batch import Batch
from llama_jax.generation.engine import Engine
from llama_jax.generation.request import Row, Settings
from llama_jax.model import Params, param_shapes
from llama_jax.model.fused import fuse_layer
from llama_jax.ops.kernels import cudnn
from llama_jax.training.step import StepConfig, batch_loss
from tests.make_mesh import equations
from tests.model.make import SMALL

CFG = dataclasses.replace(SMALL, head_dim=64)
TOKENS = np.zeros((1, 128), np.int32)
PER_LAYER = 2  # of kernels: the TPU's and the GPU's, of which a compiled program has one
PER_LAYER_OF_DECODE, HEAD = 8, 1  # two of attention and four products, or, with what they do not take, two of attention


def kernels(program, params: Params) -> int:
    return sum(equation.primitive.name == "pallas_call" for equation in equations(program, params))


@pytest.mark.parametrize("allowed", [True, False])
def test_by_the_setting_of_a_training_step(allowed):
    batch = Batch(TOKENS, TOKENS, TOKENS.astype(np.float32), TOKENS, TOKENS)
    config = StepConfig(remat="none", scan_layers=False, kernels=allowed)
    loss = functools.partial(batch_loss, CFG, config, batch=batch)
    assert kernels(lambda params: loss(params=params), param_shapes(CFG)) == PER_LAYER * CFG.num_layers * allowed


def test_cudnn_reaches_every_layer_of_a_prompt(monkeypatch):
    calls = []
    monkeypatch.setattr(cudnn, "attend_cudnn", lambda q, k, v: calls.append(q.shape) or q)
    engine = Engine(CFG, param_shapes(CFG, jnp.bfloat16), 128, kernels="cudnn")

    def trace(program, cfg, params, *args, **options):
        return jax.eval_shape(lambda params: program(cfg, params, *args, **options), params)

    monkeypatch.setattr(engine, "on_mesh", trace)
    engine.prefill([Row(TOKENS[0].tolist(), Settings(), ())], 1, 0)
    assert calls == [(1, 128, CFG.num_heads, CFG.head_dim)] * CFG.num_layers


@pytest.mark.parametrize("allowed", [True, False])
def test_by_the_setting_of_an_engine(allowed, monkeypatch):
    params = param_shapes(CFG, jnp.bfloat16)
    params |= {"layers": [jax.eval_shape(fuse_layer, layer) for layer in params["layers"]]}
    engine = Engine(CFG, params, 128, kernels=allowed)
    tokens = TOKENS[0].tolist()

    class CalledError(Exception):
        pass

    def count(program, cfg, params, *args, **options):
        found = kernels(lambda params: program(cfg, params, *args, **options), params)
        raise CalledError(found)

    def describe(program, cfg, params, *args, **options):
        return jax.eval_shape(lambda params: program(cfg, params, *args, **options), params)

    monkeypatch.setattr(engine, "on_mesh", describe)
    state, _ = engine.prefill([Row(tokens[:90], Settings(), ())], 1, 0)
    monkeypatch.setattr(engine, "on_mesh", count)
    calls = (
        (PER_LAYER, lambda: engine.prefill([Row(tokens, Settings(), ())], 1, 0)),
        (PER_LAYER_OF_DECODE, lambda: engine._advance(state, np.zeros(1, bool), 1, 0)),
        (PER_LAYER, lambda: engine.score(tokens)),
        (PER_LAYER, lambda: engine.logits([tokens])),
    )
    for per_layer, call in calls:
        with pytest.raises(CalledError) as found:
            call()
        assert found.value.args == ((per_layer * CFG.num_layers + HEAD * (per_layer == PER_LAYER_OF_DECODE)) * allowed,)
