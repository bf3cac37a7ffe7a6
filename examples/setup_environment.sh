# Sourced by examples/quickstart.sh and tests/run.sh: a virtual environment in .venv with the package built in it.
# Changes to the working directory: the repository's root. Runs again only when what it installs has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

setup_environment() {
    local stamp=.venv/installed
    local wanted
    wanted=$(cat constraints.txt setup.py pyproject.toml csrc/* | cksum)
    if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: Python 3.11 or later is needed, found $(python3 --version)" >&2; return 1; }
        echo "== setting up .venv (a few minutes the first time: it installs PyTorch)"
        python3 -m venv .venv &&
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch &&
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" ||
            { echo "error: the set-up failed; the lines above say why" >&2; return 1; }
        echo "$wanted" >$stamp
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

setup_environment || exit 1
