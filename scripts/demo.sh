#!/usr/bin/env bash
# The whole story on the embedded checkpoint, in a virtual environment of its own.
source "$(dirname "$0")/setup.sh"
setup ""
exec .venv/bin/msmoe demo "$@"
