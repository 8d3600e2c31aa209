#!/bin/sh
# Link the packages under build/src as `recpress/<folder>`, for tools that read source by path (types, import rule),
# and for machines where nothing can be installed: PYTHONPATH=build/src
set -eu
cd "$(dirname "$0")/.."
mkdir -p build/src/recpress
for folder in data modules trainer launch benchmarks; do ln -sfn "../../../$folder" "build/src/recpress/$folder"; done
