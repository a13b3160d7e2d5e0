"""Environment, limits and end of started programs."""

import os
import signal
import socket
import sys

import psutil
import pytest

from support.eventually import eventually
from thrave import programs
from thrave.programs import Program, ProgramNotStartedError, ProgramOutputError, ProgramTimeoutError, run

LONG = 600.0  # seconds; no test waits for it


def python(code, *words):
    return [sys.executable, "-c", code, *map(str, words)]


def test_run_returns_output_and_status():
    done = run(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), timeout=LONG)
    assert (done.status, done.text, done.error_text) == (3, "out\n", "err\n")


def test_run_passes_only_listed_variables(monkeypatch):
    for name in ("THRAVE_S3_SECRET_ACCESS_KEY", "THRAVE_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "OTHER"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "UTC")
    seen = dict(line.split("=", 1) for line in run(["env"], timeout=LONG).text.splitlines())
    assert set(seen) <= {*programs.INHERITED, "LC_ALL"}
    assert (seen["LC_ALL"], seen["TZ"], seen["PATH"]) == ("C", "UTC", os.environ["PATH"])
    assert run(["/usr/bin/env"], timeout=LONG, variables={}).out == b""


def test_run_passes_only_named_descriptors(tmp_path):
    (tmp_path / "file").write_text("content")
    with (tmp_path / "file").open() as named, (tmp_path / "file").open() as other:
        os.set_inheritable(other.fileno(), True)  # noqa: FBT003 (has no name)
        done = run(["ls", "/proc/self/fd"], timeout=LONG, pass_fds=[named.fileno()])
        # One more: the folder that ls reads.
        assert str(named.fileno()) in done.text.split()
        assert len(done.text.split()) == 5


def test_run_starts_new_session():
    session = int(run(python("import os; print(os.getsid(0))"), timeout=LONG).text)
    assert session != os.getsid(0)


def test_timeout_kills_children(tmp_path):
    pid_file = tmp_path / "child"
    script = f"sleep 1000 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    program = Program(["sh", "-c", script], timeout=1.0)
    eventually(pid_file.exists)
    with pytest.raises(ProgramTimeoutError, match="took more than 1 seconds"):
        program.poll(LONG)
    child = int(pid_file.read_text())
    eventually(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("then", ["while True: pass", ""])
def test_run_ends_program_with_too_much_output(stream, then):
    code = f"import sys; sys.{stream}.write('x' * 2000); sys.{stream}.flush()\n{then}"
    with pytest.raises(ProgramOutputError, match="more than 1000 bytes"):
        run(python(code), timeout=LONG, max_output=1000)


def test_child_that_keeps_running_cannot_write_more_output(tmp_path):
    ended, failed = tmp_path / "ended", tmp_path / "failed"
    child = f"while ! [ -e {ended} ]; do sleep 0.02; done; echo more 2>/dev/null || touch {failed}"
    done = run(["sh", "-c", f"echo started; ( {child} ) & exit 0"], timeout=LONG)
    assert done.text == "started\n"
    ended.touch()
    eventually(failed.exists)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["/nowhere"], "No such file"), (["/etc/passwd"], "Permission denied"), (["a\0b"], "null byte")],
)
def test_run_names_reason_if_program_cannot_be_started(argv, message):
    with pytest.raises(ProgramNotStartedError, match=message):
        run(argv, timeout=LONG)


def test_run_refuses_executable_file_without_program(tmp_path):
    (tmp_path / "script").write_text("no program")
    (tmp_path / "script").chmod(0o755)
    with pytest.raises(ProgramNotStartedError, match="Exec format error"):
        run([str(tmp_path / "script")], timeout=LONG)


def test_run_raises_error_of_pause():
    def pause(_seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["sleep", "1000"], timeout=LONG, pause=pause)


def test_program_has_memory_limit():
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CORE))"
    waiting = f"import sys, time\nwhile True:\n  {code}\n  sys.stdout.flush(); time.sleep(0.01)"
    program = Program(python(waiting), timeout=LONG, output="piped", max_memory=1 << 30)
    try:
        eventually(lambda: program.stdout.readline() == b"(1073741824, 1073741824) (0, 0)\n")
    finally:
        program.kill()


def test_program_gets_listening_socket(tmp_path):
    code = (
        "import os, socket; assert os.environ['LISTEN_PID'] == str(os.getpid()) and os.environ['LISTEN_FDS'] == '1'\n"
        "listener = socket.socket(fileno=3); listener.accept()[0].sendall(b'hello')"
    )
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        client.connect(str(tmp_path / "s"))
        program = Program(python(code), timeout=LONG, listener=listener.fileno())
        listener.close()
        assert client.recv(100) == b"hello", program.poll(LONG)
        assert program.poll(LONG).status == 0


def test_drop_output_keeps_no_later_output(tmp_path):
    script = f"echo first; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo second 2>/dev/null; true"
    program = Program(["sh", "-c", script], timeout=LONG)
    eventually(lambda: not program._kept or os.fstat(program._kept[0]).st_size)
    program.drop_output()
    (tmp_path / "go").touch()
    assert program.poll(LONG).text == "first\n"


def test_kill_may_be_repeated():
    program = Program(["sleep", "1000"], timeout=LONG)
    program.kill()
    program.kill()
    assert program.poll().status == -signal.SIGKILL
