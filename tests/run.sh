#!/usr/bin/env bash
# Set up, then lint, types and all tests. Arguments go to pytest: `bash tests/run.sh tests/unit -k golden`.
set -euo pipefail
. "$(dirname "$0")/../examples/setup_environment.sh"
python -c "import triton" 2>/dev/null || python -m pip install --quiet --disable-pip-version-check triton ||
    echo "triton is not to be had here: its kernels are not tested"

ruff check .
ruff format --check .
mypy megatron_tf tools
if [ $# -gt 0 ]; then
    python -m pytest "$@"
else
    TRITON_INTERPRET=1 python -m pytest tests/triton
    python -m pytest --ignore tests/triton
fi
