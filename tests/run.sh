#!/usr/bin/env bash
# Set up, then lint, types and all tests:
#
#   bash tests/run.sh                              in .venv, on the versions of requirements/tested.txt
#   bash tests/run.sh fast                         lint, types, what takes little time, --help of each command: about three minutes
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
if [ $environment != tested ]; then
    # without what other packages cannot change: the arithmetic of growth, and the index in C++
    OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 tests/unit --ignore tests/unit/growth \
        --ignore tests/unit/test_width.py --ignore tests/unit/test_divide_width.py
    exit
fi
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 tests/unit tests/fuzz
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 tests/triton
# eight ranks keep one core busy on average: two pools of them
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile tests/ranks
# much of these waits for starts, clocks and signals; the files that take longest are first
slow=$(printf '%s\n' tests/end_to_end/test_{slurm_cluster,stopping,growth_in_run,growth_study,setup,plain_install,signals}.py)
others=$(ls tests/end_to_end/test_*.py | grep -vxF "$slow")
OMP_NUM_THREADS=1 python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $slow $others
