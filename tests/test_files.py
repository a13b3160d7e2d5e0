"""Atomic file writes, and removal of the temporary files of dead processes."""

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


def test_remove_stale_keeps_file_of_running_process(tmp_path):
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


def test_replace_and_remove_stale_may_run_at_once(tmp_path):
    has_ended = threading.Event()

    def remove_repeatedly():
        while not has_ended.is_set():
            files.remove_stale(tmp_path)

    with ThreadPoolExecutor(3) as pool:
        removers = [pool.submit(remove_repeatedly) for _ in range(2)]
        for number in range(300):
            files.replace(tmp_path / "file", str(number).encode(), spool=tmp_path)
            assert (tmp_path / "file").read_bytes() == str(number).encode()
        has_ended.set()
        for remover in removers:
            remover.result()
    assert names(tmp_path) == ["file"]


def test_remove_stale_keeps_files_of_other_names(tmp_path):
    (tmp_path / "new-file").touch()
    files.remove_stale(tmp_path)
    assert names(tmp_path) == ["new-file"]
