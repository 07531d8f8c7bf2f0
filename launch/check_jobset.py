"""Checks a JobSet for a TPU slice before it is submitted: python launch/check_jobset.py launch/gke_jobset.yaml

What the API server would refuse is only a part of what can be wrong: a slice whose hosts, chips and topology disagree is
accepted and then waits for ever. With the package kubernetes-validate installed, the Job inside is held against the schema of
Kubernetes, too.
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# Per accelerator: dimensions of its topologies, and chips that a host can have, most of them for several hosts first.
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {
    "tpu-v4-podslice": (3, (4,)),
    "tpu-v5-lite-podslice": (2, (4, 8, 1)),
    "tpu-v5p-slice": (3, (4,)),
    "tpu-v6e-slice": (2, (4, 8, 1)),
    "tpu7x": (3, (4,)),
}
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
ACCELERATOR, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
CHIPS = "google.com/tpu"
SET_BY_GKE = re.compile(r"TPU_WORKER_(ID|HOSTNAMES)|MEGASCALE_\w+")
KEYS = {  # of jobset.x-k8s.io/v1alpha2; below them it is Kubernetes
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy", "suspend",
        "ttlSecondsAfterFinished", "volumeClaimPolicies",
    },
    "spec.network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.replicatedJobs[0]": {"dependsOn", "groupName", "name", "replicas", "template"},
    "spec.replicatedJobs[0].template": {"metadata", "spec"},
}  # fmt: skip


def at(tree: Any, path: str) -> Any:
    """The part of a JobSet at a path such as spec.replicatedJobs[0].name; {} where there is none."""
    for key in re.findall(r"[^.\[\]]+", path):
        if isinstance(tree, list):
            tree = tree[int(key)] if int(key) < len(tree) else {}
        else:
            tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return {} if tree is None else tree


def problems(jobset: Any) -> Iterator[str]:
    """What is wrong with a JobSet, one sentence each."""
    for path, known in KEYS.items():
        part = at(jobset, path)
        if not isinstance(part, dict):
            yield f"{path or 'the document'} is {part!r}, expected a mapping"
            return
        for key in part.keys() - known:
            yield f"unknown key {f'{path}.{key}'.lstrip('.')}; known there: {', '.join(sorted(known))}"
    for path, expected in {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}.items():
        if at(jobset, path) != expected:
            yield f"{path} is {at(jobset, path) or 'absent'}, expected {expected}"
    if len(at(jobset, "spec.replicatedJobs")) != 1:
        yield "spec.replicatedJobs has not one entry: the slices run the same program, so they are replicas of one job"
        return
    yield from _naming(jobset)
    yield from _placement(jobset)
    yield from _job(at(jobset, "spec.replicatedJobs[0].template.spec"))
    yield from _containers(jobset)


def _naming(jobset: Any) -> Iterator[str]:
    job = at(jobset, "spec.replicatedJobs[0]")
    for path, name in {"metadata.name": at(jobset, "metadata.name"), "replicatedJobs[0].name": at(job, "name")}.items():
        if not (isinstance(name, str) and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)):
            yield f"{path} is {name or 'absent'!r}, expected lower-case letters, digits and dashes, for host names"
    hosts = at(job, "template.spec.parallelism") or 1
    longest = f"{at(jobset, 'metadata.name')}-{at(job, 'name')}-{(at(job, 'replicas') or 1) - 1}-{hosts - 1}"
    if len(longest) > 63:
        yield f"host names such as {longest} are longer than 63 characters: shorten metadata.name"
    for key in ("enableDNSHostnames", "publishNotReadyAddresses"):
        if at(jobset, f"spec.network.{key}") is False:
            yield f"spec.network.{key} is false: the hosts could not find the coordinator while they start"


def _placement(jobset: Any) -> Iterator[str]:
    if at(jobset, "metadata.annotations").get(EXCLUSIVE) != "cloud.google.com/gke-nodepool":
        yield f"metadata.annotations has no {EXCLUSIVE}: cloud.google.com/gke-nodepool, so a slice could span node pools"
    job = at(jobset, "spec.replicatedJobs[0].template.spec")
    selector = at(job, "template.spec.nodeSelector")
    accelerator, topology = selector.get(ACCELERATOR), selector.get(TOPOLOGY)
    if accelerator not in ACCELERATORS:
        yield f"nodeSelector {ACCELERATOR} is {accelerator}, expected one of {', '.join(ACCELERATORS)}"
        return
    dimensions, chips_of_a_host = ACCELERATORS[accelerator]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), str(topology)):
        yield f"nodeSelector {TOPOLOGY} is {topology}, expected {dimensions} numbers with x between them for {accelerator}"
        return
    chips = math.prod(map(int, topology.split("x")))
    limits = [at(container, "resources.limits").get(CHIPS) for container in at(job, "template.spec.containers") or []]
    per_host = next((int(limit) for limit in limits if limit), 0)
    if per_host not in chips_of_a_host:
        yield f"resources.limits {CHIPS} is {per_host or 'absent'}, expected {' or '.join(map(str, chips_of_a_host))}"
        return
    hosts = chips // per_host
    for key in ("parallelism", "completions"):
        if at(job, key) != hosts or hosts * per_host != chips:
            yield f"{key} is {at(job, key) or 'absent'}, expected {hosts}: {topology} is {chips} chips, {per_host} on each host"


def _job(job: Any) -> Iterator[str]:
    expected = {
        "completionMode": ("Indexed", "a host finds its number by it"),
        "backoffLimit": (0, "one dead host ends the slice"),
        "template.spec.restartPolicy": ("Never", "a host alone cannot join the others again"),
    }
    for path, (value, reason) in expected.items():
        if at(job, path) != value:
            yield f"{path} is {'absent' if at(job, path) == {} else at(job, path)}, expected {value}: {reason}"
    pod = at(job, "template.spec")
    if pod.get("hostNetwork") and pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
        yield "hostNetwork needs dnsPolicy: ClusterFirstWithHostNet, or hosts do not find each other by name"


def _containers(jobset: Any) -> Iterator[str]:
    replicas = at(jobset, "spec.replicatedJobs[0].replicas") or 1
    pod = at(jobset, "spec.replicatedJobs[0].template.spec.template.spec")
    with_chips = [c for c in at(pod, "containers") or [] if CHIPS in at(c, "resources.limits")]
    if len(with_chips) != 1:
        yield f"{len(with_chips)} containers have {CHIPS} in their limits, expected 1"
        return
    container = with_chips[0]
    requests, limits = at(container, "resources.requests"), at(container, "resources.limits")
    if requests.get(CHIPS, limits[CHIPS]) != limits[CHIPS]:
        yield f"resources.requests {CHIPS} is {requests[CHIPS]} and limits {limits[CHIPS]}: they must be equal"
    ports = {port.get("containerPort") for port in at(container, "ports") or []}
    for port, use in {8471: "hosts of a slice talk over it", 8482: "JAX's coordinator listens on it"}.items():
        if port not in ports:
            yield f"container port {port} is missing: {use}"
    environment = {variable["name"]: variable.get("value") for variable in at(container, "env") or []}
    for name in filter(SET_BY_GKE.fullmatch, environment):
        yield f"env sets {name}, which GKE sets itself"
    if not str(environment.get("JAX_PLATFORMS")).startswith("tpu"):
        yield "env has no JAX_PLATFORMS=tpu,cpu: a host without chips would compute on its CPU"
    line = " ".join(map(str, [*(at(container, "command") or []), *(at(container, "args") or [])]))
    slices = re.search(r"--config\.mesh\.dcn_data[= ](\d+)", line)
    if int(slices[1] if slices else 1) != replicas:
        yield f"{replicas} slices, but the program is told of {slices[1] if slices else 1}: --config.mesh.dcn_data={replicas}"
    mounts = {mount["name"] for mount in at(container, "volumeMounts") or []}
    for name in mounts - {volume["name"] for volume in at(pod, "volumes") or []}:
        yield f"volume {name} is mounted and not defined"


def against_kubernetes(jobset: Any) -> str | None:
    """What the schema of Kubernetes says of the Job inside: "" when nothing, None when kubernetes-validate is not installed."""
    try:
        import kubernetes_validate
    except ImportError:
        return None
    template = at(jobset, "spec.replicatedJobs[0].template.spec")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": template}
    try:
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"spec.replicatedJobs[0].template.spec is no Job: {'.'.join(map(str, error.path))}: {error.message}"
    return ""


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} FILE...")
    failed = False
    for file in sys.argv[1:]:
        try:
            documents = list(yaml.safe_load_all(Path(file).read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            sys.exit(f"{file}: {error}")
        if len(documents) != 1:
            sys.exit(f"{file}: {len(documents)} documents, expected one JobSet")
        found = list(problems(documents[0]))
        schema = against_kubernetes(documents[0])
        for problem in [*found, *([schema] if schema else [])]:
            failed = True
            print(f"{file}: {problem}", file=sys.stderr)
        if not found and not schema:
            extra = " (kubernetes-validate is not installed: the Job's schema was not checked)" if schema is None else ""
            print(f"{file}: good{extra}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
