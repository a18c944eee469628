#!/usr/bin/env bash
# Sets everything up, then runs a data set: scripts/run_dataset.sh [key=value ...]
#
# Without arguments it runs an ensemble plain and by turns, side by side (main_compare.py). With
# arguments it passes them to one run of main_dataset.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
# Programs that libraries start by name (ninja, for one) must come from the venv too.
export PATH="$PWD/.venv/bin:$PATH"
python scripts/prepare_models.py

if (($# == 0)); then exec python main_compare.py; fi
exec python main_dataset.py "$@"
