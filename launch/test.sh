#!/usr/bin/env bash
# Every check on this machine: installs, then lint, format, types and tests. Arguments go to pytest; with --cov it also
# measures what is covered, and takes half as long again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "[test]"
run ruff check
run ruff format --check
run mypy
run python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
