#!/usr/bin/env bash
# Sets everything up, then runs a data set: scripts/run_dataset.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
# What libraries start by name (ninja, for one) must be the venv's as well.
export PATH="$PWD/.venv/bin:$PATH"
python scripts/prepare_models.py

exec python main_dataset.py "$@"
