#!/usr/bin/env bash
# Set up, then lint, types and all tests. Arguments go to pytest: `bash tests/run.sh tests/unit -k golden`.
set -euo pipefail
. "$(dirname "$0")/../examples/setup_environment.sh"

ruff check .
ruff format --check .
mypy megatron_tf tools
python -m pytest "$@"
