"""What the loop does when a step goes wrong, and how it times those that do not."""

import statistics

import numpy as np
import pytest

from configs import pretrain
from llama_jax.errors import ExitCode, LlamaError
from tests.train.make import MODEL, command, config_of, finish, lines, run, start, stored, write_texts, write_tokenizer
from train import loop

STEPS, EVERY = 5, 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a run whose third step meets what the second has made of the parameters."""
    folder = tmp_path_factory.mktemp("files")
    data, tokenizer = write_texts(folder / "texts.jsonl"), write_tokenizer(folder / "tokenizer.model")
    model = {f"model__{name}": value for name, value in MODEL.items()} | {"model__num_layers": 1}
    return dict(
        model, data__train=str(data), tokenizer=str(tokenizer), data__workers=1, train__steps=STEPS, train__batch_size=2,
        train__length=32, train__dtype="float32", optimizer__peak_lr=1e30, optimizer__warmup_steps=1, save__every=EVERY,
        save__keep=5, eval__every=0, log__tensorboard=False,
    )  # fmt: skip


def test_a_step_that_is_not_finite_stops_the_run_and_names_its_documents(settings, tmp_path):
    with pytest.raises(LlamaError, match=r"step 3 is not finite: .*gradient norm nan") as caught:
        run(config_of(pretrain, **settings), tmp_path)
    assert caught.value.code == ExitCode.NOT_FINITE_STEP
    assert "texts.jsonl:" in str(caught.value) and "parameter norm" in str(caught.value)
    assert "the last checkpoint is that of step 2" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_or_it_is_skipped_and_the_run_goes_on(settings, tmp_path, capsys):
    run(config_of(pretrain, **settings, train__nonfinite="skip"), tmp_path)
    assert [line["grad_norm"] is None for line in lines(tmp_path)] == [False, False, True, True, True]
    before, after = stored(tmp_path, 2), stored(tmp_path, 4)
    assert [name for name in before if before[name] != after[name]] == ["state/step"]
    said = capsys.readouterr().err
    assert said.count(": skipped") == 3 and "texts.jsonl:" in said


@pytest.mark.parametrize(("peak_lr", "jumps"), [(1e-4, False), (100.0, True)])
def test_a_loss_that_jumps_is_noted_with_its_documents(settings, tmp_path, monkeypatch, capsys, peak_lr, jumps):
    """The rate rises by a twelfth of its peak at a step: at 100 the first steps leave a model of quite another loss."""
    monkeypatch.setattr(loop, "SPIKE_WINDOW", 2)
    sized = {"train__steps": 4, "optimizer__peak_lr": peak_lr, "optimizer__warmup_steps": 12, "save__every": 0}
    run(config_of(pretrain, **settings | sized), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "after a mean of" in line]
    assert bool(said) == jumps
    if jumps:
        losses = [line["loss"] for line in lines(tmp_path)]
        first = next(i for i in (2, 3) if losses[i] > np.mean(losses[i - 2 : i]) + 6 * np.std(losses[i - 2 : i]))
        assert f"step {first + 1}: a loss of {losses[first]:.4f}" in said[0] and "texts.jsonl:" in said[0]


def test_a_step_s_time_is_its_own(settings, tmp_path):
    """train.main runs a CPU's programs in the calling thread: read one step late, the last would have taken no time at all."""
    sized = {"train__steps": 12, "train__batch_size": 8, "optimizer__peak_lr": 1e-3, "save__every": 4}
    code, said = finish(start(command(tmp_path / "run", **settings | sized), tmp_path / "cache"))
    assert code == 0, said
    seconds = [line["step_seconds"] for line in lines(tmp_path / "run")]
    assert len(seconds) == 12
    assert min(seconds) > statistics.median(seconds) / 5
