#!/usr/bin/env bash
# The main job on this machine: installs, then trains all three architectures on real text, evaluates, and searches.
# Further arguments go to `ernie-jax run`, such as: bash launch/quickstart.sh --seed 1 --output runs/seed1
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install ""
run ernie-jax run configs/quickstart.py "$@"
