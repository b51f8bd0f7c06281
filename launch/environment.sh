# Sourced by the other scripts: an environment with this package in it. Uses the active one, else makes and reuses .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    for python in python3 python3.13 python3.12 python3.11 none; do
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$python" != none ] || { echo "launch: Python 3.11 or newer is needed and was not found; install it first" >&2; exit 2; }
    echo "+ $python -m venv .venv" >&2
    "$python" -m venv .venv
  fi
  . .venv/bin/activate
fi
install() {  # install EXTRAS: once for each content of setup.cfg
  local stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/ernie-jax${1//[^a-z]/-}.installed"
  if ! cmp -s setup.cfg "$stamp"; then
    echo "+ pip install -e .$1" >&2
    python -m pip install --quiet --disable-pip-version-check -e ".$1"
    cp setup.cfg "$stamp"
  fi
}
