"""Pastes the shell blocks of a page into a new interactive shell on a terminal, as a reader does.

Standard library only: scripts/paste_docs.py runs it where nothing else is installed.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
INSTALL = re.compile(r"(?:^ +|`)((?:sudo\s+apt-get|pip)\s+install [^`]*?)(?:`|$)", re.MULTILINE)
"""A command in a line of its own, indented, or in backquotes."""
HOST_PAGES = {
    "bundle-libvirt-guests", "keep-guests-running", "prepare-a-windows-guest", "restore-as-a-libvirt-guest",
}  # fmt: skip
"""Pages for root on a host with systemd and libvirt."""
CONTAINER_PAGES = {"run-in-containers"}
"""Pages that need root, Podman and an image registry: tests/packaging/test_containers.py has replacements."""
INSTALLATION_PAGES = {"install-and-upgrade"}
"""Pages that install Thrave with pip: tests/packaging/test_upgrade.py has two versions of Thrave."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")
_PASTE_BEGIN, _PASTE_END = b"\x1b[200~", b"\x1b[201~"  # "bracketed paste" of xterm: bash runs nothing before the end
_DONE = re.compile(rb"\x1b\]133;D;(\d+)\x07")
_REPORT_DONE = b" printf '\\033]133;D;%s\\007' $?\n"
"""Typed after each block: reports its exit status. The echo of this line has no escape character."""
_READ_INTERVAL = 0.2  # seconds


class Pasted(NamedTuple):
    """The result of a page: how many of its blocks were executed, the shell's exit status, and the terminal's text."""

    session: int
    blocks: int
    status: int
    output: str


def blocks_of(text: str, *, without: Sequence[str] = ()) -> list[str]:
    """Return the shell blocks of a page, except those of the sections named `without`."""
    for heading, body in SECTION.findall(text):
        if heading in without:
            text = text.replace(body, "")
    return BLOCK.findall(text)


def install_commands(text: str) -> list[str]:
    """Return the commands that a page gives for installing what it needs."""
    sections = dict(SECTION.findall(text))
    return [" ".join(command.split()) for command in INSTALL.findall(sections.get("Before you begin", ""))]


def paste(
    blocks: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    *,
    timeout: float,
    prefix: Sequence[str] = (),
) -> Pasted:
    """Paste blocks one after the other into a new `bash --norc` in a folder, and leave it.

    Args:
        blocks: Each is pasted when the previous one has ended.
        environment: The whole environment of the shell; its PATH also finds bash.
        timeout: Seconds for the page. Then the whole session is killed.
        prefix: A program that executes the shell, with its arguments.

    Returns:
        Status 0: every block was executed, and the shell ended with success. Processes that the page leaves running
        are still there: `running` finds them with the shell's session, which is killed only after a timeout.
    """
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (40, 120))
    shell = subprocess.Popen(
        [*prefix, shutil.which("setsid"), "--ctty", "bash", "--norc"],
        cwd=folder,
        env={"TERM": "xterm", "LANG": "C.UTF-8", "HISTFILE": "", **environment},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    deadline = time.monotonic() + timeout
    output = bytearray()
    executed = 0
    block_status: int | None = 0
    try:
        for block in blocks:
            _write(controller, _PASTE_BEGIN + block.encode() + _PASTE_END + b"\n" + _REPORT_DONE, output)
            block_status = _read_until_done(controller, shell, output, deadline)
            if block_status != 0:
                break
            executed += 1
        _write(controller, b"exit\n", output)
        _read_until_done(controller, shell, output, deadline)
        try:
            status = shell.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            output += f"\nnot finished after {timeout:.0f} seconds\n".encode()
            kill_session(shell.pid)
            status = shell.wait()
    finally:
        if shell.poll() is None:
            kill_session(shell.pid)
        os.close(controller)
    # A page may leave its shell in its last block.
    if status == 0 and executed < len(blocks) - 1:
        output += f"\nthe shell ended after {executed} of {len(blocks)} blocks\n".encode()
        status = 1
    return Pasted(shell.pid, executed, block_status or status, ESCAPES.sub("", output.decode(errors="replace")))


def running(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                # proc(5): after the name in parentheses come state, parent, group and session.
                state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.append(int(folder.name))
    return found


def kill_session(session: int) -> None:
    """Kill every process of a session."""
    while processes := running(session):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _read_until_done(controller: int, shell: subprocess.Popen[bytes], output: bytearray, deadline: float) -> int | None:
    """Read until the block has ended; return its status, or None if the shell ended or the time is over."""
    begin = len(output)
    while time.monotonic() < deadline:
        readable, _, _ = select.select([controller], [], [], _READ_INTERVAL)
        if readable:
            try:
                output += os.read(controller, 65536)
            except OSError:  # EIO: no process has the terminal open
                return None
            if done := _DONE.search(output, begin):
                return int(done[1])
        elif shell.poll() is not None:
            return None
    return None


def _write(controller: int, data: bytes, output: bytearray) -> None:
    """Write to the terminal; read meanwhile, because it does not accept more while its echo is not read."""
    while data:
        readable, writable, _ = select.select([controller], [controller], [], _READ_INTERVAL)
        try:
            if readable:
                output += os.read(controller, 65536)
            if writable:
                data = data[os.write(controller, data[:256]) :]
        except OSError:  # EIO: the shell has ended, which the next read reports
            return
