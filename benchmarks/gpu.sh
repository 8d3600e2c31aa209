#!/bin/bash
# All benchmarks of a GPU, on a machine where nothing can be installed: bash benchmarks/gpu.sh [options of gpu.py]
#
# torch, torchrec, fbgemm-gpu, numpy and pyarrow have to be importable; recpress is found by links to this source.
# SETUP   a script that is sourced first, and makes them importable (it may set PYTHONPATH)
# PYTHON  default python3
# OUT     folder of the JSON files, default runs/gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${SETUP:-}" ]; then
    set +eu
    # shellcheck disable=SC1090
    . "$SETUP" || { echo "gpu.sh: $SETUP failed" >&2; exit 1; }
    set -eu
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}  # one process, no network
exec "${PYTHON:-python3}" benchmarks/gpu.py --out "${OUT:-runs/gpu}" "$@"
