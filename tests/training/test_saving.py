"""Training states on disk: to the bit, from any form and mesh to any other; what is refused; what is kept."""

import jax
import numpy as np
import pytest

from llama_jax.model import LoraConfig
from llama_jax.training.optimizer import OPTIMIZERS, OptimizerConfig
from llama_jax.training.restoring import restore
from tests.training.states import IDENTITY, assert_is, assert_stored, layout_of, saver_of, state_of


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_to_the_bit_on_any_mesh_and_in_either_form(tmp_path, name):
    saved = layout_of(name, "2x2x2", scan=True)
    with saver_of(tmp_path, saved) as saver:
        saver.save(state_of(saved, step=7), extra={"seed": 3})
    assert_stored(tmp_path / "checkpoints/7", saved)
    for layout in (saved, layout_of(name, "1x8x1"), layout_of(name)):
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
