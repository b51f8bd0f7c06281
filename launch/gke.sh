#!/usr/bin/env bash
# A TPU slice on GKE, from any machine with kubectl: IMAGE=... bash launch/gke.sh CONFIG --output /runs/NAME ...
# Puts the image (launch/Dockerfile) and the arguments into launch/jobset.yaml, which says what the cluster needs.
# A lost host restarts all, and they continue; after `kubectl delete jobset ernie-jax` the same command continues, too.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
[[ " $* " != *" --fresh "* ]] || fail "launch: --fresh would start anew at every restart; name a new --output instead"
[ -n "${IMAGE:-}" ] || fail "launch: set IMAGE to the image that was built with launch/Dockerfile and pushed"
[[ " $*" == *" --output"[\ =]/runs/* ]] || fail "launch: --output must be in /runs, the volume that all hosts share"
args="[$(printf '%s\n' run "$@" --multihost | sed 's/[\\"]/\\&/g; s/.*/"&"/' | paste -s -d , -)]"
manifest=$(image="$IMAGE" args="$args" awk '
  match($0, /^ *(image|args): /) { $0 = substr($0, 1, RLENGTH) ENVIRON[$1 == "image:" ? "image" : "args"] } 1
' launch/jobset.yaml)
run kubectl apply -f - <<<"$manifest"
[ -z "$dry" ] || echo "$manifest"
