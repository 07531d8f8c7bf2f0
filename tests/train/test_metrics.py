"""What a run writes down: lines of steps, whatever happened to the process, and their drawing."""

import json
import math

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from train.flops import chip_of, flops_per_token
from train.metrics import Log, read_lines
from train.recipe import LogConfig
from train.report import POINTS, draw_report

QUIET = LogConfig(tensorboard=False)


def log_of(workdir, first_step=0, steps=100, config=QUIET):
    return Log(epath.Path(workdir), config, first_step=first_step, steps=steps, settings={})


def write_steps(workdir, first, last, config=QUIET):
    log = log_of(workdir, first - 1, config=config)
    for step in range(first, last + 1):
        log.step(step, {"loss": 10 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 100.0 + step})
    log.close()


def test_every_step_has_one_line_in_order_though_some_were_made_twice(tmp_path):
    write_steps(tmp_path, 1, 9)
    write_steps(tmp_path, 6, 12)  # gone on with after step 5
    assert [line["step"] for line in read_lines(epath.Path(tmp_path) / "metrics.jsonl")] == list(range(1, 13))


@given(cut=st.integers(1, 200))
def test_a_line_that_a_kill_cut_short_is_dropped_and_the_others_are_kept(tmp_path_factory, cut):
    workdir = tmp_path_factory.mktemp("cut")
    write_steps(workdir, 1, 4)
    file = workdir / "metrics.jsonl"
    text = file.read_bytes()
    file.write_bytes(text[: len(text) - cut])
    whole = file.read_bytes().count(b"\n")
    kept = read_lines(epath.Path(file))
    assert [line["step"] for line in kept][:whole] == list(range(1, whole + 1)) and len(kept) - whole in (0, 1)
    write_steps(workdir, whole + 1, 6)
    assert [line["step"] for line in read_lines(epath.Path(file))] == list(range(1, 7))


def test_what_is_no_number_is_null_in_the_file(tmp_path):
    log = log_of(tmp_path)
    log.step(1, {"loss": math.nan, "grad_norm": math.inf})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None}


def test_tensorboard_gets_every_number_under_its_step(tmp_path):
    write_steps(tmp_path, 1, 3, LogConfig())
    (file,) = (tmp_path / "tensorboard").iterdir()
    for name in (b"train/loss", b"train/learning_rate", b"train/tokens_per_second"):
        assert file.read_bytes().count(name) == 3


def test_a_console_that_is_no_terminal_gets_few_lines(tmp_path, capsys):
    log = log_of(tmp_path, steps=50)
    for step in range(1, 51):
        log.step(step, {"loss": 1.0, "step_seconds": 0.5})
    log.evaluation(50, {"held_out/loss": 0.25, "samples": [{"prompt": "Once", "text": " upon"}]})
    log.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("step 1/50  loss 1.0000") and said[0].endswith("0:00:24 left")
    assert said[1:] == [said[-3], "step 50  held_out/loss 0.25", "  'Once' -> ' upon'"] and said[1].startswith("step 50/50")


def test_wandb_that_is_not_installed_is_asked_for(tmp_path):
    with pytest.raises(LlamaError, match=r"pip install 'llama_jax\[wandb\]'") as caught:
        log_of(tmp_path, config=LogConfig(tensorboard=False, wandb="stories"))
    assert caught.value.code == ExitCode.BAD_CONFIG


def test_the_report_is_a_picture_however_long_the_run(tmp_path):
    from matplotlib.image import imread

    draw_report(epath.Path(tmp_path))  # nothing to draw yet
    assert not (tmp_path / "report.png").exists()
    steps = np.arange(1, 3 * POINTS)
    lines = [{"step": int(s), "loss": 1 + 5 / s, "learning_rate": 1e-3, "grad_norm": None} for s in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"step": 100, "held_out/loss": 2.0}) + "\n")
    draw_report(epath.Path(tmp_path))
    picture = imread(tmp_path / "report.png")
    assert picture.shape[0] > 500 and picture.std() > 0.01


def test_flops_of_a_token_are_the_published_counts():
    """Llama 2 7B at 4,096 tokens: 46.9 GFLOP by PaLM's convention, 42.9 counting half of the attention and no lookup."""
    cfg = PRESETS["llama2_7b"]
    assert flops_per_token(cfg, 4096, causal=False) == pytest.approx(46.9e9, rel=2e-3)
    assert flops_per_token(cfg, 4096, causal=True) == pytest.approx(42.9e9, rel=2e-3)
    frozen = flops_per_token(cfg, 4096, causal=True, frozen=True)
    assert flops_per_token(cfg, 4096, causal=True) - frozen == 2 * (cfg.num_params - 32000 * 4096)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v4", "v4"), ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA L4", "l4"), ("Tesla T4", "t4"), ("cpu", None),
    ],
)  # fmt: skip
def test_devices_are_known_by_what_jax_calls_them(kind, name):
    chip = chip_of(type("Device", (), {"device_kind": kind})())
    assert (chip and chip.name) == name
