"""export of a LoRA run: the adapter for peft, or the adapted model for transformers; and peft itself, where it is installed."""

import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax import export as command
from llama_jax.checkpoint.peft import read_peft
from llama_jax.checkpoint.source import open_source
from llama_jax.checkpoint.store import to_tree
from llama_jax.commands.export import export, export_adapter
from llama_jax.errors import ExitCode, run_command
from llama_jax.generation.load import open_weights
from llama_jax.model import LoraConfig, forward
from tests.checkpoint.make import random_params, write_huggingface
from tests.checkpoint.test_adapter import CFG, DORA, LORA, merged, random_adapter, save_lora
from tests.checkpoint.test_save import save
from tests.text.make import small_sentencepiece

forward_jit = jax.jit(forward, static_argnums=0)
RSLORA = LoraConfig(rank=4, alpha=6.0, rslora=True)


def run(monkeypatch, capsys, *argv) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    return stopped.value.code, capsys.readouterr().err


def test_a_lora_run_is_exported_as_an_adapter(tmp_path, monkeypatch, capsys):
    """Of a base of Hugging Face's, by whose folder peft finds it."""
    write_huggingface(tmp_path / "base", CFG, random_params(CFG))
    save_lora(tmp_path / "run/checkpoints/10", open_source(tmp_path / "base"), DORA)
    assert run(monkeypatch, capsys, "--checkpoint", tmp_path / "run", "--output", tmp_path / "peft")[0] == 0
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    found = read_peft(tmp_path / "peft", CFG)
    assert found.lora == DORA
    for name, array in random_adapter(DORA).items():
        np.testing.assert_array_equal(found.arrays[name], array)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_the_base_may_be_named_and_the_tokenizer_goes_along(tmp_path, monkeypatch, capsys):
    base = save(tmp_path / "base", CFG, random_params(CFG))
    file = small_sentencepiece(tmp_path / "tokenizer.model")
    save_lora(tmp_path / "lora", base, LORA, tokenizer_files=(file,))
    options = ("--checkpoint", tmp_path / "lora", "--base-model", "meta-llama/Llama-2-7b-hf", "--output", tmp_path / "peft")
    assert run(monkeypatch, capsys, *options)[0] == 0
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "peft").iterdir()}
    assert run(monkeypatch, capsys, *options)[0] == ExitCode.OUTPUT_EXISTS


@pytest.mark.parametrize("how", ["--merge", "--adapter"])
def test_the_adapted_model_is_exported_in_the_bases_dtype(tmp_path, monkeypatch, capsys, how):
    params = random_params(CFG, 0, ml_dtypes.bfloat16)
    save_lora(tmp_path / "lora", save(tmp_path / "base", CFG, params), DORA)
    which = ["--checkpoint", tmp_path / "lora", how]
    if how == "--adapter":
        which = ["--checkpoint", tmp_path / "base", how, tmp_path / "lora"]
    assert run(monkeypatch, capsys, *which, "--output", tmp_path / "hf")[0] == 0
    source = open_source(tmp_path / "hf")
    assert (source.config, source.dtype) == (CFG, np.dtype(ml_dtypes.bfloat16))
    for name, exact in merged(params, DORA).items():
        np.testing.assert_allclose(np.float32(source.params[name].read()), exact, rtol=2**-8, atol=0, err_msg=name)


# --- peft itself


@pytest.mark.parametrize("lora", [LORA, RSLORA, DORA], ids=["lora", "rslora", "dora"])
def test_peft_computes_the_same_logits(tmp_path, lora):
    """Of our adapter over our base, both exported; and we with an adapter that peft made."""
    torch = pytest.importorskip("torch", reason="torch is not installed; done by hand with peft 0.21.2, transformers 5.24.0")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    params = random_params(CFG, 5)
    base = save(tmp_path / "base", CFG, params)
    export(base, tmp_path / "hf")
    export_adapter(save_lora(tmp_path / "lora", base, lora), tmp_path / "peft", str(tmp_path / "hf"))
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 24)).astype(np.int32)

    def theirs(model) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).logits.numpy()

    def loaded():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    ours = forward_jit(CFG, to_tree(merged(params, lora)), tokens)
    plain = forward_jit(CFG, to_tree(params), tokens)
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(theirs(peft.PeftModel.from_pretrained(loaded(), tmp_path / "peft")), ours, atol=1e-4, rtol=0)

    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(lora.targets), use_rslora=lora.rslora, use_dora=lora.dora, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(loaded(), settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "made by peft")
    made = read_peft(tmp_path / "made by peft", CFG)
    assert (made.lora.rank, made.lora.alpha, made.lora.targets) == (3, 5, lora.targets)
    opened = open_weights(tmp_path / "base", tmp_path / "made by peft").arrays()
    adapted = to_tree({name: opened.read(name) for name in params})
    np.testing.assert_allclose(theirs(model.eval()), forward_jit(CFG, adapted, tokens), atol=1e-4, rtol=0)
