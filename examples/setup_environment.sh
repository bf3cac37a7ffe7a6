# Sourced by examples/quickstart.sh and tests/run.sh: `. setup_environment.sh NAME [TORCH]` makes the virtual environment
# NAME with the package in it, puts it first on PATH, and changes to the directory to work in.
#
#   tested   .venv          requirements/tested.txt, in the checkout itself
#   oldest   .venv-oldest   requirements/oldest.txt, with the release TORCH of PyTorch if one is given
#   newest   .venv-newest   today's newest releases that pyproject.toml allows
#
# The last two work in a copy of the checkout, so that their builds do not replace what .venv has built.
#
# An environment is complete when it holds requirements.txt, the list it was made from, which is written last. If that
# file is missing (a set-up was killed) or differs from the current list, the environment is made from scratch.

fail() {
    echo "error: $*" >&2
    return 1
}

# Unset the variables of a shell that change which Python runs, what it imports, or where pip installs.
clear_leaks() {
    local active
    for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        # to the end of PATH: its Python is used if there is no other, and its compiler may be the only one
        [ -z "$active" ] || PATH=${PATH//"$active/bin:"/}:$active/bin
    done
    unset CDPATH VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV
    unset PYTHONPATH PYTHONHOME PYTHONUSERBASE PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONWARNINGS PYTHONPLATLIBDIR
    unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_NO_DEPS PIP_DRY_RUN PIP_REQUIRE_VIRTUALENV PIP_NO_BUILD_ISOLATION
    export PIP_USER=0 # also where a pip.conf has user = true
}

# Find a Python: the tested version first, then others that are supported.
find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or later is needed, and python3 is $(python3 --version 2>&1)"
}

# Check at once for what would otherwise fail after minutes.
check_tools() {
    local python=$1 compiler include
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)" ||
        return 1
    compiler=${CXX:-$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("CXX") or "c++")')}
    # CXX may hold options too, so it is split into words.
    # shellcheck disable=SC2086
    echo 'int main() { return 0; }' | $compiler -x c++ -std=c++20 -fsyntax-only - 2>/dev/null ||
        fail "a C++20 compiler is needed, and '$compiler' is not one: install g++ (Debian: apt-get install g++) or set CXX" ||
        return 1
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    # shellcheck disable=SC2086
    echo '#include <Python.h>' | $compiler -x c++ -std=c++20 -fsyntax-only -I "$include" - 2>/dev/null ||
        fail "$python has no header files: install them (Debian: apt-get install python3-dev)"
}

# Report pip's progress: every second on a terminal, else every ten. It exits with the shell that started it.
report_progress() {
    local log=$1 directory=$2 packages=$3 every=10 end='\n' seconds=0 state
    [ ! -t 1 ] || { every=1 end='\r'; }
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        [ $((++seconds % every)) = 0 ] || continue
        if [ -z "$packages" ]; then
            state=working
        elif grep -q '^Installing collected packages' "$log"; then
            state="installed $(find "$directory"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)"
        else
            state="collected $(grep -c '^Collecting ' "$log")"
        fi
        printf "   %-60s$end" "$state$packages, $seconds s"
    done
}

# `pip install` in the environment. Its output goes to a log, of which errors are shown; `packages` is how many are counted.
pip_install() {
    local directory=$1 packages=$2 log=$1/setup.log reporter status=0
    shift 2
    : >"$log"
    report_progress "$log" "$directory" "$packages" 9<&- &
    reporter=$!
    "$directory/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1 || status=$?
    { kill $reporter && wait $reporter; } 2>/dev/null || true
    [ ! -t 1 ] || printf '%70s\r' "" # over the last report
    [ $status != 0 ] || return 0
    grep -E '^ *(error|ERROR|fatal)' "$log" | sort -u | head -5 >&2
    fail "the set-up failed: the lines above say why, and $PWD/$log has pip's whole output"
}

# Copy the sources, without build products and environments.
copy_sources() {
    rm -rf "$1" && mkdir -p "$1" &&
        tar -cf - --exclude './.venv*' --exclude './.git' --exclude './runs' --exclude './build' --exclude './.*_cache' \
            --exclude '*.so' --exclude '*.egg-info' . | tar -xf - -C "$1"
}

# Make the environment with all packages except this one.
make_environment() {
    local name=$1 directory=$2 wanted=$3 python=$4 packages list
    if [ -e "$directory" ] && [ ! -e "$directory/wanted.txt" ] && [ ! -e "$directory/requirements.txt" ]; then
        fail "$PWD/$directory was not made by this version of the script, which would replace it: move or remove it"
        return 1
    fi
    echo "== set-up 1/3: $directory, with $("$python" --version)"
    rm -rf "$directory" && mkdir "$directory" && echo "$wanted" >"$directory/wanted.txt" &&
        "$python" -m venv "$directory" || fail "cannot make $PWD/$directory" || return 1
    echo "== set-up 2/3: packages, including PyTorch (some minutes, about 2 GB)"
    if [ "$name" = newest ]; then
        copy_sources "$directory/source" || return 1
        packages=" packages" list=("$directory/source[dev]")
    else
        packages=" of $(grep -c '^[a-z]' "$directory/wanted.txt") packages" list=(-r "$directory/wanted.txt")
    fi
    # pip first: the system's may be so old that it prints warnings
    pip_install "$directory" "" --upgrade "$(grep '^pip==' "$directory/wanted.txt" || echo pip)" &&
        pip_install "$directory" "$packages" "${list[@]}" &&
        mv "$directory/wanted.txt" "$directory/requirements.txt"
}

# Build the package and its C++ extension from `source` into the environment.
build_package() {
    local directory=$1 source=$2
    echo "== set-up 3/3: the package and its C++ extension (half a minute)"
    rm -f "$directory/built"
    [ "$source" = . ] || copy_sources "$source" || return 1
    pip_install "$directory" "" --no-deps --no-build-isolation --editable "$source" &&
        checksum_of_sources >"$directory/built"
}

checksum_of_sources() {
    cat setup.py pyproject.toml csrc/* | cksum
}

# The list of packages to make the environment from. An environment can't be moved, so its path is in the list.
wanted_packages() {
    local name=$1 torch=$2
    echo "# For $PWD."
    if [ "$name" = newest ]; then
        echo "# The newest releases of $(date +%F) that pyproject.toml allows ($(cksum <pyproject.toml))."
    else
        sed "${torch:+s/^torch==.*/torch==$torch/}" "requirements/$name.txt"
    fi
}

has_packages() {
    local directory=$1 wanted=$2
    [ -x "$directory/bin/python" ] && [ "$(cat "$directory/requirements.txt" 2>/dev/null)" = "$wanted" ]
}

has_package() {
    [ "$(cat "$1/built" 2>/dev/null)" = "$(checksum_of_sources)" ]
}

# Allow one set-up at a time. pip inherits the lock, so the next set-up also waits for a pip that outlived its killed
# shell. Without flock (macOS), nothing is locked.
lock_checkout() {
    exec 9<setup.py
    ! command -v flock >/dev/null || flock -n 9 && return
    echo "== another set-up is running in this checkout: waiting for it, up to 30 minutes"
    flock -w 1800 9 || fail "the other set-up has not ended: stop it and try again"
}

set_up() {
    local name=$1 torch=${2:-} directory=.venv source=. wanted python
    if [ "$name" != tested ]; then
        directory=.venv-$name
        source=$directory/source
    fi
    clear_leaks
    wanted=$(wanted_packages "$name" "$torch") || return 1
    if [ "$name" != tested ] || ! has_packages $directory "$wanted" || ! has_package $directory; then
        lock_checkout || return 1
        if ! has_packages "$directory" "$wanted"; then
            python=$(find_python) && check_tools "$python" &&
                make_environment "$name" "$directory" "$wanted" "$python" || return 1
        fi
        [ "$name" = tested ] && has_package "$directory" || build_package "$directory" "$source" || return 1
        exec 9<&-
    fi
    export PATH="$PWD/$directory/bin:$PATH"
    cd "$source" || return 1
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && set_up "$@" || exit 1
