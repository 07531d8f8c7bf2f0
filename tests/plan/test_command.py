"""python -m llama_jax.plan."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest

from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, run_command
from llama_jax.plan import __main__ as command

PLAN = ["--model", "llama2_70b", "--topology", "v5p-128", "--task", "train"]


def run(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["plan", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_it_imports_no_jax():
    code = "import sys; from llama_jax.plan.__main__ import main; main(); sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *PLAN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "best: data=1 fsdp=" in done.stdout


def test_the_table_says_what_was_planned_in_100_columns(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, *PLAN, "--batch", "16")
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == "llama2_70b (68.98 B parameters), train on v5p-128: 64 x 95.74 GiB"
    assert lines[1] == "batch 16 x 4,096 tokens, bfloat16, float32 parameters, adamw, remat full"
    assert lines[3].split() == [
        *"data fsdp tensor weights optim. grads activ. cache total GiB HBM step ms tokens/s bound".split()
    ]
    assert lines[4].split()[:6] == ["1", "16", "4", "4.02", "8.04", "3.99"]
    assert "best: data=1 fsdp=16 tensor=4: " in out and "largest batch that fits on it: " in out
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("task", ["train", "decode", "prefill"])
@pytest.mark.parametrize("topology", ["2xv5e-256", "h100-8x2", "t4", "v7x-128"])
@pytest.mark.parametrize("model", ["llama3_2_1b", "llama3_1_405b"])
def test_columns_never_run_into_each_other(monkeypatch, capsys, task, topology, model):
    code, out, _ = run(monkeypatch, capsys, "--model", model, "--topology", topology, "--task", task)
    assert code in (0, ExitCode.DOES_NOT_FIT)
    table = out.split("\n\n")[1].splitlines()
    assert all(len(line.split()) == 13 for line in table[1:] if not line.startswith("and "))
    assert max(map(len, out.splitlines())) <= 100


def test_what_does_not_fit_exits_with_33_after_the_table_and_the_changes(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "--model", "llama2_70b", "--topology", "h200", "--task", "decode")
    assert code == ExitCode.DOES_NOT_FIT
    assert "nothing fits: data=1 fsdp=1 tensor=1 misses 7.62 GiB a device" in out
    assert "--quantize int8: " in out and "--topology h200-2: " in out
    assert err == "error: llama2_70b does not fit on h200 for decode: 7.62 GiB a device are missing\n"


def test_json_is_one_object_with_every_mesh(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *PLAN, "--json", "--remat", "projections", "--optimizer", "lion")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["changes"] == [] and found["compiled"] is None
    assert set(found) == {
        "model", "parameters", "topology", "task", "batch", "length", "dtype", "quantize", "cache_dtype", "optimizer",
        "first_moment", "remat", "fits", "missing_bytes", "largest_batch", "plans", "changes", "compiled",
    }  # fmt: skip
    assert (found["parameters"], found["batch"], found["optimizer"]) == (PRESETS["llama2_70b"].num_params, 64, "lion")
    assert found["topology"]["chip"]["hbm_bytes"] == 95.74 * 2**30
    first = found["plans"][0]
    assert set(first) == {"mesh", "fits", "memory_bytes", "spare_bytes", "timing"}
    memory = first["memory_bytes"]
    parts = ("weights", "optimizer", "gradients", "copies", "activations", "layer", "head")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert {**first["mesh"]}.keys() == {"data", "fsdp", "tensor", "dcn_data"}


def test_json_of_what_does_not_fit_has_the_changes(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--model", "llama2_70b", "--topology", "h200", "--task", "decode", "--json")
    found = json.loads(out)
    assert code == ExitCode.DOES_NOT_FIT and not found["fits"] and found["largest_batch"] == 0
    assert found["missing_bytes"] / 2**30 == pytest.approx(7.62, abs=0.01)
    assert found["changes"][0]["change"] == "--quantize int8" and found["changes"][0]["plan"]["fits"]


def test_mesh_flags_fix_the_mesh(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *PLAN, "--json", "--data", "-1", "--fsdp", "8", "--tensor", "2")
    (only,) = json.loads(out)["plans"]
    assert code == 0 and only["mesh"] == {"data": 4, "fsdp": 8, "tensor": 2, "dcn_data": 1}


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--model", "llama9", "--topology", "v5e-1", "--task", "decode"], ExitCode.BAD_REQUEST),
        (["--model", "llama2_7b", "--topology", "v5e-12", "--task", "decode"], ExitCode.UNKNOWN_TOPOLOGY),
        (["--model", "llama2_7b", "--topology", "v5e-8", "--task", "train", "--tensor", "16"], ExitCode.BAD_MESH),
        (["--model", "llama2_7b", "--topology", "v5e-8"], 2),
    ],
)
def test_bad_input_has_its_own_exit_code(monkeypatch, capsys, argv, code):
    got, out, err = run(monkeypatch, capsys, *argv)
    assert (got, out) == (code, "") and "error: " in err


@dataclasses.dataclass
class FakeReport:
    peak_bytes: int

    def __str__(self) -> str:
        return f"compiled: {self.peak_bytes}"


def test_compile_gets_the_best_mesh_and_its_account_is_printed(monkeypatch, capsys):
    seen = []
    fake = types.ModuleType("llama_jax.plan.compile")
    fake.compile_program = lambda request, mesh: seen.append((request.task, mesh.fsdp, mesh.tensor)) or FakeReport(7)
    monkeypatch.setitem(sys.modules, "llama_jax.plan.compile", fake)
    code, out, _ = run(monkeypatch, capsys, *PLAN, "--batch", "16", "--compile")
    assert code == 0 and seen == [("train", 16, 4)] and out.endswith("\n\ncompiled: 7\n")
    code, out, _ = run(monkeypatch, capsys, *PLAN, "--compile", "--json")
    assert json.loads(out)["compiled"] == {"peak_bytes": 7}


def test_compile_without_what_it_needs_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_jax.plan.compile", None)
    code, _, err = run(monkeypatch, capsys, *PLAN, "--compile")
    assert code == ExitCode.BAD_REQUEST and err.startswith("error: --compile cannot be had here") and err.count("\n") == 1


def test_a_checkpoint_is_planned_by_its_config(monkeypatch, capsys):
    from llama_jax.checkpoint.store import Checkpoint

    tiny = types.SimpleNamespace(config=PRESETS["tiny"])
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, path: tiny))
    code, out, _ = run(monkeypatch, capsys, "--model", ".", "--topology", "v5e-1", "--task", "decode", "--json")
    assert code == 0 and json.loads(out)["parameters"] == PRESETS["tiny"].num_params
