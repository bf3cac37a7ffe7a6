#!/usr/bin/env bash
# Set up, then lint, types and all tests:
#
#   bash tests/run.sh                              in .venv, on the versions of requirements/tested.txt
#   bash tests/run.sh fast                         lint, types, what takes little time, --help of each command: two minutes
#   bash tests/run.sh tests/unit -k golden         arguments go to pytest
#   bash tests/run.sh --with oldest                the fast tests in .venv-oldest, on the lower bounds of pyproject.toml
#   bash tests/run.sh --with oldest --torch 2.11.0      with another release of PyTorch
#   bash tests/run.sh --with newest                the fast tests in .venv-newest, on today's newest releases
set -euo pipefail

environment=tested torch=
while [ $# -gt 0 ]; do
    case $1 in
        --with) environment=${2:-} ;;
        --torch) torch=${2:-} ;;
        *) break ;;
    esac
    shift 2 || break
done
case $environment:$torch in
    tested: | oldest:* | newest:) ;;
    *) echo "error: --with takes oldest or newest, and --torch VERSION goes with --with oldest" >&2 && exit 2 ;;
esac
. "$(dirname "$0")/../examples/setup_environment.sh" $environment $torch

if [ $environment = tested ]; then
    ruff check .
    ruff format --check .
    mypy megatron_tf tools
fi
if [ "${1:-}" = fast ]; then
    explains=tests/end_to_end/test_commands.py::test_each_command_explains_itself
    OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 -m "not slow" tests/unit $explains
    exit
fi
if [ $# -gt 0 ]; then
    python -m pytest "$@"
    exit
fi
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 tests/unit tests/fuzz
if [ $environment = tested ]; then
    TRITON_INTERPRET=1 python -m pytest tests/triton
    python -m pytest tests/ranks
    # much of these waits for starts, clocks and signals; the files that take longest are first
    python -m pytest --numprocesses 3 --dist loadfile \
        tests/end_to_end/test_{slurm_cluster,stopping,growth_in_run,setup,plain_install,signals}.py tests/end_to_end
fi
