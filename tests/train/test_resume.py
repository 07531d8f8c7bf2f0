"""A run that is interrupted is the run that is not: killed at random, told to stop, on another mesh or form of the layers."""

import json
import random
import shutil
import signal

import numpy as np
import pytest

from configs import pretrain
from llama_jax.errors import ExitCode, LlamaError
from tests.processes import Processes, free_port
from tests.train.make import (
    MODEL,
    command,
    config_of,
    finish,
    lines,
    numbers,
    run,
    signal_after,
    start,
    stored,
    write_texts,
    write_tokenizer,
)

STEPS, EVERY, KILLS = 24, 3, 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a short run in processes of their own."""
    folder = tmp_path_factory.mktemp("files")
    data, tokenizer = write_texts(folder / "texts.jsonl"), write_tokenizer(folder / "tokenizer.model")
    model = {f"model__{name}": value for name, value in MODEL.items()}
    return dict(
        model, data__train=str(data), tokenizer=str(tokenizer), data__workers=1, train__steps=STEPS, train__batch_size=2,
        train__length=48, train__dtype="float32", optimizer__warmup_steps=2, save__every=EVERY, save__keep=5, eval__every=0,
        log__tensorboard=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(settings, cache, tmp_path_factory):
    """The WORKDIR of a run that nobody interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    code, said = finish(start(command(workdir, **settings), cache))
    assert code == 0, said
    return workdir


@pytest.mark.slow
def test_a_run_killed_several_times_ends_as_if_it_had_not_been(settings, cache, whole, tmp_path):
    """Parameters, optimizer state, step and the loss of every batch, to the bit."""
    rng = random.Random(0)
    code = None
    for kill in range(KILLS + 1):
        process = start(command(tmp_path, **settings), cache)
        if kill < KILLS:
            done = len(lines(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
            signal_after(process, tmp_path, min(done + rng.randint(1, 2 * EVERY), STEPS - 1))
        code, said = finish(process)
        assert code == (-signal.SIGKILL if kill < KILLS else 0), said
    assert numbers(tmp_path) == numbers(whole)
    starts = [begun["first_step"] for begun in json.loads((tmp_path / "run.json").read_text())["starts"]]
    assert len(starts) == KILLS + 1 and starts == sorted(starts) and 0 < starts[-1] < STEPS
    ours, wanted = stored(tmp_path), stored(whole)
    assert ours.keys() == wanted.keys() and len(ours) > 40
    assert [name for name in wanted if ours[name] != wanted[name]] == []


@pytest.mark.slow
def test_a_run_told_to_stop_saves_says_so_and_goes_on(settings, cache, whole, tmp_path):
    process = start(command(tmp_path, **settings | dict(save__every=0)), cache)
    signal_after(process, tmp_path, 5, signal.SIGTERM)
    code, said = finish(process)
    assert code == ExitCode.STOPPED, said
    assert "SIGTERM: saved after step" in said.splitlines()[-1]
    code, said = finish(start(command(tmp_path, **settings), cache))
    assert code == 0 and "going on" in said
    assert numbers(tmp_path) == numbers(whole)
    assert stored(tmp_path) == stored(whole)


@pytest.fixture(scope="module")
def half(settings, tmp_path_factory):
    """The WORKDIR of a run that was stopped half way, in this process, and its config."""
    workdir = tmp_path_factory.mktemp("half")
    run(half_config(settings), workdir)
    return workdir


def half_config(settings, **changes):
    return config_of(pretrain, **settings | dict(train__steps=STEPS // 2) | changes)


def test_a_finished_run_started_again_does_nothing(half, settings):
    before = stored(half), lines(half)
    run(half_config(settings), half)
    assert (stored(half), lines(half)) == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(train__batch_size=4), "train.batch_size is 2 in the checkpoint and 4 in the config"),
        (dict(optimizer__peak_lr=1e-5), "optimizer.peak_lr is 0.003 in the checkpoint and 1e-05 in the config"),
        (dict(optimizer__name="lion"), "optimizer.name is adamw in the checkpoint and lion in the config"),
        (dict(train__seed=1), "train.seed is 0 in the checkpoint and 1 in the config"),
        (dict(model__mlp_dim=96), "model.mlp_dim is 80 in the checkpoint and 96 in the config"),
    ],
)
def test_a_changed_setting_is_refused_by_name_and_nothing_is_touched(half, settings, changes, name):
    before = sorted(path.name for path in (half / "checkpoints").iterdir())
    with pytest.raises(LlamaError, match="cannot be gone on from") as caught:
        run(half_config(settings, **changes), half)
    assert name in str(caught.value) and "and another --workdir" in str(caught.value)
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == before


# The same run in another form, from the middle on


@pytest.fixture
def middle(whole, tmp_path):
    """A copy of the whole run in which only the checkpoint of its middle, and those before it, are left."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in (workdir / "checkpoints").iterdir():
        if int(step.name) > STEPS // 2:
            shutil.rmtree(step)
    return workdir


def assert_the_same(workdir, whole):
    """Losses of the steps made anew, and the parameters at the end. Another program may round a rate's cosine otherwise."""
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("learning_rate", 2e-7), ("targets", 0)):
        ours, wanted = ([line[name] for line in numbers(folder)] for folder in (workdir, whole))
        np.testing.assert_allclose(ours, wanted, rtol=tolerance, err_msg=name)
    ours, wanted = stored(workdir), stored(whole)
    assert ours.keys() == wanted.keys()
    for name in (name for name in wanted if name.startswith("params/")):
        a, b = (np.frombuffer(arrays[name], np.float32) for arrays in (ours, wanted))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [(dict(train__scan_layers="true"), 1), (dict(mesh__fsdp=2, mesh__tensor=2), 4)],
    ids=["scanned", "four devices"],
)
def test_a_run_goes_on_in_another_form(settings, whole, middle, changes, devices):
    run(config_of(pretrain, **settings | changes), middle, devices)
    assert_the_same(middle, whole)


@pytest.mark.slow
def test_a_run_goes_on_in_two_processes(settings, whole, middle):
    arguments, port = command(middle, **settings)[1:], free_port()
    job = [[*arguments, f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"] for i in range(2)]
    with Processes(job, devices=1) as processes:
        assert processes.wait(240) == [0, 0], processes[0].stderr + processes[1].stderr
        assert "going on" in processes[0].stderr and processes[1].stderr.count("step ") == 0
    assert_the_same(middle, whole)
