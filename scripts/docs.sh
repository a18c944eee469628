#!/usr/bin/env bash
# Builds the site of docs/, or serves it: scripts/docs.sh [build|serve] [arguments for mkdocs]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOCK=requirements-docs.lock
VENV=.venv-docs

command=${1:-build}
[[ $# -eq 0 ]] || shift

scripts/setup.sh
# This does not use .venv: there, mkdocstrings would take the installed vLLM for the whole package.
if ! cmp -s "$LOCK" "$VENV/installed.lock"; then
  .venv/bin/python -m uv venv --quiet --clear --python .venv/bin/python "$VENV"
  .venv/bin/python -m uv pip sync --quiet --python "$VENV/bin/python" "$LOCK"
  cp "$LOCK" "$VENV/installed.lock"
fi

# Without this, every log would show mkdocs-material's notice about its successor.
export NO_MKDOCS_2_WARNING=1
case "$command" in
  # Without --quiet: with it mkdocs counts no warning, and --strict has no effect.
  build) exec "$VENV/bin/mkdocs" build --strict "$@" ;;
  serve) exec "$VENV/bin/mkdocs" serve --strict --watch vllm/vllm "$@" ;;
  *)
    sed -n '2s/^# //p' scripts/docs.sh >&2
    exit 2
    ;;
esac
