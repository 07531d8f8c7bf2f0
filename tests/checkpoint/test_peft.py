"""PEFT's folders: what is written comes back, under PEFT's names; what is read is what the file says, or refused by name."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llama_jax.checkpoint.adapter import AdapterWeights
from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.peft import read_peft, write_peft
from llama_jax.checkpoint.store import DTYPES
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.load import open_weights
from llama_jax.model import LoraConfig
from tests.checkpoint.make import random_params, write_huggingface, write_safetensors, write_torch
from tests.checkpoint.test_adapter import CFG, DORA, LORA, assert_equal, merged, random_adapter
from tests.checkpoint.test_save import save

EVERYTHING = LoraConfig(rank=2, alpha=5.0, dropout=0.1, rslora=True)
CONFIGS = {"lora": LORA, "dora": DORA, "rslora of everything": EVERYTHING}


def written(folder: Path, lora: LoraConfig, base_model: str = "") -> Path:
    folder.mkdir()
    write_peft(folder, CFG, AdapterWeights(lora, random_adapter(lora)), base_model)
    return folder


def change(folder: Path, **settings) -> Path:
    """Puts other values into adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_comes_back(tmp_path, name):
    found = read_peft(written(tmp_path / "peft", CONFIGS[name]), CFG)
    assert found.lora == CONFIGS[name]
    assert found.arrays.keys() == random_adapter(CONFIGS[name]).keys()
    for ours, array in random_adapter(CONFIGS[name]).items():
        np.testing.assert_array_equal(found.arrays[ours], array)


def test_names_shapes_and_settings_are_pefts(tmp_path):
    """As peft 0.21.2 writes them."""
    folder = written(tmp_path / "peft", DORA, "meta-llama/Llama-2-7b-hf")
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    ours, layer = random_adapter(DORA), "base_model.model.model.layers.1"
    assert len(tensors) == CFG.num_layers * 3 * 3
    wanted = {
        f"{layer}.self_attn.q_proj.lora_A.weight": ours["layers.1.q_proj.a"],
        f"{layer}.self_attn.q_proj.lora_B.weight": ours["layers.1.q_proj.b"].reshape(48, 3),
        f"{layer}.self_attn.o_proj.lora_A.weight": ours["layers.1.o_proj.a"].reshape(3, 48),
        f"{layer}.self_attn.o_proj.lora_magnitude_vector": ours["layers.1.o_proj.magnitude"],
        f"{layer}.mlp.down_proj.lora_B.weight": ours["layers.1.down_proj.b"],
    }
    for name, array in wanted.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {k: config[k] for k in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora")} == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 2, "use_rslora": True, "use_dora": True,
    }  # fmt: skip
    assert config["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    assert config["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("kind", ["ours", "huggingface"])
def test_a_peft_folder_is_loaded_over_a_base(tmp_path, kind):
    params = random_params(CFG)
    (save if kind == "ours" else write_huggingface)(tmp_path / "base", CFG, params)
    opened = open_weights(tmp_path / "base", written(tmp_path / "peft", DORA))
    assert_equal(load_params(opened, DTYPES["float32"]), merged(params, DORA), rtol=0, atol=1e-6)
    with pytest.raises(LlamaError, match="peft is an adapter: give its base as the checkpoint, and it as adapter") as refused:
        open_weights(tmp_path / "peft")
    assert refused.value.code == ExitCode.NOT_A_CHECKPOINT


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_and_old_pickles_are_read(tmp_path, dtype):
    folder = written(tmp_path / "peft", LORA)
    file = folder / "adapter_model.safetensors"
    narrow = {name: array.astype(dtype) for name, array in safetensors.numpy.load_file(file).items()}
    file.unlink()
    write_torch(folder / "adapter_model.bin", narrow)
    for ours, array in read_peft(folder, CFG).arrays.items():
        np.testing.assert_array_equal(array, random_adapter(LORA)[ours].astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(peft_type="LOHA"), "says peft_type='LOHA', which llama_jax does not compute"),
        (dict(bias="all"), "says bias='all'"),
        (dict(modules_to_save=["lm_head"]), "says modules_to_save=list value"),
        (dict(rank_pattern={"q_proj": 8}), "says rank_pattern=dict value"),
        (dict(init_lora_weights="pissa_niter_4"), "says init_lora_weights='pissa_niter_4'"),
        (dict(kasa_config={}), "says kasa_config=dict value"),
        (dict(r=None), "rank is None, expected a number"),
        (dict(r="8"), "rank is '8', expected a number"),
        (dict(lora_alpha=-1), "adapter_config.json: lora.alpha is -1"),
    ],
)
def test_a_setting_that_changes_the_mathematics_is_refused(tmp_path, settings, message):
    with pytest.raises(LlamaError, match=message) as refused:
        read_peft(change(written(tmp_path / "peft", LORA), **settings), CFG)
    assert refused.value.code == ExitCode.BAD_CONFIG


def test_settings_of_newer_versions_that_change_nothing_are_read(tmp_path):
    neutral = dict(init_lora_weights="gaussian", rank_pattern={}, modules_to_save=None, peft_version="9", megatron_config=None)
    assert read_peft(change(written(tmp_path / "peft", LORA), **neutral), CFG).lora == LORA


def test_tensors_missing_unknown_or_of_another_model_are_named(tmp_path):
    folder = written(tmp_path / "peft", LORA)
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    first = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    def refused(cfg, changed) -> LlamaError:
        write_safetensors(file, changed)
        with pytest.raises(LlamaError) as found:
            read_peft(folder, cfg)
        return found.value

    error = refused(CFG, {name: array for name, array in tensors.items() if name != first})
    assert error.code == ExitCode.MISSING_TENSOR and f"lacks {first}, expected the same targets in every layer" in str(error)
    error = refused(CFG, tensors | {"base_model.model.lm_head.lora_A.weight": tensors[first]})
    assert error.code == ExitCode.UNKNOWN_TENSOR and "base_model.model.lm_head.lora_A.weight" in str(error)
    error = refused(dataclasses.replace(CFG, num_layers=1), tensors)
    assert error.code == ExitCode.UNKNOWN_TENSOR and "in all of 1 layers" in str(error)
    error = refused(dataclasses.replace(CFG, mlp_dim=96), tensors)
    assert error.code == ExitCode.WRONG_SHAPE and "float32 [3, 80], the model asks for numbers of shape [3, 96]" in str(error)
    error = refused(CFG, {"decoder.q.lora_A": tensors[first]})
    assert error.code == ExitCode.MISSING_TENSOR and "it adapts no Llama" in str(error)
    file.unlink()
    with pytest.raises(LlamaError, match=r"has adapter_config.json and no adapter_model.safetensors") as found:
        read_peft(folder, CFG)
    assert found.value.code == ExitCode.NO_WEIGHTS
