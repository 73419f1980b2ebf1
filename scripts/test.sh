#!/usr/bin/env bash
# Lint and tests, in a virtual environment of its own. Arguments go to pytest.
source "$(dirname "$0")/setup.sh"
setup dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
