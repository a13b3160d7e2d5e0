"""`thrave`, forked from a process that has already imported it: starts in a tenth of two seconds.

It is the product's own command, from its first line on, in a process of its own: with the environment, the working
directory and the umask of the test, and its stdout and stderr piped as a program's are. Tests of what comes before that
(signals while it is imported, limits of the process, variables that Python itself reads) start the program.

Nothing else is imported here, since every process that is forked imports this.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from thrave.testing import ThraveServer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "thrave.server",
        "thrave.testing",
        "thrave.cli.server_commands",
        "thrave.cli.output",
        "thrave.logs",
        "alembic.command",
    ]
)


class ForkedServer(ThraveServer):
    """`thrave serve` without the time that its imports take."""

    def _launch(self, arguments, environment, stderr):
        return fork_thrave(arguments, environment, stderr=stderr)


def fork_thrave(arguments, environment, *, stderr=2, before=""):
    """Run `thrave` with these arguments and this environment; give its process, to be used as one of subprocess's.

    `before` is Python code, which it runs before the command.
    """
    stdout, its_stdout = _CONTEXT.Pipe(duplex=False)
    its_stderr = Connection(os.dup(stderr), readable=False)
    words = ["thrave", *map(str, arguments)]
    place = Path.cwd(), _umask()
    process = _Process(target=_run, args=[words, {**environment}, *place, its_stdout, its_stderr, before], daemon=True)
    with stdout, its_stdout, its_stderr:
        process.start()
        process.args = words
        process.stdout = os.fdopen(os.dup(stdout.fileno()))
    return process


def run_thrave(arguments, environment, *, before="", timeout=120):
    """Run `thrave` until it ends, as `fork_thrave`; return the result as `subprocess.run` with the output as text."""
    with tempfile.TemporaryFile("w+") as errors:
        process = fork_thrave(arguments, environment, stderr=errors.fileno(), before=before)
        try:
            stdout, _ = process.communicate(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout)
            raise
        errors.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, errors.read())


class _Process(_CONTEXT.Process):
    def poll(self):
        return self.exitcode

    @property
    def returncode(self):
        return self.exitcode

    def send_signal(self, number):
        # The fork server is the parent, and reports the end a moment after the process is gone.
        with suppress(ProcessLookupError):
            if self.is_alive():
                os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.exitcode

    def communicate(self, timeout=None):
        self.wait(timeout)
        if self.stdout.closed:
            return "", None
        with self.stdout:
            return self.stdout.read(), None


def _umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _run(words, environment, folder, umask, stdout, stderr, before):
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    exec(before, {})
    from thrave.cli.main import main

    main()
