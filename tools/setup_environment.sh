#!/usr/bin/env bash
# Create or update a virtual environment with this project and some of its extras.
#
#     tools/setup_environment.sh FOLDER EXTRA[,EXTRA...] [lowest]
#
# With `lowest`, what pyproject.toml names is installed in the lowest release that it allows, and the rest in the newest.
# PYTHON=/path/to/python chooses the interpreter; otherwise the first suitable one that is found is taken.
set -euo pipefail
folder=$1
extras=$2
resolution=${3:-newest}
cd "$(dirname "$0")/.."

# In the order of preference, so that the environments of the tests have one Python each where there are several.
case $resolution,$extras in
    lowest,*) versions="3.11 3.12" ;; # of some lowest releases there are no wheels for newer ones
    newest,test) versions="3.13 3.14 3.12 3.11" ;;
    newest,*) versions="3.12 3.13 3.14" ;; # Axolotl needs 3.12, and the demo's environment may become that of the tests
    *) echo "$resolution: not a resolution. Give lowest, or nothing." >&2; exit 1 ;;
esac

# A version manager's shim may be on the PATH for a version that is not active, so every candidate is run.
is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1; }

find_python() {
    local version candidate
    for version in $versions; do
        if [ -n "${PYTHON:-}" ]; then
            is_version "$PYTHON" "$version" && echo "$PYTHON" && return
            continue
        fi
        for candidate in "python$version" python3 python; do
            if is_version "$candidate" "$version"; then command -v "$candidate"; return; fi
        done
        if command -v pyenv >/dev/null; then
            for candidate in "$(pyenv root)"/versions/"$version".*/bin/python; do
                if is_version "$candidate" "$version"; then echo "$candidate"; return; fi
            done
        fi
        if command -v uv >/dev/null && candidate=$(uv python find --no-python-downloads "$version" 2>/dev/null); then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        echo "PYTHON=$PYTHON is none of Python ${versions// /, }." >&2
    else
        echo "None of Python ${versions// /, } was found. Install one, or name it: make PYTHON=/path/to/python ..." >&2
    fi
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
    install=("$folder/bin/uv" pip install --quiet --compile-bytecode --python "$folder/bin/python")
    # What is there already would be kept where it is higher.
    if [ "$resolution" = lowest ]; then install+=(--upgrade --resolution lowest-direct); fi
    "${install[@]}" --editable ".[$extras]"
elif [ "$resolution" = lowest ]; then
    echo "The lowest releases are found by uv only, which pip could not install." >&2
    exit 1
else
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
fi
