"""Python processes that start quickly because they are forked from a server with all imports.

Starting Python and importing torch takes four seconds of CPU time, most of the time of a small command.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

from tests.support.paths import ROOT


@cache
def context():
    """Return the multiprocessing context whose server has imported the packages."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.preload"])
    before = Path.cwd()
    os.chdir(ROOT)  # the server imports from the directory that it starts in
    forkserver.ensure_running()
    os.chdir(before)
    return found


class PythonProcess:
    """`python -m MODULE ARGS` or `python FILE ARGS`, with the methods of subprocess.Popen that tests use.

    Its output goes to files; `merged` appends it to the output of another process.
    """

    def __init__(self, command, *, environment, cwd=ROOT, own_session=False, merged=None):
        self.args = list(map(str, command))
        self._out = merged._out if merged else _output()
        self._error = merged._error if merged else _output()
        arguments = (self.args, dict(environment), str(cwd), self._out.name, self._error.name, own_session)
        self._process = context().Process(target=_become, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        atexit.register(self._process.kill)  # otherwise pytest would wait for it at exit

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, self._out.read(), self._error.read())
        atexit.unregister(self._process.kill)
        return self._process.exitcode

    def communicate(self, timeout=None):
        """Return (standard output, standard error) of the ended process."""
        self.wait(timeout)
        return self._out.read(), self._error.read()

    def read(self):
        """Return what it has written to standard output since the last call."""
        return self._out.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _output():
    return tempfile.NamedTemporaryFile("r")


def run_python(command, *, environment, cwd=ROOT, timeout=120):
    """Run a command to its end and return the process."""
    return _finish([PythonProcess(command, environment=environment, cwd=cwd)], command, timeout)


def run_ranks(command, ranks, *, environment, port, cwd=ROOT, timeout=120):
    """Run the ranks of a command to their end and return them as one process; if one fails the others are killed, as
    torchrun does."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), **environment}
    processes = []
    for rank in range(ranks):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        merged = processes[0] if processes else None
        processes.append(PythonProcess(command, environment={**shared, **places}, cwd=cwd, merged=merged))
    return _finish(processes, command, timeout)


def _finish(processes, command, timeout):
    sentinels = {process._process.sentinel: process for process in processes}
    codes = []
    while sentinels:
        ended = multiprocessing.connection.wait(sentinels, timeout)
        if not ended:
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(command, timeout, *processes[0].communicate())
        codes += [sentinels.pop(sentinel).wait() for sentinel in ended]
        if any(codes):
            for process in sentinels.values():
                process.terminate()
    code = next(filter(None, codes), 0)
    return subprocess.CompletedProcess(command, code, *processes[0].communicate())


def _become(command, environment, cwd, out, error, own_session):
    """Turn this process into that of the command, until it exits."""
    if own_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, out), (2, error)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=False)
    code = _code_of(command)
    with contextlib.suppress(SystemExit):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _code_of(command):
    _python, *rest = command
    if rest[0] == "-m":
        module, sys.argv = rest[1], rest[1:]
        sys.path[0] = str(Path.cwd())
        sys.modules.pop(module, None)
    else:
        module, sys.argv = None, rest
        sys.path[0] = str(Path(rest[0]).resolve().parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
