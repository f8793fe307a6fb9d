#!/usr/bin/env bash
# The types of the package, laid out as it is installed (integrations/ inside of it), and of the benchmarks.
#
#     tools/check_types.sh ENVIRONMENT
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/$1/bin/python
config=$PWD/pyproject.toml
tree=build/types
rm -rf "$tree"
mkdir -p "$tree"
cp -pR salora_plugins "$tree/"
rm -rf "$tree/salora_plugins/integrations"
cp -pR integrations "$tree/salora_plugins/integrations"
cp -pR benchmarks "$tree/"
cd "$tree"
cache=../types-cache
"$python" -m mypy --config-file "$config" --cache-dir "$cache" salora_plugins
MYPYPATH=benchmarks "$python" -m mypy --config-file "$config" --cache-dir "$cache" --explicit-package-bases benchmarks
