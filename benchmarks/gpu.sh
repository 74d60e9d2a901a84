#!/usr/bin/env bash
# All that needs a GPU, in less than ten minutes; see gpu.py beside this. Needs no set-up: any python3 with torch,
# torchvision and pyyaml does (PYTHON=... chooses one), and nothing is downloaded.
#
#   benchmarks/gpu.sh --out results
#   benchmarks/gpu.sh --device cpu --quick
set -euo pipefail
cd "$(dirname "$0")/.."
for python in ${PYTHON:-.venv/bin/python python3}; do
    if "$python" -c 'import torch, torchvision, yaml' 2>/dev/null; then exec "$python" -m benchmarks.gpu "$@"; fi
done
echo "error: no python3 with torch, torchvision and pyyaml here. HINT: make setup, or PYTHON=/path/to/python" >&2
exit 2
