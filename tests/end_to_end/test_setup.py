"""The set-up of the README's two commands, on a stand-in for the checkout whose package and requirements are tiny."""

import ensurepip
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES, ROOT

PATH = os.environ["PATH"].replace(f"{Path(sys.executable).parent}:", "")
SCRIPT = '. {root}/examples/setup_environment.sh tested; python -c "import helper, megatron_tf; print(helper.__file__)"'
BACKEND = """
import os, time, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    while os.path.exists(os.environ.get("HOLD_THE_BUILD", "")):
        time.sleep(0.05)
    with zipfile.ZipFile(os.path.join(directory, f"{NAME}-1.0-py3-none-any.whl"), "w") as wheel:
        about = f"{NAME}-1.0.dist-info"
        wheel.writestr(f"{NAME}.py", "")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\\nName: {NAME}\\nVersion: 1.0\\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{about}/RECORD", "")
    return os.path.basename(wheel.filename)

build_editable = build_wheel
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def write_sdist(folder, name):
    """NAME-1.0.tar.gz in `folder`: a package that waits while the file of $HOLD_THE_BUILD is there."""
    source = folder / f"{name}-1.0"
    write_project(source, name)
    (source / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as file:
        file.add(source, source.name)


def write_project(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(f"NAME = {name!r}\n{BACKEND}")


def bundled_pip():
    """(wheel, version) of the pip that comes with Python; Debian's has a directory of its own for it."""
    of_debian = sysconfig.get_config_var("WHEEL_PKG_DIR")
    folder = Path(of_debian) if of_debian else Path(ensurepip.__file__).parent / "_bundled"
    (wheel,) = folder.glob("pip-*.whl")
    return wheel, wheel.name.split("-")[1]


class Checkout:
    """A stand-in for the checkout: the real script, and packages that need no network."""

    def __init__(self, root):
        self.root = root
        for folder in ("examples", "csrc", "requirements", "wheels"):
            (root / folder).mkdir(parents=True)
        shutil.copy(EXAMPLES / "setup_environment.sh", root / "examples")
        write_project(root, "megatron_tf")
        (root / "setup.py").write_text("")
        (root / "csrc" / "x.cpp").write_text("")
        write_sdist(root / "wheels", "helper")
        wheel, self.pip = bundled_pip()
        shutil.copy(wheel, root / "wheels")
        self.require("helper==1.0")

    def require(self, *requirements):
        (self.root / "requirements" / "tested.txt").write_text("\n".join([*requirements, f"pip=={self.pip}"]) + "\n")

    def start(self, script=SCRIPT, before=(), **environment):
        """The set-up, in a session of its own; `before` is a command that runs it."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "CXX") if name in os.environ}
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (self.root / "wheels").as_uri(), "PIP_NO_CACHE_DIR": "1"}
        command = script.format(root=shlex.quote(str(self.root)))
        return subprocess.Popen(
            [*before, "bash", "-c", command],
            cwd="/",
            env={**kept, **offline, "PATH": PATH, "PIP_CONFIG_FILE": os.devnull, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, **environment):
        """(exit status, stdout, stderr) of the set-up."""
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, out, err

    def must_run(self, *arguments, **environment):
        code, out, err = self.run(*arguments, **environment)
        assert (code, err) == (0, ""), out + err
        return out


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout")


UNPRIVILEGED = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user"
)


@pytest.mark.parametrize(
    "place, environment, before",
    [
        ("my modèls ü/check out", {}, ()),
        ("plain", {"LANG": "C", "LC_ALL": "C"}, ()),
        ("ünder C", {"LANG": "C", "LC_ALL": "C"}, ()),
        ("plain", {}, ("bash", "-c", 'umask 077; exec "$@"', "umask")),
        pytest.param("plain", {"PATH": "/usr/bin:/bin"}, UNPRIVILEGED, marks=NEEDS_ROOT),
    ],
    ids=["spaces and umlauts", "LANG=C", "both", "umask 077", "not root"],
)
def test_it_works_from_another_directory_in(place, environment, before, tmp_path):
    checkout = Checkout(tmp_path / place)
    if before == UNPRIVILEGED:
        if subprocess.run(["/usr/bin/python3", "-c", "import ensurepip"], check=False, capture_output=True).returncode:
            pytest.skip("/usr/bin/python3 cannot make virtual environments, and no other is open to all users")
        give_to_nobody(checkout.root, tmp_path)
    out = checkout.must_run(SCRIPT, before, **environment)
    assert re.findall(r"== set-up (.)/3", out) == ["1", "2", "3"]
    assert str(checkout.root / ".venv") in out.splitlines()[-1]
    assert checkout.must_run(SCRIPT, before, **environment).count("\n") == 1, "a second run has nothing to do"


def give_to_nobody(root, top):
    for folder in (top, *top.parents):
        if folder.stat().st_mode & 0o001 == 0:  # pytest's own
            folder.chmod(folder.stat().st_mode | 0o011)
    for path in (root, *root.rglob("*")):
        os.chown(path, 65534, 65534)


def kill_while_installing(checkout, hold, target):
    """Start the set-up, wait until it says how far it is, and kill it; `target` is its session or its shell alone."""
    hold.write_text("")
    process = checkout.start(HOLD_THE_BUILD=str(hold))
    lines = []
    while not lines or " 10 s" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    assert re.fullmatch(r" +collected \d+ of 2 packages, 10 s *\n", lines[-1])
    (os.killpg if target == "session" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    return process


def test_one_that_was_killed_is_not_trusted(checkout, tmp_path):
    hold = tmp_path / "hold"
    kill_while_installing(checkout, hold, "session").communicate()
    hold.unlink()
    assert "== set-up 1/3" in checkout.must_run()


def test_a_pip_that_outlived_its_shell_is_waited_for(checkout, tmp_path):
    hold = tmp_path / "hold"
    killed = kill_while_installing(checkout, hold, "shell")
    second = checkout.start()
    assert "another set-up is running in this checkout" in second.stdout.readline()
    hold.unlink()
    out, err = second.communicate(timeout=120)
    assert (second.returncode, err) == (0, "")
    assert "== set-up 1/3" in out
    killed.communicate()


def test_nothing_that_a_shell_carries_leaks_in(checkout, tmp_path):
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    for name in ("python", "python3", "python3.11"):
        (other / "bin" / name).write_text("#!/bin/sh\necho 'Python 3.6.1'; exit 1\n")
        (other / "bin" / name).chmod(0o755)
    for module in ("helper", "venv", "pip", "megatron_tf"):
        (other / f"{module}.py").write_text("raise SystemExit('this one must not be imported')\n")
    (tmp_path / "pip.conf").write_text("[global]\nuser = true\n")
    leaks = {
        "PYTHONPATH": str(other),
        "PYTHONHOME": str(other),
        "PYTHONOPTIMIZE": "2",
        "PIP_USER": "1",
        "PIP_TARGET": str(tmp_path / "target"),
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "VIRTUAL_ENV": str(other),
        "CONDA_PREFIX": str(other),
        "CDPATH": str(tmp_path),
    }
    out = checkout.must_run(**leaks, PATH=f"{other / 'bin'}:{PATH}")
    assert str(checkout.root / ".venv") in out.splitlines()[-1]
    assert not (tmp_path / "target").exists()


def test_a_missing_compiler_ends_it_at_once(checkout):
    code, out, err = checkout.run(CXX="no-such-compiler")
    assert code == 1
    assert out == ""
    assert err == (
        "error: a C++20 compiler is needed, and 'no-such-compiler' is not one: install g++ (Debian: "
        "apt-get install g++) or set CXX\n"
    )
    assert not (checkout.root / ".venv").exists()


def test_an_environment_of_the_user_is_left_alone(checkout):
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "mine").write_text("")
    code, _, err = checkout.run()
    assert code == 1
    assert re.fullmatch(r"error: .*/\.venv was not made by this version of the script.*\n", err)
    assert (checkout.root / ".venv" / "mine").exists()


def test_why_pip_failed_is_shown(checkout):
    checkout.require("helper==1.0", "no-such-package==1.0")
    code, _, err = checkout.run()
    assert code == 1
    assert "No matching distribution found for no-such-package==1.0" in err
    assert err.splitlines()[-1].endswith("/.venv/setup.log has pip's whole output")


def test_it_is_made_from_scratch_for_another_list_or_place_and_built_again_for_other_sources(checkout, tmp_path):
    write_sdist(checkout.root / "wheels", "former")
    checkout.require("helper==1.0", "former==1.0")
    checkout.must_run()
    (checkout.root / "csrc" / "x.cpp").write_text("// changed")
    assert re.findall(r"== set-up (.)/3", checkout.must_run()) == ["3"]
    checkout.require("helper==1.0")
    assert "== set-up 1/3" in checkout.must_run()
    assert not list(checkout.root.rglob("former.py"))
    checkout.root = checkout.root.rename(tmp_path / "moved")
    assert "== set-up 1/3" in checkout.must_run()


@pytest.mark.parametrize(
    "arguments", [["--with"], ["--with", "latest"], ["--torch", "2.11.0"], ["--with", "newest", "--torch", "2"]]
)
def test_what_to_test_with_is_checked(arguments):
    done = subprocess.run(
        ["bash", ROOT / "tests" / "run.sh", *arguments], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 2
    assert done.stderr == "error: --with takes oldest or newest, and --torch VERSION goes with --with oldest\n"


def test_setup_py_names_a_missing_compiler(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--force", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "needs a C++20 compiler" in done.stderr
    assert "Traceback" not in done.stderr
