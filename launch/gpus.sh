#!/usr/bin/env bash
# All NVIDIA GPUs of one host, driven by one process: bash launch/gpus.sh CONFIG --output DIR ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
install "[cuda]"
run ernie-jax run "$@"
