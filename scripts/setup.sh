#!/usr/bin/env bash
# Makes .venv with everything this project needs: scripts/setup.sh [cpu|cuda]
#
# Without an argument it keeps the kind of an existing .venv. If there is no .venv, it takes cuda if
# a GPU is listed, else cpu. A rerun with nothing to do ends at once. It reads PYTHON (which Python
# to use) and TORCH_CPU_INDEX (see .env.example) from the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV="uv==0.13.9"
VENV_PYTHON=.venv/bin/python
STAMP=.venv/setup.stamp

say() { printf '[setup] %s\n' "$*"; }
fail() {
  printf '[setup] error: %s\n' "$*" >&2
  exit 1
}

# The kind of an existing .venv, even if it is half-finished or made by something else. The kind is
# read from torch: uv accepts an installed 2.13.0+cpu as the 2.13.0 of the CUDA lock, and would
# leave it in place.
venv_kind() {
  if compgen -G ".venv/lib/python*/site-packages/torch-*+cpu.dist-info" >/dev/null; then
    echo cpu
  elif compgen -G ".venv/lib/python*/site-packages/torch-*.dist-info" >/dev/null; then
    echo cuda
  fi
}

machine_kind() {
  if [[ "$(nvidia-smi -L 2>/dev/null || true)" == *"GPU "* ]]; then echo cuda; else echo cpu; fi
}

# Changes with everything that an installation depends on:
# - the folder and our packages, because an editable installation maps each package by its path,
# - what is installed, in case somebody removed a package or changed its version.
fingerprint() {
  {
    echo "$kind $PWD"
    ls -d vllm/*/__init__.py vllm/vllm/*/__init__.py \
      .venv/lib/python*/site-packages/*.dist-info 2>/dev/null || true
    cat "$lock" vllm/pyproject.toml scripts/setup.sh scripts/check_install.py
  } | sha256sum | cut -d' ' -f1
}

# 3.11 comes first, because the tests run on it. Each candidate is tried: a name on the PATH may be
# a shim of a missing version, and a distribution's Python may lack ensurepip.
find_python() {
  local candidates=(python3.11 python3.12 python3.13 python3.14 python3 python) candidate
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 to 3.14 with venv among: ${candidates[*]}. Install one or set PYTHON."
}

make_venv() {
  if [[ -n "$present" && "$present" != "$kind" ]]; then
    say "rebuilding .venv: it is for $present and $kind is wanted"
  elif "$VENV_PYTHON" -c 'import sys, pip; assert sys.version_info >= (3, 11)' 2>/dev/null; then
    return
  fi
  local python
  python=$(find_python)
  say "making .venv with $("$python" --version) ($python)"
  "$python" -m venv --clear .venv
}

pip_install() { "$VENV_PYTHON" -m pip install --no-input --disable-pip-version-check "$@"; }
uv_install() { "$VENV_PYTHON" -m uv pip install --python "$VENV_PYTHON" --no-deps "$@"; }

# pip comes first, because it may know a source for the CPU wheel that uv does not read. The extra
# index is used only if needed, and for this one package: with it, pip looks up everything twice.
install_cpu_torch() {
  local torch errors
  torch=$(grep -oE '^torch==[^ ]+' "$lock")
  say "installing $torch with pip"
  if errors=$(pip_install -q --no-deps "$torch" 2>&1); then return; fi
  [[ "$errors" == *"No matching distribution"* ]] || fail "pip could not install $torch"$'\n'"$errors"
  if [[ -z "${TORCH_CPU_INDEX:-}" && -f .env ]]; then
    TORCH_CPU_INDEX=$(sed -n 's/^TORCH_CPU_INDEX=//p' .env | tail -n 1 | tr -d "\"' \r")
  fi
  [[ -n "${TORCH_CPU_INDEX:-}" ]] || fail "pip finds no $torch for $("$VENV_PYTHON" --version):" \
    "set TORCH_CPU_INDEX, in the environment or in .env, to the address of PyTorch's CPU wheel" \
    "index (the --index-url that PyTorch's install page shows for pip and CPU)"
  say "pip does not know $torch: asking the index in TORCH_CPU_INDEX"
  pip_install -q --no-deps --extra-index-url "$TORCH_CPU_INDEX" "$torch" ||
    fail "the index in TORCH_CPU_INDEX gave no $torch either"
}

# Two runs at once would write into the same .venv. The script itself serves as the lock file.
exec 9<scripts/setup.sh
flock 9

present=$(venv_kind)
detected=$(machine_kind)
kind=${1:-${present:-$detected}}
case "$kind" in
  cpu) lock=requirements-cpu.lock ;;
  cuda) lock=requirements.lock ;;
  *) fail "unknown kind '$kind': scripts/setup.sh [cpu|cuda]" ;;
esac
[[ "$kind" == "$detected" ]] ||
  say "note: .venv is for $kind, this machine would get $detected (scripts/setup.sh $detected)"

if [[ -x $VENV_PYTHON && "$(cat $STAMP 2>/dev/null || true)" == "$(fingerprint)" ]]; then
  say ".venv ($kind) is up to date"
  exit 0
fi

make_venv
rm -f $STAMP
quiet=(--quiet)
[[ ! -t 2 ]] || quiet=() # uv's progress bars, if a terminal shows them
pip_install -q "$UV"
[[ "$kind" != cpu ]] || install_cpu_torch
say "installing $lock with $UV"
uv_install "${quiet[@]}" --build-constraints "$lock" -r "$lock"
say "installing ./vllm (editable)"
uv_install "${quiet[@]}" --no-build-isolation --editable ./vllm
say "checking the installation"
"$VENV_PYTHON" scripts/check_install.py
fingerprint >$STAMP
say ".venv ($kind) is ready after $SECONDS s"
