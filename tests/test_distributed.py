"""Several processes: how a job is found in flags and environment, and that none of its processes is left waiting."""

import contextlib
import http.server
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from llama_jax import cluster, distributed
from llama_jax.cluster import Cluster, find_cluster
from llama_jax.errors import ExitCode, LlamaError
from tests.processes import ROOT, Processes, free_port

SECONDS_TO_STOP = 5  # for the others, after a process has ended


def find(environ=(), *flags, metadata=None, kubernetes=None) -> Cluster | None:
    """find_cluster on a machine that has only this environment; asking anybody else fails."""
    metadata = metadata if metadata is not None else {}
    return find_cluster(*flags, environ=dict(environ), metadata=metadata.get, kubernetes=lambda: kubernetes)


# Finding the job.

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[009-010],big7",
    "SLURM_NTASKS": "64",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TPU_VM = {
    "agent-worker-number": "3",
    "worker-network-endpoints": ",".join(f"unknown:unknown:10.130.0.{i}" for i in (2, 3, 4, 5)),
    "tpu-env": "ACCELERATOR_TYPE: 'v4-32'\nNODE_ID: 'my-tpu'\nWORKER_ID: '3'\nZONE: 'us-central2-b'\n",
}
JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-2"}
FLAGS = ("10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(SLURM, ("gpu009:61441", 3, 2), id="srun"),
        pytest.param({**SLURM, "JAX_COORDINATOR_PORT": "999"}, ("gpu009:999", 3, 2), id="srun, another port"),
        pytest.param(OPEN_MPI, ("10.96.0.1:62624", 8, 5), id="mpirun 4"),
        pytest.param(
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"},
            ("[fe80::b9b:ac5d]:62880", 8, 5),
            id="mpirun 4, IPv6",
        ),
        pytest.param(GKE, ("tpu-0.svc:8482", 2, 1), id="GKE"),
        pytest.param(
            {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_HOSTNAMES": "x", "TPU_WORKER_ID": "0"},
            ("a:8482", 2, 0),
            id="GKE, addresses with ports",
        ),
        pytest.param(
            {
                **GKE,
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0.svc:8080",
            },
            ("slice-0-0.svc:8482", 6, 5),
            id="GKE, three slices",
        ),
        pytest.param(
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, ("a:1", 2, 0), id="JAX_*"
        ),
    ],
)
def test_launchers_tell_the_job(environ, expected):
    found = find(environ)
    assert (found.coordinator, found.num_processes, found.process_id) == expected


def test_a_tpu_vm_asks_its_metadata():
    found = find(metadata=TPU_VM)
    assert (found.coordinator, found.num_processes, found.process_id) == ("10.130.0.2:8482", 4, 3)
    assert found.hosts[1] == "10.130.0.3"
    assert "gcloud compute tpus tpu-vm ssh my-tpu --zone=us-central2-b --worker=all" in found.launch
    slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\n"
    found = find(metadata={**TPU_VM, "tpu-env": TPU_VM["tpu-env"] + slices})
    assert (found.coordinator, found.num_processes, found.process_id) == ("10.0.0.9:8482", 8, 7)


def test_a_pod_of_a_job_asks_kubernetes():
    found = find(JOB, kubernetes=("train-0.train:55527", 4))
    assert (found.coordinator, found.num_processes, found.process_id) == ("train-0.train:55527", 4, 2)
    found = find(JOB, "train-0.train:1", 4)  # with flags, nobody is asked
    assert (found.coordinator, found.process_id) == ("train-0.train:1", 2)
    with pytest.raises(LlamaError, match=r"--num_processes is missing.*pip install jax\[k8s\]"):
        find(JOB)


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        pytest.param({}, (), id="a laptop"),
        pytest.param({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (), id="a notebook in Kubernetes"),
        pytest.param({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (), id="a batch script, without srun"),
        pytest.param({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (), id="a shell by srun --pty"),
        pytest.param({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, (), id="a TPU host alone"),
        pytest.param({**GKE, "TPU_PROCESS_BOUNDS": "1,1,1"}, (), id="one host of a slice, by choice"),
        pytest.param({**GKE, "JAX_PLATFORMS": "cpu"}, (), id="the CPU of a TPU host"),
        pytest.param(SLURM, ("", 1), id="--num_processes=1"),
        pytest.param(JOB, ("", 1, 0), id="a pod by itself"),
    ],
)
def test_a_process_alone_is_no_job(environ, flags):
    assert find(environ, *flags) is None


def test_no_metadata_server_is_asked_without_tpu_chips(monkeypatch):
    asked = []
    monkeypatch.setattr(cluster, "_has_tpu_chips", lambda: False)
    monkeypatch.setattr(cluster.urllib.request, "build_opener", asked.append)
    assert find_cluster(environ={}) is None
    assert not asked


def test_the_metadata_server_is_read_missed_and_named(monkeypatch):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/computeMetadata/v1/instance/attributes/known" and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(b"12" * known)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(cluster, "_has_tpu_chips", lambda: True)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert cluster.ask_metadata("known") == "12"
        assert cluster.ask_metadata("unknown") is None
        server.shutdown()
    with pytest.raises(LlamaError, match=r"metadata server 127\.0\.0\.1.*does not answer.*--num_processes=1") as error:
        cluster.ask_metadata("known")
    assert error.value.code == ExitCode.NO_COORDINATOR


def test_flags_win_over_the_environment():
    found = find(SLURM, "login:77", -1, 1)
    assert (found.coordinator, found.num_processes, found.process_id) == ("login:77", 3, 1)
    assert find(OPEN_MPI, *FLAGS) == Cluster(*FLAGS)
    assert find({}, "[fe80::1]:77", 2, 0).address == ("fe80::1", 77)


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, ("", -1, 1), "--num_processes is missing"),
        ({}, ("host:1",), "--num_processes is missing"),
        ({}, ("host:1", 2), "--process_id is missing"),
        ({}, ("", 2, 0), "--coordinator is missing"),
        ({}, ("host:1", 2, 2), "process_id is 2, expected 0 to 1"),
        ({}, ("host:1", 2, -2), "process_id is -2, expected 0 to 1"),
        ({}, ("host:1", 0, 0), "num_processes is 0, expected 1 or more"),
        ({}, ("host:1", 1, 1), "process_id is 1, expected 0 to 0"),
        ({}, ("host", 2, 0), "the coordinator is 'host', expected HOST:PORT"),
        ({}, ("host:", 2, 0), "the coordinator is 'host:', expected HOST:PORT"),
        ({}, ("host:70000", 2, 0), "'host:70000', expected HOST:PORT"),
        ({}, (":80", 2, 0), "':80', expected HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "two"}, (), "JAX_NUM_PROCESSES is 'two' in the environment, expected a number"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), "--process_id is missing .according to GKE"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, (), "--coordinator is missing .according to Open MPI: 8 processes"),
    ],
)
def test_what_does_not_fit_together_is_said(environ, flags, message):
    with pytest.raises(LlamaError, match=message) as error:
        find(environ, *flags)
    assert error.value.code == ExitCode.BAD_REQUEST


def test_open_mpi_5_needs_no_coordinator_on_one_machine():
    environ = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "", "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_NAMESPACE": "prterun-a-12@1"}
    assert find(environ).coordinator.startswith("127.0.0.1:6")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (OPEN_MPI, 1),
        ({**OPEN_MPI, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1),
        ({**OPEN_MPI, "CUDA_VISIBLE_DEVICES": "3"}, -1),  # the launcher has given it one already
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, -1),  # all GPUs of its machine
        (SLURM, -1),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_LOCALID": "1"}, 1),
    ],
)
def test_processes_of_one_machine_share_out_its_gpus(environ, expected):
    assert find(environ).local_device == expected


@pytest.mark.parametrize(
    ("short", "names"),
    [("a", "a"), ("a,b", "a b"), ("n[08-10],m", "n08 n09 n10 m"), ("r[1-2]n[3,5]x", "r1n3x r1n5x r2n3x r2n5x")],
)
def test_node_lists_of_slurm_are_written_out(short, names):
    assert cluster._expand(short) == names.split()


# Alone.


def test_alone_nothing_is_imported_and_values_stay():
    code = "import sys; from llama_jax import distributed as d\nwith d.join() as c: print(c, d.is_main(), d.num_processes(), "
    code += "d.broadcast(3), 'jax' in sys.modules)"
    environ = {"PATH": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("None True 1 3 False\n", "")


# Together. Each process prints what it found on stderr; MODE says what then happens to process VICTIM.

SCRIPT = """
import os, signal, sys
import numpy as np
from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError, run_command

index, count, address, mode, victim, timeout, heartbeat = sys.argv[1:8]

def main():
    with distributed.join(address, int(count), int(index), timeout_seconds=float(timeout), heartbeat_seconds=float(heartbeat)):
        import jax
        from jax.sharding import NamedSharding, PartitionSpec as P

        value = distributed.broadcast({"text": ["é", 1]} if distributed.is_main() else None)
        data = distributed.broadcast(bytes(1_000_000) if distributed.is_main() else None)
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
        numbers = jax.make_array_from_callback((8,), NamedSharding(mesh, P("data")), lambda i: np.arange(8.0)[i])
        found = [jax.device_count(), distributed.num_processes(), float(total(numbers)), value, len(data)]
        print("found", found, file=sys.stderr, flush=True)
        print("from", index)
        if mode == "everywhere" or mode == "raise" and index == victim:
            raise LlamaError(ExitCode.WRONG_SHAPE, "layers.3: odd")
        if mode.startswith("SIG") and index == victim:
            print("about to end", file=sys.stderr, flush=True)
            os.kill(os.getpid(), getattr(signal, mode))
        if mode != "clean":
            print("no one should see", float(total(numbers)))

run_command(main)
"""


@pytest.fixture
def job(tmp_path):
    """Calls as `job(mode)`: the processes, started."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    with contextlib.ExitStack() as stack:

        def start(mode, victim=1, *, count=2, started=None, timeout=60, heartbeat=60, port=None, env=None) -> Processes:
            rest = [str(count), f"127.0.0.1:{port or free_port()}", mode, str(victim), str(timeout), str(heartbeat)]
            processes = range(count if started is None else started)
            return stack.enter_context(Processes([[str(script), str(i), *rest] for i in processes], env=env))

        yield start


def said(process) -> str:
    """A process's stderr without what the script prints."""
    return "\n".join(line for line in process.stderr.splitlines() if not line.startswith(("found", "about")))


def test_processes_compute_and_end_together(job):
    processes = job("clean", env={"http_proxy": "http://127.0.0.1:1"})
    assert processes.wait() == [0, 0]
    for process in processes.all:
        assert "found [8, 2, 28.0, {'text': ['é', 1]}, 1000000]" in process.stderr
        assert not said(process)
    assert [process.stdout for process in processes.all] == ["from 0\n", ""]


def test_an_error_in_one_process_ends_a_collective_of_the_others(job):
    processes = job("raise")
    assert processes.wait() == [ExitCode.PEER_DIED, ExitCode.WRONG_SHAPE]
    name = f"process 1 of 2 ({socket.gethostname()})"
    assert said(processes[0]) == f"error: {name} ended with exit code 13: layers.3: odd"
    assert said(processes[1]) == "error: layers.3: odd"
    assert processes[0].ended - processes[1].ended < SECONDS_TO_STOP


@pytest.mark.parametrize(("victim", "how"), [(1, "SIGKILL"), (0, "SIGKILL"), (1, "SIGTERM")])
def test_a_process_that_is_killed_is_named(job, victim, how):
    processes = job(how, victim)
    codes = processes.wait()
    other = 1 - victim
    assert (codes[victim], codes[other]) == (-getattr(signal, how), ExitCode.PEER_DIED)
    assert said(processes[other]).startswith(f"error: process {victim} of 2 ({socket.gethostname()}) is gone without a word")
    assert said(processes[other]).count("\n") == 0
    assert processes[other].ended - processes[victim].ended < SECONDS_TO_STOP


@pytest.mark.parametrize("victim", [1, 0])
def test_a_machine_that_stands_still_is_named(job, victim):
    processes = job("SIGSTOP", victim, heartbeat=5)
    processes[victim].wait_for("about to end")
    stopped, other = time.monotonic(), processes[1 - victim]
    assert other.popen.wait(60) == ExitCode.PEER_DIED
    assert time.monotonic() - stopped < 5 + SECONDS_TO_STOP
    other.wait_for(f"error: process {victim} of 2 ({socket.gethostname()}) has not been heard of for 5 s")


def test_an_error_that_all_processes_find_is_their_own(job):
    processes = job("everywhere")
    assert processes.wait() == [ExitCode.WRONG_SHAPE] * 2
    assert all(said(process) == "error: layers.3: odd" for process in processes.all)


def test_who_is_missing_is_said_by_those_who_came(job):
    processes = job("clean", count=3, started=2, timeout=8, heartbeat=3)
    assert processes.wait() == [ExitCode.NO_COORDINATOR] * 2
    for process in processes.all:
        assert said(process).startswith("error: 2 of 3 processes came; missing: process 2 after 8 s; the command line says")
        assert "--num_processes=3 --process_id=ID, ID from 0 to 2" in said(process)
        assert said(process).count("\n") == 0


def test_strangers_do_not_disturb_those_who_wait(job):
    port = free_port()
    processes = job("clean", started=1, timeout=4, port=port)
    answers = [_say(port, b"GET / HTTP/1.1\r\n\r\n")]
    hello = {"kind": "hello", "size": 0, "process_id": 1, "host": "x", "num_processes": 4, "jax": "0"}
    answers += [_say(port, json.dumps({**hello, **change}).encode() + b"\n") for change in ({}, {"num_processes": 2})]
    assert answers[0] == ""
    assert "it says that there are 4 processes, process 0 says 2" in answers[1]
    assert "it has jax 0, process 0 has " in answers[2]
    assert processes.wait() == [ExitCode.NO_COORDINATOR]
    assert "error: 1 of 2 processes came; missing: process 1 after 4 s" in said(processes[0])


def _say(port: int, text: bytes) -> str:
    """What process 0 answers, once it listens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(text)
                return connection.makefile().readline()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_coordinator_that_does_not_answer_is_named():
    port = free_port()
    with pytest.raises(LlamaError, match=f"process 0 at 127.0.0.1:{port} did not answer within 0.5 s.*process 1 of 4") as error:
        with distributed.join(f"127.0.0.1:{port}", 4, 1, timeout_seconds=0.5):
            pass
    assert error.value.code == ExitCode.NO_COORDINATOR


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LlamaError, match=f"cannot listen on port {address[10:]}") as error:
            with distributed.join(address, 2, 0, timeout_seconds=5):
                pass
    assert error.value.code == ExitCode.NO_COORDINATOR


@pytest.mark.parametrize("flags", [[], ["--process_id=1", "--num_processes", "4", "--coordinator=a:1"]])
def test_the_command_for_all_hosts_leaves_out_what_differs(monkeypatch, flags):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "infer.sample", *flags, "--prompt", "a b"])
    explicit = Cluster("a:1", 4, 1)
    assert cluster.command_line(explicit) == (
        "python -m infer.sample --prompt 'a b' --coordinator=a:1 --num_processes=4 --process_id=ID, ID from 0 to 3"
    )
    monkeypatch.chdir(pathlib.Path("/"))
    assert cluster.command_line(find(metadata=TPU_VM)).endswith(
        """--worker=all --command='cd / && python -m infer.sample --prompt '"'"'a b'"'"''"""
    )
