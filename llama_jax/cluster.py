"""The job a process belongs to: what flags and the environment of a launcher, TPU slice or pod say about it."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NoReturn

from llama_jax.errors import ExitCode, LlamaError

METADATA_SECONDS = 5.0
TPU_PORT = 8482  # the port jax's own coordinator uses on TPUs
FIRST_PORT, PORTS = 61440, 4096  # above what Linux gives to outgoing connections; jobs spread over them by their number


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a job, as flags or the environment say.

    Attributes:
        coordinator: HOST:PORT, where process 0 listens; "" unknown.
        num_processes: -1 unknown.
        process_id: 0 to num_processes - 1; -1 unknown.
        source: who says so, for messages.
        hosts: machines of the processes, by process id, where that is known.
        local_device: the GPU of this process, by its number on the machine, when a launcher started one process per GPU;
            -1: all.
        launch: how a command is started on all hosts: {command}, or {remote} for one in quotes that changes folder first.
    """

    coordinator: str = ""
    num_processes: int = -1
    process_id: int = -1
    source: str = "the command line"
    hosts: tuple[str, ...] = ()
    local_device: int = -1
    launch: str = ""

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def ask_metadata(key: str) -> str | None:
    """An attribute of this TPU VM from Google's metadata server; None, at once, on a machine without TPU chips."""
    if importlib.util.find_spec("libtpu") is None or not _has_tpu_chips():
        return None
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=METADATA_SECONDS) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError:  # no such attribute: not a TPU VM of this kind
        return None
    except OSError as error:
        raise LlamaError(
            ExitCode.NO_COORDINATOR,
            f"this machine has TPU chips, and the metadata server {server} that knows its slice does not answer ({error}): "
            "try again, or give --num_processes=1 when this host is the whole slice",
        ) from error


def ask_kubernetes() -> tuple[str, int] | None:
    """Coordinator and number of pods of this pod's Job, by jax's own query; None without the `kubernetes` package."""
    if importlib.util.find_spec("kubernetes") is None:
        return None
    from jax._src.clusters import K8sCluster  # private: the public initialize() asks it too, and does not say what it found

    try:
        K8sCluster.is_env_present()
        return K8sCluster.get_coordinator_address(30, None), K8sCluster.get_process_count()
    except Exception as error:  # of the client's many
        raise LlamaError(ExitCode.BAD_REQUEST, f"Kubernetes does not tell the pods of this Job: {error}") from error


def find_cluster(
    coordinator: str = "",
    num_processes: int = -1,
    process_id: int = -1,
    *,
    environ: Mapping[str, str] = os.environ,
    metadata: Callable[[str], str | None] = ask_metadata,
    kubernetes: Callable[[], tuple[str, int] | None] = ask_kubernetes,
) -> Cluster | None:
    """The job this process belongs to; None when it is alone.

    What is given wins over JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and these over what the launcher
    set; num_processes=1 is alone wherever it runs. Coordinator addresses are those jax itself would take.

    Raises:
        LlamaError: something is missing or does not fit.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = num_processes if num_processes != -1 else _number(environ, "JAX_NUM_PROCESSES")
    process_id = process_id if process_id != -1 else _number(environ, "JAX_PROCESS_ID")
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = {name: value for name, value in given.items() if value not in ("", -1)}
    found = None
    if num_processes != 1 and len(given) < 3:
        found = (
            _open_mpi(environ)
            or _slurm(environ)
            or _tpu_slice(environ, metadata)
            or _kubernetes(environ, (lambda: ("", -1)) if {"coordinator", "num_processes"} <= given.keys() else kubernetes)
        )
    if not given and (found is None or found.num_processes == 1):
        return None
    return _checked(dataclasses.replace(found or Cluster(), **given))


def _checked(cluster: Cluster) -> Cluster | None:
    """The cluster if it is complete; None if it is this process alone."""

    def refuse(problem: str) -> NoReturn:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"{problem}; every process of a job is started with --coordinator=HOST:PORT (a free port of process 0's machine), "
            "--num_processes=N and --process_id=0 to N-1, or by a launcher that sets them (srun, mpirun, a TPU slice)",
        )

    n, index, given = cluster.num_processes, cluster.process_id, f"according to {cluster.source}"
    if n == -1:
        refuse(f"how many processes there are is not known: --num_processes is missing ({given})")
    if n < 1:
        refuse(f"num_processes is {n}, expected 1 or more")
    if n == 1 and index in (-1, 0):
        return None
    if index == -1:
        refuse(f"which of the {n} processes this is is not known: --process_id is missing ({given})")
    if not 0 <= index < n:
        refuse(f"process_id is {index}, expected 0 to {n - 1} for num_processes {n} ({given})")
    if not cluster.coordinator:
        refuse(f"where process 0 runs is not known: --coordinator is missing ({given}: {n} processes)")
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        refuse(f"the coordinator is {cluster.coordinator!r}, expected HOST:PORT")
    return cluster


def _number(environ: Mapping[str, str], name: str, missing: int = -1) -> int:
    text = environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise LlamaError(ExitCode.BAD_REQUEST, f"{name} is {text!r} in the environment, expected a number")
    return int(text) if text else missing


def _port(environ: Mapping[str, str], otherwise: int) -> int:
    return _number(environ, "JAX_COORDINATOR_PORT", otherwise)


def _one_gpu(environ: Mapping[str, str], local_id: int, local_processes: int) -> int:
    """Cluster.local_device: what the process may see is narrowed only if it has neighbours and all of them see all GPUs."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return -1 if local_processes == 1 or (visible and "," not in visible) else local_id


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """mpirun. Up to version 4 it tells where it runs; 5 does not, but one machine needs no telling."""
    n = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if n == -1:
        return None
    local_processes = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", n)
    coordinator = ""
    if uri := environ.get("OMPI_MCA_orte_hnp_uri", ""):  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or tcp6://[fe80::1]:1
        host = re.search(r"tcp://(.+?)[,:]|tcp6://(\[.+?)[,\]]", uri)
        job = int(uri.split(".")[0]) // PORTS  # the job's number is a multiple of 4096
        name = host and (host[1] or f"{host[2]}]")
        coordinator = f"{name}:{_port(environ, FIRST_PORT + job % PORTS)}" if host else ""
    elif local_processes == n:
        job = sum(environ.get("PMIX_NAMESPACE", "").encode())
        coordinator = f"127.0.0.1:{_port(environ, FIRST_PORT + job % PORTS)}"
    return Cluster(
        coordinator,
        n,
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        "Open MPI",
        local_device=_one_gpu(environ, _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), local_processes),
        launch=f"mpirun -n {n} {{command}}",
    )


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """srun. A batch script's own shell, outside any step, is a process alone."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys():
        return None
    n = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS"))  # NTASKS may be that of the whole job
    nodes = _expand(environ["SLURM_STEP_NODELIST"])
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 2(x3),1
    per_node = [int(count) for count, times in tasks for _ in range(int(times or 1))]
    here = _number(environ, "SLURM_NODEID", 0)
    local_processes = per_node[here] if here < len(per_node) else -(-n // len(nodes))
    number = _number(environ, "SLURM_JOB_ID") + 251 * _number(environ, "SLURM_STEP_ID", 0)
    return Cluster(
        f"{nodes[0]}:{_port(environ, FIRST_PORT + number % PORTS)}",
        n,
        _number(environ, "SLURM_PROCID"),
        "SLURM",
        hosts=tuple(nodes) if len(nodes) == n else (),
        local_device=_one_gpu(environ, _number(environ, "SLURM_LOCALID", 0), local_processes),
        launch=f"srun --ntasks={n} {{command}}",
    )


def _expand(nodes: str) -> list[str]:
    """Names in SLURM's short form: a[01-03,7],b is a01, a02, a03, a7, b."""
    names = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        bracket = re.search(r"\[([^\]]*)\]", entry)
        if bracket is None:
            names.append(entry)
            continue
        for piece in bracket[1].split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names += _expand(f"{entry[: bracket.start()]}{number:0{len(first)}}{entry[bracket.end() :]}")
    return names


def _tpu_slice(environ: Mapping[str, str], metadata: Callable[[str], str | None]) -> Cluster | None:
    """A TPU slice of several hosts, or several slices: GKE sets the environment, a TPU VM asks the metadata server."""
    one_host = environ.get("TPU_PROCESS_BOUNDS", "").replace(" ", "") == "1,1,1"  # set by who wants this host alone
    if "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu") or one_host:
        return None
    launch, source, tell = "{command}, in every pod of the slice", "GKE's TPU environment", environ.get
    if workers := environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES"):
        worker = _number(environ, "TPU_WORKER_ID", _number(environ, "CLOUD_TPU_TASK_ID"))
    elif "TPU_SKIP_MDS_QUERY" in environ or (agent := metadata("agent-worker-number")) is None:
        return None
    else:
        worker = int(agent)
        workers = metadata("worker-network-endpoints") or ""
        vm = dict(re.findall(r"^\s*(\w+): *'([^']*)'", metadata("tpu-env") or "", re.MULTILINE))
        source = f"the TPU VM {vm.get('NODE_ID', '')}".strip()
        launch = f"gcloud compute tpus tpu-vm ssh {vm.get('NODE_ID', 'NAME')} --zone={vm.get('ZONE', 'ZONE')} --worker=all"
        launch += " --command={remote}"
        tell = vm.get
    # One of: HOST, HOST:PORT, or NAME:ID:ADDRESS, a worker.
    hosts = [parts[2] if len(parts) == 3 else parts[0] for parts in (one.strip().split(":") for one in workers.split(","))]
    slices, slice_id = int(tell("MEGASCALE_NUM_SLICES") or 1), int(tell("MEGASCALE_SLICE_ID") or 0)
    first = (tell("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Cluster(
        f"{first}:{_port(environ, TPU_PORT)}",
        len(hosts) * slices,
        worker if worker == -1 else worker + slice_id * len(hosts),
        f"{source} ({slices} slices of {len(hosts)} hosts)" if slices > 1 else source,
        hosts=tuple(hosts) if slices == 1 else (),
        launch=launch,
    )


def _kubernetes(environ: Mapping[str, str], ask: Callable[[], tuple[str, int] | None]) -> Cluster | None:
    """A pod of an indexed Job or JobSet."""
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return None
    source, answer = "Kubernetes", ask()
    if answer is None:
        source += ", which tells more with `pip install jax[k8s]`; a Job whose pods work alone says --num_processes=1"
    coordinator, num_processes = answer or ("", -1)
    index = _number(environ, "JOB_COMPLETION_INDEX")
    return Cluster(coordinator, num_processes, index, source, launch="{command}, in every pod of the Job")


def _has_tpu_chips() -> bool:
    """Whether a PCI device of Google's is neither storage nor network: asks nobody, takes a millisecond."""
    for vendor in pathlib.Path("/sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            kind = vendor.with_name("class").read_text()[:4]
            if vendor.read_text().strip() == "0x1ae0" and kind not in ("0x01", "0x02"):
                return True
    return False


def command_line(cluster: Cluster) -> str:
    """What to run on all hosts: this process's own command line, without what differs between them."""
    line = re.sub(r"--?(coordinator|num_processes|process_id)(=\S+| +[^\s-]\S*)", "", shlex.join(sys.orig_argv))
    command = " ".join(line.split())
    if cluster.launch:
        return cluster.launch.format(command=command, remote=shlex.quote(f"cd {shlex.quote(os.getcwd())} && {command}"))
    flags = f"--coordinator={cluster.coordinator} --num_processes={cluster.num_processes} --process_id=ID"
    return f"{command} {flags}, ID from 0 to {cluster.num_processes - 1}"
