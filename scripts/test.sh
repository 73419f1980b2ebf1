#!/usr/bin/env bash
# Lint and tests, in a virtual environment of its own. Arguments go to pytest.
source "$(dirname "$0")/setup.sh"
setup dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
browser # reports are tested in Chromium
export OMP_NUM_THREADS=1 # a test file per core at a time: more threads would only wait for one another
exec .venv/bin/python -m pytest -n logical --dist loadfile "$@"
