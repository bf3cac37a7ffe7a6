#!/usr/bin/env bash
# Pin every package that the environments of tests/run.sh install, direct and transitive: tested.txt has the newest
# releases, for every platform and Python; oldest.txt the lower bounds of pyproject.toml, for Python 3.11 on Linux. Run it
# after a change to pyproject.toml, or to move on to newer releases. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
    uv pip compile --quiet --upgrade --config-file requirements/uv.toml --no-emit-index-url \
        --custom-compile-command "bash requirements/compile.sh" --extra dev pyproject.toml \
        --constraints "requirements/$1.in" --output-file "requirements/$1.txt" --python-version 3.11 "${@:2}"
}

compile tested --extra docs --extra kubernetes --universal --fork-strategy fewest
compile oldest --resolution lowest-direct --python-platform x86_64-manylinux_2_28
