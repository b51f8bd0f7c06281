#!/usr/bin/env bash
# Every check on this machine: installs, then lint, format, types and tests with coverage. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install "[test]"
set -x
ruff check
ruff format --check
mypy
python -m pytest -n 2 --dist loadfile --cov --cov-report=term "$@"
