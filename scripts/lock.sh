#!/bin/sh
# Pin requirements/*.in in requirements/*.txt: scripts/lock.sh UV [UV-OPTION ...]
#
# Pins that still fit stay; with --upgrade every package gets its newest version. All lists but torch-*.txt have the
# hashes of all files of a version, and pip installs no other file. torch, torchrec, fbgemm and the CUDA libraries have no
# hashes, because indexes build them differently (see torch-cpu.txt). The lists do not name the index.
set -eu
cd "$(dirname "$0")/../requirements"
uv=$1
shift
export UV_CUSTOM_COMPILE_COMMAND="make lock"

compile() {
    "$uv" pip compile --quiet --python-version 3.11 --no-emit-index-url --no-emit-find-links "$@" >/dev/null
}

compile runtime.in --override overrides.in --generate-hashes -o runtime.txt "$@"
for list in dev docs bench s3; do
    compile "$list.in" -c runtime.txt --override overrides.in --generate-hashes -o "$list.txt" "$@"
done

all=$(mktemp)
trap 'rm -f "$all"' EXIT
cp torch-cuda.txt "$all" 2>/dev/null || true
compile torch-cuda.in -c runtime.txt --no-annotate --no-header -o "$all" "$@"
{
    echo "# The CUDA set, pinned by \`make lock\` from torch-cuda.in. Without hashes: see torch-cpu.txt."
    grep -E '^(torch|torchrec|fbgemm-gpu|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' "$all"
} >torch-cuda.txt
wc -l ./*.txt
