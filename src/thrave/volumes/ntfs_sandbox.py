"""Scans NTFS volumes (`ntfs_scan`) in a confined child process, since pytsk3 is C code that reads untrusted bytes.

The child has no open file and an empty environment. It requests each piece of the partition from its parent through a
pipe, and confines itself (`sandbox`) before it reads the first byte. If it cannot be confined, crashes, hangs or sends
invalid messages, the volume is refused, with no other effect. Both sides of the pipe are here; see `_MESSAGE`.
"""

import math
import os
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import IO, NoReturn

from thrave.concurrency import start_later
from thrave.programs import Program, ProgramError
from thrave.volumes import ntfs_scan, sandbox
from thrave.volumes.base import Extent, Volume
from thrave.volumes.errors import (
    FileSystemCorruptError,
    FileSystemUnsupportedError,
    SandboxUnavailableError,
    SkipRefusedError,
    ToolNotInstalled,
    VolumeNotCleanError,
    printable,
)
from thrave.volumes.ntfs_reader import load_library
from thrave.volumes.partitions import Partition

SCAN_TIMEOUT = 600.0
"""Seconds for one volume, including the time that its disk needs."""

MAX_READ = 4 << 20
"""Bytes in one read request."""

MAX_PROBLEMS = 8
"""Problems of one volume."""

# A message of the child is a kind and two numbers:
#   r  offset, length   read request; the parent answers with exactly this many bytes, without a header
#   u  offset, length   an unused range
#   c  0, length        a problem: this many bytes of UTF-8 follow
#   x  index, length    refused: the index in `_REFUSALS`; this many bytes of UTF-8 follow
#   .  0, 0             the end
_MESSAGE = struct.Struct("<cQQ")
_READ, _UNUSED, _PROBLEM, _REFUSED, _END = b"r", b"u", b"c", b"x", b"."
_MAX_TEXT = 1000  # bytes
_REFUSALS: tuple[type[SkipRefusedError], ...] = (
    FileSystemCorruptError,
    FileSystemUnsupportedError,
    VolumeNotCleanError,
    SandboxUnavailableError,
)


def scan_unused(volume: Volume, partition: Partition) -> list[Extent]:
    """Return the unused ranges of the NTFS volume in a partition.

    Args:
        volume: The disk; it is read from this thread only.
        partition: The partition.

    Returns:
        Extents in bytes from the beginning of the disk: ascending, not touching, within the partition.

    Raises:
        SkipRefusedError: They cannot be determined reliably.
        ToolNotInstalled: pytsk3 is not installed.
        VolumeError: The disk cannot be read.
    """
    check_installed()
    with _process("unused", partition.length) as process:
        return list(_receive_unused(process, volume, partition))


def scan_problems(volume: Volume, partition: Partition) -> Iterator[str]:
    """Report every sign that the NTFS volume in a partition was not unmounted.

    Args:
        volume: The disk; it is read from this thread only.
        partition: The partition.

    Yields:
        Messages without control characters, at most MAX_PROBLEMS.

    Raises:
        SkipRefusedError: The volume cannot be checked, perhaps after some messages.
        ToolNotInstalled: pytsk3 is not installed.
        VolumeError: The disk cannot be read.
    """
    check_installed()
    with _process("problems", partition.length) as process:
        yield from _receive_problems(process, volume, partition)


def check_sandbox() -> None:
    """Start and confine a process that reads nothing.

    Raises:
        SandboxUnavailableError: It cannot be confined on this host.
        FileSystemCorruptError: It was killed.
        ToolNotInstalled: pytsk3 is not installed.
    """
    check_installed()
    with _process("nothing", 0) as process:
        kind, index, length = _MESSAGE.unpack(_read_exactly(process, _MESSAGE.size))
        if kind != _END:
            raise _REFUSALS[index](_read_text(process, length))


def check_installed() -> None:
    """Raise ToolNotInstalled if pytsk3 is not installed."""
    if find_spec("pytsk3") is None:
        raise ToolNotInstalled("pytsk3", "'thrave[ntfs]'", installer="pip install")


@contextmanager
def _process(task: str, length: int) -> Iterator[Program]:
    """Start the child process; kill it at the end of the block, or after SCAN_TIMEOUT."""
    argv = [sys.executable, "-P", "-B", "-m", __name__, task, str(length)]
    # Empty but for the path of this package, which is not secret.
    variables = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    try:
        process = Program(argv, timeout=math.inf, variables=variables, output="piped")
    except ProgramError as error:
        raise SandboxUnavailableError(str(error)) from error
    try:
        cancel_timeout = start_later("ntfs scan timeout", SCAN_TIMEOUT, lambda: process.signal(signal.SIGKILL))
        try:
            yield process
        finally:
            cancel_timeout()
    finally:
        process.kill()


def _receive_unused(process: Program, volume: Volume, partition: Partition) -> Iterator[Extent]:
    count, end = 0, 0
    for kind, offset, length in _receive(process, volume, partition):
        is_valid = kind == _UNUSED and end <= offset < offset + length <= partition.length
        if not is_valid or count >= 2 * ntfs_scan.MAX_HOLES:
            _raise_invalid_message()
        count, end = count + 1, offset + length
        yield Extent(partition.offset + offset, length)


def _receive_problems(process: Program, volume: Volume, partition: Partition) -> Iterator[str]:
    for count, (kind, _, length) in enumerate(_receive(process, volume, partition)):
        if kind != _PROBLEM or length > _MAX_TEXT or count >= MAX_PROBLEMS:
            _raise_invalid_message()
        yield _read_text(process, length)


def _receive(process: Program, volume: Volume, partition: Partition) -> Iterator[tuple[bytes, int, int]]:
    """Answer the read requests of the child until it ends; yield its other messages, which are untrusted."""
    while True:
        kind, first, second = _MESSAGE.unpack(_read_exactly(process, _MESSAGE.size))
        if kind == _READ and second <= MAX_READ and first + second <= partition.length:
            buffer = bytearray(second)
            volume.read_into(partition.offset + first, memoryview(buffer))
            with suppress(BrokenPipeError):  # the child has ended; reading its next message raises the error
                process.stdin.write(buffer)
                process.stdin.flush()
        elif kind == _REFUSED and first < len(_REFUSALS) and second <= _MAX_TEXT:
            raise _REFUSALS[first](_read_text(process, second))
        elif kind == _END:
            return
        elif kind in (_UNUSED, _PROBLEM):
            yield kind, first, second
        else:
            _raise_invalid_message()


def _raise_invalid_message() -> NoReturn:
    raise FileSystemCorruptError("the process that read it sent an invalid message")


def _read_text(process: Program, length: int) -> str:
    return printable(_read_exactly(process, length).decode("utf-8", "replace"))


def _read_exactly(process: Program, length: int) -> bytes:
    data = process.stdout.read(length)
    if len(data) == length:
        return data
    finished = process.poll(math.inf)  # ends at SCAN_TIMEOUT at the latest
    assert finished is not None
    status = finished.status
    cause = signal.strsignal(-status) if status < 0 else f"exit status {status}"
    raise FileSystemCorruptError(f"reading it took too long, needed too much memory, or crashed the reader ({cause})")


class _ParentPipe:
    """The child's side of the pipe: the partition as a `Source`, and messages to the parent."""

    def __init__(self, size: int, requests: IO[bytes], answers: IO[bytes]) -> None:
        self.size = size
        self._requests = requests
        self._answers = answers

    def read(self, offset: int, length: int) -> bytes:
        """Request a piece from the parent; shorter at the end of the partition."""
        length = max(0, min(length, self.size - offset, MAX_READ))
        self.send(_READ, offset, length)
        return self._answers.read(length)

    def send(self, kind: bytes, first: int, second: int, text: bytes = b"") -> None:
        self._requests.write(_MESSAGE.pack(kind, first, second) + text)
        self._requests.flush()


def main() -> None:
    """Run a task in the child: the first argument; the second is the size of the partition in bytes.

    Messages go to stdout; the bytes of the partition come from stdin.
    """
    load_library()
    task = {"unused": _send_unused, "problems": _send_problems, "nothing": _send_nothing}[sys.argv[1]]
    pipe = _ParentPipe(int(sys.argv[2]), sys.stdout.buffer, sys.stdin.buffer)
    try:
        _confine()
        task(pipe)
        pipe.send(_END, 0, 0)
    except _REFUSALS as refusal:
        text = refusal.reason.encode()[:_MAX_TEXT]
        pipe.send(_REFUSED, _REFUSALS.index(type(refusal)), len(text), text)


def _send_nothing(_pipe: _ParentPipe) -> None:
    pass


def _send_unused(pipe: _ParentPipe) -> None:
    for extent in ntfs_scan.find_unused(pipe):
        pipe.send(_UNUSED, *extent)


def _send_problems(pipe: _ParentPipe) -> None:
    for problem in ntfs_scan.find_problems(pipe):
        text = problem.encode()[:_MAX_TEXT]
        pipe.send(_PROBLEM, 0, len(text), text)


def _confine() -> None:
    """Confine this process. The two pipes stay open."""
    try:
        sandbox.confine()
    except (sandbox.ConfinementError, OSError) as error:
        raise SandboxUnavailableError(f"the process that reads it cannot be confined on this host ({error})") from error


if __name__ == "__main__":
    main()
