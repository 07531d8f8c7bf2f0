"""Rounding for a text: each weight for what it is multiplied with in a model whose earlier layers are rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import calibrate
from llama_jax.checkpoint.calibrate import Calibration, rows_of
from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.save_quantized import save_quantized
from llama_jax.checkpoint.store import DTYPES, Checkpoint, to_flat, to_tree
from llama_jax.model import hidden_states, quantize_params
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.gptq import METHODS_FOR, quantize_for
from llama_jax.ops.norm import rms_norm
from llama_jax.ops.qarray import QArray
from tests.checkpoint.make import meta_tiny, random_params
from tests.checkpoint.test_quantized import assert_same
from tests.checkpoint.test_save import save

CFG = meta_tiny(vocab_size=50, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48)
ROWS = np.random.default_rng(0).integers(0, 50, (3, 20)).astype(np.int32)
PARAMS = random_params(CFG)


def calibration(method: str) -> Calibration:
    return Calibration(CFG, PARAMS.__getitem__, ROWS, method)


def weights() -> list[str]:
    return [name for name in PARAMS if name.rpartition(".")[2] in NUM_INPUTS]


def test_rows_are_of_the_models_context_and_their_number_is_bounded(monkeypatch):
    assert rows_of(range(10), CFG).tolist() == [list(range(10))]
    assert rows_of(range(200), CFG).tolist() == np.arange(192).reshape(3, 64).tolist()
    monkeypatch.setattr(calibrate, "MAX_TOKENS", 150)
    assert rows_of(range(1000), CFG).shape == (2, 64)


@pytest.mark.parametrize("method", METHODS_FOR)
def test_each_weight_is_rounded_for_its_inputs_in_a_model_whose_earlier_layers_are(method):
    """Inputs as the model's own forward has them: attention's and the MLP's of the second layer, and the head's."""
    made = calibration(method)
    rounded = {name: made.take(name) for name in weights()}
    flat = {name: jnp.asarray(value) for name, value in PARAMS.items()}
    positions = jnp.broadcast_to(jnp.arange(20), ROWS.shape)

    def states(num_layers: int) -> jax.Array:
        """After layers that are rounded."""
        tree = to_tree(flat | rounded)
        tree["layers"] = tree["layers"][:num_layers]
        return hidden_states(CFG, tree, jnp.asarray(ROWS), positions, kernels=False)[0]

    def expected(name: str, x: jax.Array) -> QArray:
        y = np.asarray(x, np.float64).reshape(60, -1)
        return quantize_for(flat[name], jnp.asarray(y.T @ y, jnp.float32), NUM_INPUTS[name.rpartition(".")[2]], method)

    for name, x in (
        ("layers.0.q_proj", rms_norm(states(0), flat["layers.0.attn_norm"], CFG.norm_eps)),
        ("layers.1.v_proj", rms_norm(states(1), flat["layers.1.attn_norm"], CFG.norm_eps)),
        ("lm_head", rms_norm(states(2), flat["final_norm"], CFG.norm_eps)),
    ):
        wanted = expected(name, x)
        np.testing.assert_allclose(np.float32(rounded[name].scale), np.float32(wanted.scale), rtol=2**-7)
        off = np.asarray(rounded[name].value, np.int32) != np.asarray(wanted.value, np.int32)
        assert off.mean() < 0.01, (name, off.mean())  # sums in another order: what is nearly halfway may fall the other way


def test_weights_are_the_same_in_whatever_order_they_are_taken():
    first, last = calibration("int4"), calibration("int4")
    forwards = {name: first.take(name) for name in weights()}
    backwards = {name: last.take(name) for name in reversed(weights())}
    for name, weight in forwards.items():
        assert_same(backwards[name], weight)


@pytest.mark.parametrize("method", METHODS_FOR)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_stored_is_what_was_calibrated_in_the_form_of_the_method(tmp_path, method, tied):
    params = {name: value for name, value in PARAMS.items() if not tied or name != "lm_head"}
    floats = save(tmp_path / "c", dataclasses.replace(CFG, tied_head=tied), params)
    made = dataclasses.replace(floats, path=epath.Path(tmp_path / "q"), quantize=method)
    save_quantized(made, floats, rows=ROWS)
    found = to_flat(load_params(Checkpoint.open(tmp_path / "q"), DTYPES["float32"]))
    nearest = to_flat(jax.jit(quantize_params, static_argnums=1)(to_tree(params), method))
    wanted = calibration(method)
    for name, weight in nearest.items():
        if isinstance(weight, QArray):
            assert_same(found[name], wanted.take(name))
            assert found[name].value.shape == weight.value.shape and found[name].scale.dtype == weight.scale.dtype
            assert np.any(np.asarray(found[name].value) != np.asarray(weight.value)), name
        else:
            np.testing.assert_array_equal(found[name], params[name])
