#!/usr/bin/env bash
# Create or update a virtual environment with this project and some of its extras.
#
#     tools/setup_environment.sh FOLDER EXTRA[,EXTRA...]
#
# PYTHON=/path/to/python chooses the interpreter; otherwise the first suitable one that is found is taken.
set -euo pipefail
folder=$1
extras=$2
cd "$(dirname "$0")/.."

suitable() { "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" && echo "$PYTHON" && return
        echo "PYTHON=$PYTHON is not a Python 3.12, 3.13 or 3.14." >&2
        return 1
    fi
    # A version manager's shim may be on the PATH for a version that is not active, so every candidate is run.
    for candidate in python3.12 python3.13 python3.14 python3 python; do
        if suitable "$candidate"; then command -v "$candidate"; return; fi
    done
    if command -v pyenv >/dev/null; then
        for candidate in "$(pyenv root)"/versions/3.1[234].*/bin/python; do
            if suitable "$candidate"; then echo "$candidate"; return; fi
        done
    fi
    if command -v uv >/dev/null && candidate=$(uv python find --no-python-downloads '>=3.12,<3.15' 2>/dev/null); then
        echo "$candidate"
        return
    fi
    echo "No Python 3.12, 3.13 or 3.14 was found. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

if [ ! -x "$folder/bin/python" ]; then
    python=$(find_python)
    echo "Creating $folder with $("$python" --version)"
    if ! "$python" -m venv "$folder"; then
        rm -rf "$folder"
        echo "$python cannot create a virtual environment; on Debian and Ubuntu install its package pythonX.Y-venv." >&2
        exit 1
    fi
fi

echo "Installing salora-plugins[$extras] and what it needs (PyTorch is large; this can take minutes)"
# uv resolves and installs much faster than pip; where it cannot be had, pip does the same. Compiled as pip does it, since
# the tests start many processes, which would otherwise compile TRL and Axolotl each, where Python may not write bytecode.
if "$folder/bin/python" -m pip install --quiet --disable-pip-version-check uv; then
    "$folder/bin/uv" pip install --quiet --compile-bytecode --python "$folder/bin/python" --editable ".[$extras]"
else
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
fi
