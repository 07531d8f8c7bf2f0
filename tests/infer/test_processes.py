"""The programs in two processes of four CPU devices each: one answer, one voice, and no waiting for the dead."""

import json
import pathlib

import numpy as np
import pytest

from llama_jax.errors import ExitCode
from tests.processes import Processes, free_port

GREEDY = ("--config.sampling.temperature=0", "--config.max_new_tokens=24")
PROMPT = "Once upon a time"


def job(program: str, *arguments: str, count: int = 2) -> list[list[str]]:
    """The command of each process; a {process} in an argument becomes its number."""
    port = free_port()
    where = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [
        ["-m", f"infer.{program}", f"--config=configs/{program}.py"]
        + [argument.replace("{process}", str(i)) for argument in arguments]
        + ([*where, f"--process_id={i}"] if count > 1 else [])
        for i in range(count)
    ]


def run(program: str, *arguments: str, count: int = 2) -> tuple[str, list[str]]:
    """What process 0 printed, and the stderr of all."""
    with Processes(job(program, *arguments, count=count)) as processes:
        codes = processes.wait(120)
        assert codes == [0] * count, [process.stderr for process in processes.all]
        assert all(process.stdout == "" for process in processes.all[1:])
        return processes[0].stdout, [process.stderr for process in processes.all]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2, 4), (2, 2, 2)])
def test_two_processes_sample_what_one_does_and_process_0_alone_speaks(mesh):
    axes = [f"--config.mesh.{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    exact = [*GREEDY, "--config.dtype=float32"]  # two names are as likely, and bfloat16 sums of parts round to either
    alone, _ = run("sample", *exact, f"--prompt={PROMPT}", "--prompt=The cat", count=1)
    # Only process 0 is asked for its prompts and settings: the other's are as if its user had mistyped.
    together, said = run("sample", *exact, *axes, f"--prompt={PROMPT}", "--prompt=The cat", "--config.sampling.seed={process}")
    assert together == alone and together.startswith(PROMPT)
    assert said == ["", ""]


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path: pathlib.Path):
    text, tokens, logits = tmp_path / "story.txt", tmp_path / "tokens.npy", tmp_path / "logits-{count}.npy"
    text.write_text("Once upon a time there was a curious rabbit.", encoding="utf-8")
    np.save(tokens, np.arange(3, 3 + 24, dtype=np.int32).reshape(2, 12))
    found = {}
    for count in (1, 2):
        summary, _ = run("score", f"--text={text}", "--config.dtype=float32", count=count)
        path = str(logits).format(count=count)
        run("score", f"--tokens={tokens}", f"--logits={path}", "--config.dtype=float32", count=count)
        found[count] = json.loads(summary), np.load(path)
    assert found[1][0]["log_likelihood"] == pytest.approx(found[2][0]["log_likelihood"], abs=1e-3)
    np.testing.assert_allclose(found[1][1], found[2][1], rtol=0, atol=1e-4)


def test_a_mistake_of_the_user_is_one_line_and_ends_both():
    with Processes(job("sample", "--config.mesh.tensor=5")) as processes:
        codes = processes.wait(60)
    assert codes[0] == ExitCode.BAD_MESH
    assert processes[0].stderr.count("\n") == 1 and "tensor=5 is 5 devices, and there are 8" in processes[0].stderr
    assert codes[1] in (ExitCode.BAD_MESH, ExitCode.PEER_DIED)


@pytest.mark.slow
def test_a_peer_that_is_killed_ends_the_job_and_is_named():
    long = ("--config.max_new_tokens=450", "--config.sampling.ignore_eos=True", f"--prompt={PROMPT}")
    with Processes(job("sample", *long)) as processes:
        processes[0].wait_for(PROMPT)
        processes[1].popen.kill()
        codes = processes.wait(30)
    assert codes[0] == ExitCode.PEER_DIED
    assert "process 1 of 2" in processes[0].stderr and "Traceback" not in processes[0].stderr
