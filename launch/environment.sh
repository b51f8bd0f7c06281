#!/usr/bin/env bash
# Sourced by the other scripts: with --dry-run first they show their commands and run none. Paths start at the root.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; else dry=; fi
fail() { echo "$1" >&2 && exit 2; }
usage() {  # usage "$@": a configuration comes first, and the run's folder is named
  [[ -n "${1:-}" && "$1" != -* && " $*" == *" --output"[\ =]* ]] ||
    fail "usage: launch/${0##*/} [--dry-run] CONFIG --output DIR ..."
}
quote() {  # words as a shell reads them back
  local word words=() mark="'" escaped="'\\''"
  for word; do
    case $word in "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$mark/$escaped}'" ;; esac
    words+=("$word")
  done
  echo "${words[*]}"
}
run() { if [ -n "$dry" ]; then echo "+ $(quote "$@")"; else echo "+ $(quote "$@")" >&2 && "$@"; fi; }
install() {  # install EXTRAS: into the active environment, else .venv; once for each content of setup.cfg
  if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    for python in .venv/bin/python python3 python3.13 python3.12 python3.11 none; do
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$python" != none ] || fail "launch: Python 3.11 or newer is needed and was not found; install it first"
    [ -x .venv/bin/python ] || run "$python" -m venv .venv
    run . .venv/bin/activate
  fi
  local stamp="${VIRTUAL_ENV:-${CONDA_PREFIX:-.venv}}/ernie-jax${1//[^a-z]/-}.installed"
  cmp -s setup.cfg "$stamp" || run python -m pip install --quiet --disable-pip-version-check -e ".$1"
  [ -n "$dry" ] || cp setup.cfg "$stamp"
}
