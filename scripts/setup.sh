# Sourced by the other scripts: a virtual environment beside the code, with the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() { # setup EXTRA...: install the project with its extras, once per change of the project's files
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed" >&2; exit 2; }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local stamp
    stamp=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)-$*
    if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
        echo "installing into .venv (a few minutes the first time)"
        .venv/bin/pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt torch
        .venv/bin/pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable ".${1:+[$1]}"
        echo "$stamp" > .venv/stamp
    fi
}

browser() { # Chromium from the system's packages where that is allowed; without it the tests that need it are skipped
    command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "installing chromium"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
            > /dev/null 2>&1 && return
    fi
    echo "no Chromium, and it could not be installed: the tests that open reports in a browser will be skipped"
}
