#!/usr/bin/env bash
# The first ten minutes on a real card: bash benchmarks/cuda/measure.sh OUTPUT [options]
# See docs/cuda.md, "Measuring on a card". PYTHON names the interpreter whose torch is used.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 \
  exec "${PYTHON:-python3}" -m measure "$@"
