#!/usr/bin/env bash
# Builds the site of docs/, or serves it: scripts/docs.sh [build|serve] [arguments for mkdocs]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOCK=requirements-docs.lock
VENV=.venv-docs

command=${1:-build}
[[ $# -eq 0 ]] || shift

scripts/setup.sh
# Not .venv: beside the installed vLLM, mkdocstrings would take that for the whole package.
if ! cmp -s "$LOCK" "$VENV/installed.lock"; then
  .venv/bin/python -m uv venv --quiet --clear --python .venv/bin/python "$VENV"
  .venv/bin/python -m uv pip sync --quiet --python "$VENV/bin/python" "$LOCK"
  cp "$LOCK" "$VENV/installed.lock"
fi

# mkdocs-material's notice about its successor would stand in every log.
export NO_MKDOCS_2_WARNING=1
case "$command" in
  # Not --quiet, under which mkdocs counts no warning, and strict means nothing.
  build) exec "$VENV/bin/mkdocs" build --strict "$@" ;;
  serve) exec "$VENV/bin/mkdocs" serve --strict --watch vllm/vllm "$@" ;;
  *)
    sed -n '2s/^# //p' scripts/docs.sh >&2
    exit 2
    ;;
esac
