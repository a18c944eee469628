#!/usr/bin/env bash
# Sets up, lints, builds the documentation and tests: scripts/run_tests.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
# What libraries start by name (ninja, for one) must be the venv's as well.
export PATH="$PWD/.venv/bin:$PATH"
# All that the tests need is here; without this, libraries would ask a hub first and wait.
export HF_HUB_OFFLINE=1
python scripts/prepare_models.py

ruff check .
ruff format --check .
scripts/docs.sh build
# Two processes, for two cores; a file's tests stay together, since they share engines.
exec python -m pytest -n 2 --dist loadfile "$@"
