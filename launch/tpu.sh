#!/usr/bin/env bash
# All chips of one TPU host, driven by one process: bash launch/tpu.sh CONFIG --output DIR ...   (a pod: tpu_pod.sh)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
install "[tpu]"
run ernie-jax run "$@"
