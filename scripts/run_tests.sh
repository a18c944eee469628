#!/usr/bin/env bash
# Sets up, lints, builds the documentation and tests: scripts/run_tests.sh [arguments for pytest]
#
# Without arguments it runs all quick tests and an eighth of the slow ones, another eighth after each
# commit. `scripts/run_tests.sh tests` runs all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
# Programs that libraries start by name (ninja, for one) must come from the venv too.
export PATH="$PWD/.venv/bin:$PATH"
# Everything that the tests need is here. Otherwise libraries would ask a hub first and wait.
export HF_HUB_OFFLINE=1
python scripts/prepare_models.py

ruff check .
ruff format --check .
scripts/docs.sh build
if [[ $# -eq 0 ]]; then
  num_commits=$(git rev-list --count HEAD 2>/dev/null || echo 0)
  set -- --slow-part "$((num_commits % 8 + 1))/8"
fi
# Two processes, for two cores. The tests of a file stay together, because they share engines.
exec python -m pytest -n 2 --dist loadfile "$@"
