#!/bin/sh
# Install recpress and its pinned set into a virtual environment: scripts/install.sh [VENV] [EXTRA ...]
#
# VENV   default .venv; created if it does not exist
# EXTRA  further lists of requirements/, e.g. `dev` (tests, lint) or `bench` (peers of the benchmarks)
#
# Installs the CUDA set if a driver answers, else the CPU set; RECPRESS_SET=cpu or cuda overrides. pip takes packages from
# the index, extra index or link folder that it is configured with. It checks the hashes of all packages except torch,
# torchrec, fbgemm and the CUDA libraries, whose files differ between indexes (requirements/torch-cpu.txt).
set -eu
cd "$(dirname "$0")/.."
cpu_index=https://download.pytorch.org/whl/cpu
venv=${1:-.venv}
[ $# -gt 0 ] && shift

set_name=${RECPRESS_SET:-}
if [ -z "$set_name" ]; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then set_name=cuda; else set_name=cpu; fi
fi
case $set_name in cpu | cuda) ;; *) echo "install: RECPRESS_SET is '$set_name', expected cpu or cuda" >&2; exit 2 ;; esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $("$python" --version) is too old, expected Python 3.11 or newer (set PYTHON)" >&2; exit 2; }

locked="runtime $*"
lists=requirements/torch-$set_name.txt
for list in $locked; do lists="$lists requirements/$list.txt"; done
# shellcheck disable=SC2086  # the list is words on purpose
stamp=$(cat $lists pyproject.toml scripts/install.sh | cksum)
if [ -f "$venv/.recpress-installed" ] && [ "$(cat "$venv/.recpress-installed")" = "$stamp $lists" ]; then exit 0; fi

echo "install: the $set_name set into $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
for list in $locked; do $pip install --no-deps --require-hashes -r "requirements/$list.txt"; done
if [ "$set_name" = cpu ]; then
    # PyPI's torch for Linux is the CUDA build, which cannot be imported without the CUDA libraries.
    torch=$(grep "^torch==" requirements/torch-cpu.txt)+cpu
    $pip install --no-deps "$torch" 2>/dev/null ||
        $pip install --no-deps --retries 1 --timeout 15 --index-url "$cpu_index" "$torch" 2>/dev/null || :
fi
$pip install --no-deps -r "requirements/torch-$set_name.txt"
"$venv/bin/python" -c "import torch" 2>/dev/null || {
    echo "install: the torch that pip found cannot be imported; for the CPU build make $cpu_index reachable, or configure" \
        "pip with an index that has it (PIP_EXTRA_INDEX_URL)" >&2; exit 1; }
$pip install --no-deps --no-build-isolation --editable .
echo "$stamp $lists" >"$venv/.recpress-installed"
