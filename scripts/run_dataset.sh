#!/usr/bin/env bash
# Sets everything up, then runs a data set: scripts/run_dataset.sh [key=value ...]
#
# Without an argument: an ensemble plain and by turns, side by side (main_compare.py). With any: one
# run of main_dataset.py, which gets them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
# What libraries start by name (ninja, for one) must be the venv's as well.
export PATH="$PWD/.venv/bin:$PATH"
python scripts/prepare_models.py

if (($# == 0)); then exec python main_compare.py; fi
exec python main_dataset.py "$@"
