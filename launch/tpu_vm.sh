#!/usr/bin/env bash
# Runs one program on every host of a Cloud TPU slice at once, from the machine you sit at. docs/launch.md explains.
# shellcheck disable=SC2329  # functions are called by name: on workers, and by traps
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/tpu_vm.sh --name NAME [option...] ACTION... [-- PROGRAM [ARGUMENT...]]

actions, in this order whatever the order they are given in:
  create    a TPU VM slice of that name, or use the one there is
  install   this repository and its environment on all workers (~/llama_jax/code is replaced as a whole)
  run       PROGRAM on all workers at once, in ~/llama_jax/code; worker 0 prints here, Ctrl-C stops it on all of them
  stop      the program that an earlier `run` left behind (a lost connection leaves it running)
  delete    the slice, at the end, however the rest went

options:
  --name NAME          of the slice
  --project PROJECT    default: CLOUDSDK_CORE_PROJECT, then gcloud's configuration
  --zone ZONE          default: CLOUDSDK_COMPUTE_ZONE, then gcloud's configuration
  --accelerator TYPE   for create: v5litepod-16, v6e-16, v5p-16, v4-16, ...
  --runtime VERSION    for create; default: what Google names for JAX on that accelerator
  --spot               cheaper, may be taken away
  --reserved           from your reservation
  --queued             ask with a queued resource and wait until it is there
  --create-flag FLAG   one more flag for gcloud's create, such as --network=NAME; may be repeated
  --internal-ip        connect by internal addresses
  --ref REF            for install: branch, tag or commit; default HEAD
  --clone URL          for install: the workers clone URL; otherwise REF is copied from this checkout
  --dry-run            print the commands instead of running them
  --help

example:
  launch/tpu_vm.sh --name llama --zone us-west4-a --accelerator v5litepod-16 --spot create install run -- \
      python -m infer.sample --config=configs/sample.py --config.mesh.tensor=16 \
      --config.checkpoint=/mnt/checkpoints/llama-2-7b --prompt "Once upon a time"

The exit code is the program's: that of the first worker on which it was not 0.
It is 2 for a wrong command line, 130 after Ctrl-C, 75 when a program is running there already.
EOF
}

# What runs on the workers. These functions are sent there by their text (`declare -f`), so each stands alone.

on_worker_install() { # URL REF: the code and its environment; without URL the code is the archive copied before
    set -euo pipefail
    local url=$1 ref=$2 base=$HOME/llama_jax python found="" version
    rm -rf "$base/code.new"
    mkdir -p "$base/code.new"
    if [ -n "$url" ]; then
        git clone --quiet "$url" "$base/code.new"
        git -C "$base/code.new" checkout --quiet "$ref"
    else
        tar -xzf "$HOME/llama_jax.tar.gz" -C "$base/code.new"
    fi
    rm -rf "$base/code"
    mv "$base/code.new" "$base/code"
    cd "$base/code"
    if [ ! -x "$base/venv/bin/python" ]; then
        for python in python3.13 python3.12 python3.11; do
            if [ -z "$found" ] && "$python" -c 'import ensurepip, venv' 2>/dev/null; then found=$python; fi
        done
        if [ -n "$found" ]; then
            "$found" -m venv "$base/venv"
        else # Cloud TPU images come with Python 3.10
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --seed --python 3.12 "$base/venv"
        fi
    fi
    "$base/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    version=$("$base/venv/bin/python" -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
    "$base/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements.txt "jax[tpu]==$version"
    # JAX asks for it on v5e and later: the TPU runtime then starts much faster
    sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null || true
}

on_worker_run() { # PROGRAM...: worker 0 prints, the others write ~/llama_jax/log and show its end when they fail
    set -uo pipefail
    local base=$HOME/llama_jax worker status=0
    local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
    worker=$(curl -sf -H 'Metadata-Flavor: Google' "$metadata") || worker=0
    if [ -s "$base/pid" ] && kill -0 -- "-$(cat "$base/pid")" 2>/dev/null; then
        echo "error: worker $worker: a program is running already; launch/tpu_vm.sh ... stop ends it" >&2
        exit 75
    fi
    cd "$base/code" || { echo "error: worker $worker: nothing is installed; launch/tpu_vm.sh ... install first" >&2; exit 1; }
    export PATH="$base/venv/bin:$PATH"
    set -m # a process group of its own, for stop to signal; and Ctrl-C is not ignored, as in a background job it would be
    if [ "$worker" = 0 ]; then
        "$@" </dev/null &
    else
        "$@" </dev/null >"$base/log" 2>&1 &
    fi
    echo $! >"$base/pid"
    wait $! || status=$?
    rm -f "$base/pid"
    if [ "$worker" != 0 ] && [ "$status" != 0 ]; then
        echo "worker $worker: exit code $status; the end of its ~/llama_jax/log:" >&2
        tail -n 20 "$base/log" | sed "s/^/worker $worker: /" >&2
    fi
    exit "$status"
}

on_worker_stop() { # interrupts what runs, which may then save; kills what has not ended after a minute
    local pid signal
    pid=$(cat "$HOME/llama_jax/pid" 2>/dev/null) || exit 0
    for signal in INT TERM KILL; do
        kill "-$signal" -- "-$pid" 2>/dev/null || break
        for _ in {1..60}; do
            kill -0 -- "-$pid" 2>/dev/null || break 2
            sleep 0.5
        done
    done
    rm -f "$HOME/llama_jax/pid"
}

# What runs here.

say() { echo "tpu_vm: $*" >&2; }

fail() {
    echo "error: $*" >&2
    exit 2
}

compose() { # ARGUMENT...: sets `command` to gcloud's on this project and zone
    command=(gcloud compute tpus "$@" "--project=$project" "--zone=$zone")
}

cloud() { # ARGUMENT...: runs it, or prints it
    compose "$@"
    if [ "$dry_run" = yes ]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

remote() { # FUNCTION ARGUMENT...: the command line that runs it on a worker
    local script quote="'\\''"
    script="$(declare -f "$1")
$(printf '%q ' "$@")"
    printf "bash -c '%s'" "${script//\'/$quote}"
}

ssh_all() { # FUNCTION ARGUMENT...: sets `arguments` to those of gcloud that run it on all workers
    arguments=(tpu-vm ssh "$name" --worker=all)
    [ "$internal_ip" = no ] || arguments+=(--internal-ip)
    arguments+=("--command=$(remote "$@")")
}

configured() { # PROPERTY: what gcloud's configuration says, if anything
    command -v gcloud >/dev/null || return 0
    gcloud config get-value "$1" 2>/dev/null || true
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --name | --project | --zone | --accelerator | --runtime | --create-flag | --ref | --clone)
                [ $# -gt 1 ] || fail "$1 needs a value (--help lists the options)"
                ;;
        esac
        case $1 in
            --name) name=$2 && shift ;;
            --project) project=$2 && shift ;;
            --zone) zone=$2 && shift ;;
            --accelerator) accelerator=$2 && shift ;;
            --runtime) runtime=$2 && shift ;;
            --create-flag) create_flags+=("$2") && shift ;;
            --ref) ref=$2 && shift ;;
            --clone) clone=$2 && shift ;;
            --spot | --reserved) create_flags+=("$1") ;;
            --queued) queued=yes ;;
            --internal-ip) internal_ip=yes ;;
            --dry-run) dry_run=yes ;;
            --help | -h) usage && exit 0 ;;
            create | install | run | stop | delete) actions="$actions$1 " ;;
            --)
                shift
                program=("$@")
                return
                ;;
            *) fail "unknown option or action $1 (--help lists them; the program goes after --)" ;;
        esac
        shift
    done
}

wanted() { [[ $actions == *" $1 "* ]]; }

check() {
    [ "$actions" != " " ] || fail "nothing to do: name one or more of create, install, run, stop, delete (--help)"
    [ -n "$name" ] || fail "no slice: --name NAME"
    if wanted run; then
        [ ${#program[@]} -gt 0 ] || fail "run what? put the program after --: run -- python -m infer.sample ..."
    else
        [ ${#program[@]} -eq 0 ] || fail "a program after --, but no action run before it"
    fi
    if wanted create && [ -z "$accelerator" ]; then fail "create needs --accelerator TYPE, such as v5litepod-16"; fi
    if [ "$dry_run" = no ] && ! command -v gcloud >/dev/null; then
        fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install, then run: gcloud auth login"
    fi
    project=${project:-${CLOUDSDK_CORE_PROJECT:-$(configured project)}}
    zone=${zone:-${CLOUDSDK_COMPUTE_ZONE:-$(configured compute/zone)}}
    [ -n "$project" ] || fail "no project: --project PROJECT, or once: gcloud config set project PROJECT"
    [ -n "$zone" ] || fail "no zone: --zone ZONE, or once: gcloud config set compute/zone ZONE"
    if [ -z "$runtime" ]; then
        case $accelerator in
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            *) runtime=tpu-ubuntu2204-base ;;
        esac
    fi
}

do_create() {
    local state flags=("--accelerator-type=$accelerator" ${create_flags[@]+"${create_flags[@]}"})
    if [ "$dry_run" = no ] && state=$(cloud tpu-vm describe "$name" '--format=value(state)' 2>/dev/null); then
        [ "$state" = READY ] || fail "$name exists and is $state, not READY: delete it, or wait and try again"
        say "using $name, which exists"
        return
    fi
    if [ "$queued" = no ]; then
        cloud tpu-vm create "$name" "${flags[@]}" "--version=$runtime"
        return
    fi
    cloud queued-resources create "$name" "--node-id=$name" "${flags[@]}" "--runtime-version=$runtime"
    while [ "$dry_run" = no ]; do
        state=$(cloud queued-resources describe "$name" '--format=value(state.state)')
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPEND* | DELETING) fail "the queued resource $name is $state: delete it and ask again" ;;
        esac
        say "$name is $state"
        sleep "${TPU_VM_POLL_SECONDS:-30}"
    done
}

do_install() {
    local commit root archive=$scratch/llama_jax.tar.gz copy=(tpu-vm scp)
    if [ -z "$clone" ]; then
        root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
        commit=$(git -C "$root" rev-parse --verify --quiet "$ref^{commit}" 2>/dev/null) ||
            fail "$root has no commit $ref: --ref REF, or --clone URL"
        git -C "$root" diff --quiet HEAD || say "changes that are not committed are not copied"
        git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
        [ "$internal_ip" = no ] || copy+=(--internal-ip)
        cloud "${copy[@]}" "$archive" "$name:llama_jax.tar.gz" --worker=all
    fi
    ssh_all on_worker_install "$clone" "$ref"
    cloud "${arguments[@]}"
}

interrupted() {
    interrupts=$((interrupts + 1))
    if [ "$interrupts" -gt 1 ]; then
        say "leaving; what still runs there is ended by the action stop"
        kill "$child" 2>/dev/null || true
        return
    fi
    say "stopping the program on all workers; Ctrl-C again leaves at once"
    ssh_all on_worker_stop
    cloud "${arguments[@]}" || say "that failed; try the action stop"
}

do_run() { # sets `status`
    ssh_all on_worker_run "${program[@]}"
    if [ "$dry_run" = yes ]; then
        cloud "${arguments[@]}"
        return
    fi
    compose "${arguments[@]}"
    interrupts=0
    trap interrupted INT TERM
    "${command[@]}" </dev/null &
    child=$!
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # the wait was interrupted, the program is ending
        status=0
        wait "$child" || status=$?
    done
    trap - INT TERM
    [ "$interrupts" = 0 ] || status=130
}

do_delete() {
    if [ "$queued" = yes ] || { [ "$dry_run" = no ] && cloud queued-resources describe "$name" >/dev/null 2>&1; }; then
        cloud queued-resources delete "$name" --force --quiet
    else
        cloud tpu-vm delete "$name" --quiet
    fi
}

finish() {
    local code=$?
    rm -rf "$scratch"
    if wanted delete && ! do_delete; then
        say "$name could not be deleted and still costs money"
        [ "$code" != 0 ] || code=1
    fi
    exit "$code"
}

name="" project="" zone="" accelerator="" runtime="" clone="" ref=HEAD
queued=no internal_ip=no dry_run=no actions=" " status=0
create_flags=() program=()
parse "$@"
check
scratch=$(mktemp -d)
trap finish EXIT
if wanted create; then do_create; fi
if wanted install; then do_install; fi
if wanted run; then do_run; fi
if wanted stop; then
    ssh_all on_worker_stop
    cloud "${arguments[@]}"
fi
exit "$status"
