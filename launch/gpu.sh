#!/usr/bin/env bash
# One NVIDIA GPU, the first unless CUDA_VISIBLE_DEVICES says otherwise: bash launch/gpu.sh CONFIG --output DIR ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
install "[cuda]"
run env CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" ernie-jax run "$@"
