"""Files that are whole or not there, and what a process leaves that dies while it writes one."""

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from thrave import files

WRITER = """
import os, sys
from pathlib import Path
from thrave import files
os.fsync = lambda descriptor: (print("writing", flush=True), sys.stdin.read())
files.replace(Path(sys.argv[1]) / "file", b"content", spool=Path(sys.argv[1]))
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_somebody_is_writing_is_not_swept_and_what_a_dead_one_wrote_is(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"writing\n"
        files.remove_stale(tmp_path)
        (unfinished,) = names(tmp_path)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert names(tmp_path) == [unfinished]
    files.remove_stale(tmp_path)
    assert names(tmp_path) == []


def test_writers_and_sweepers_do_not_disturb_each_other(tmp_path):
    over = threading.Event()

    def sweep():
        while not over.is_set():
            files.remove_stale(tmp_path)

    with ThreadPoolExecutor(3) as pool:
        sweepers = [pool.submit(sweep) for _ in range(2)]
        for number in range(300):
            files.replace(tmp_path / "file", str(number).encode(), spool=tmp_path)
            assert (tmp_path / "file").read_bytes() == str(number).encode()
        over.set()
        for sweeper in sweepers:
            sweeper.result()
    assert names(tmp_path) == ["file"]


def test_files_of_other_names_are_not_swept(tmp_path):
    (tmp_path / "new-file").touch()
    files.remove_stale(tmp_path)
    assert names(tmp_path) == ["new-file"]
