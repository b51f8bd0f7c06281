#!/usr/bin/env bash
# A Cloud TPU pod, from a machine with gcloud: TPU_NAME=... TPU_ZONE=... bash launch/tpu_pod.sh CONFIG --output DIR ...
# Copies the checked-out commit to every worker and starts launch/tpu.sh there. Workers need Python 3.11 or newer; DIR
# must be on storage that all of them mount under the same path (Filestore, say). Keep the connection: start it in tmux.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
[ -n "${TPU_NAME:-}" ] && [ -n "${TPU_ZONE:-}" ] || fail "launch: set TPU_NAME and TPU_ZONE to the pod's name and zone"
[ -z "$(git status --porcelain 2>/dev/null)" ] || echo "launch: warning: only what is committed is copied" >&2
place=(--zone "$TPU_ZONE" --worker=all)
unpack="mkdir -p ernie_jax && tar -xzf ernie_jax.tar.gz -C ernie_jax && cd ernie_jax"
run mkdir -p build
run git archive --output build/ernie_jax.tar.gz HEAD
run gcloud compute tpus tpu-vm scp build/ernie_jax.tar.gz "$TPU_NAME:" "${place[@]}"
run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" \
  --command "$unpack && bash launch/tpu.sh $(quote "$@") --multihost"
