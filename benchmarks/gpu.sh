#!/usr/bin/env bash
# Everything of this project that waits for a GPU, in one command, with a report: see benchmarks/gpu.py.
#
#     benchmarks/gpu.sh                          # on one CUDA device or more; writes outputs/gpu/report.json
#     benchmarks/gpu.sh --device cpu --small     # the same programs in small where there is none, to see that they run
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
