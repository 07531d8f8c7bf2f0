"""Several processes as one job: where they meet, what process 0 tells the others, and that none waits for one that has ended.

    with distributed.join(coordinator, num_processes, process_id):
        prompts = distributed.broadcast(read_prompts() if distributed.is_main() else None)

`jax.distributed` alone does not do. When a process is missing, or process 0 is gone, jax ends the process from C++ with a
stack trace (no Python callback may be set: std::bad_cast); when one raises, the others hang in their collective until the
shutdown barrier gives up after 300 s; SIGTERM no longer ends a process; a prompt can only be broadcast once there is a mesh
and its length is known everywhere; and the key-value store and its beats are private (tried with jax 0.10.2 and 0.12.0).

So the processes first meet at process 0 by plain TCP, on the coordinator's port, and stay connected. A process that raises
says so there before it ends; the connection of one that is killed closes; a machine that stops or loses its network sends no
more beats. In each case a thread of every other process names it and ends its own with ExitCode.PEER_DIED, wherever the main
thread is. jax's own service listens on process 0's loopback and is reached through the same port: that one has to be open
(collectives open others of their own: gloo's, NCCL's, those between slices), and a broken connection is ours to report. Only
Kubernetes is asked by a private part of jax.

Nothing is encrypted or authenticated, here or in jax: the port belongs in a private network.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from llama_jax.cluster import Cluster, find_cluster
from llama_jax.job import Job

TIMEOUT_SECONDS = 300.0  # for all processes to come
HEARTBEAT_SECONDS = 60.0  # of silence, until a machine counts as gone; a process that ends or is killed is noticed at once


def is_main() -> bool:
    """Whether this is process 0, which alone reads prompts, prints and writes; True in a process that is alone."""
    return _job is None or _job.cluster.process_id == 0


def num_processes() -> int:
    return 1 if _job is None else _job.cluster.num_processes


def note(message: str) -> None:
    """A line on stderr, from process 0 only."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def broadcast(value: Any) -> Any:
    """Process 0's value, in every process; the others' own is ignored. All processes call it, in the same order.

    It needs no devices and no mesh, and the others need not know its size.

    Args:
        value: bytes, or what JSON can hold (a tuple arrives as a list).
    """
    return value if _job is None else _job.broadcast(value)


@contextlib.contextmanager
def join(
    coordinator: str = "",
    num_processes: int = -1,
    process_id: int = -1,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Iterator[Cluster | None]:
    """Around a program's main, before it touches a device: takes part in the job that find_cluster finds; alone, does nothing.

    In a job only sys.stdout of process 0 goes anywhere: not that of the others, nor what C++ prints (gloo's greetings). A
    block that ends normally waits for the others to end theirs. One that raises tells the others, prints as run_command does
    and ends the process there and then: what Python does at exit would wait for collectives that nobody else joins.

    Args:
        timeout_seconds: for all processes to come.
        heartbeat_seconds: of silence, until the machine of a process counts as gone.

    Raises:
        LlamaError: flags do not fit together (BAD_REQUEST), or not all processes came (NO_COORDINATOR).
    """
    global _job
    cluster = find_cluster(coordinator, num_processes, process_id)
    if cluster is None:
        yield None
        return
    import jax

    job = Job(cluster, heartbeat_seconds)
    try:
        job.meet(timeout_seconds)
    except BaseException:
        job.close()
        raise
    _job = job
    try:
        _initialize_jax(cluster, job.jax_address, heartbeat_seconds)
        _keep_stdout(cluster.process_id == 0)
        ended = None
        try:
            yield cluster
        except SystemExit as error:
            if error.code:
                raise
            ended = error
        job.finish()
        jax.distributed.shutdown()
        job.close()
    except BaseException as error:
        job.fail(error)
    if ended is not None:
        raise ended


_job: Job | None = None  # like jax.distributed's, one in the life of a process


def _initialize_jax(cluster: Cluster, address: str, heartbeat_seconds: float) -> None:
    import jax

    # With it SIGTERM would only be noted, for jax.experimental.multihost_utils.reached_preemption_sync_point.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)  # a warning, of what the next line prevents
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # gRPC would look for this machine behind http_proxy
    jax.distributed.initialize(
        address,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=None if cluster.local_device == -1 else [cluster.local_device],
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=int(10 * heartbeat_seconds) + 60,  # ours come first: jax's end the process from C++
        shutdown_timeout_seconds=int(heartbeat_seconds) + 10,
    )


def _keep_stdout(is_main: bool) -> None:
    """File descriptor 1 becomes void, with what C++ writes there; process 0's sys.stdout stays where it was."""
    sys.stdout.flush()
    void = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1) if is_main else os.dup(void)
    os.dup2(void, 1)
    os.close(void)
    buffering, encoding, errors = 1 if sys.stdout.isatty() else -1, sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(kept, "w", buffering, encoding, errors)
