#!/usr/bin/env bash
# All that needs a GPU, in two calls of at most 270 s and 240 s; see gpu.py beside this. Needs no set-up: any python3 of
# 3.11 or newer with torch, torchvision and pyyaml does (PYTHON=... chooses one), and nothing is downloaded.
#
#   benchmarks/gpu.sh first --out results; benchmarks/gpu.sh second --out results-2
#   benchmarks/gpu.sh first --device cpu --quick
set -euo pipefail
cd "$(dirname "$0")/.."
has_all='import sys; from importlib.util import find_spec as f
sys.exit(sys.version_info < (3, 11) or not (f("torch") and f("torchvision") and f("yaml")))'
known=(.venv/bin/python python3)
if [ -n "${PYTHON:-}" ]; then known=("$PYTHON"); fi
for python in "${known[@]}"; do
    if "$python" -c "$has_all" 2>/dev/null; then exec "$python" -m benchmarks.gpu "$@"; fi
done
echo "error: no python3 of 3.11 or newer with torch, torchvision and pyyaml here. HINT: make setup, or PYTHON=/path/to/python" >&2
exit 2
