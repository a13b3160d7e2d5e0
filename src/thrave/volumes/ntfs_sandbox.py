"""Reads a guest's file system in a process of its own, which can do nothing but read, answer and compute.

The library that reads NTFS is written in C and reads what a guest wrote. So it runs apart: the process is given no
file and an empty environment, asks its parent for each piece of the partition through a pipe, and confines itself
(`sandbox`) before it reads the first byte. If it cannot be confined, crashes, hangs or sends nonsense, that volume is
refused and nothing else happens.

Both ends of the pipe are here. Every message is a kind and two numbers (`_MESSAGE`)::

    to the parent    r  offset, length   read this: answered by so many bytes, nothing else
                     u  offset, length   this need not be kept
                     c  0, length        a condition that it is in: so many bytes of UTF-8 follow
                     x  number, length   refused: which of `_REFUSALS`, and so many bytes of UTF-8 follow
                     .  0, 0             that was all
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

from thrave.concurrency import later
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
)
from thrave.volumes.ntfs_reader import load
from thrave.volumes.partitions import Partition

SECONDS = 600.0
"""For one volume, by the clock: it may have to wait for its disk."""

MOST_READ = 4 << 20
"""Bytes in one piece."""

MOST_CONDITIONS = 8
"""Of one volume."""

_MESSAGE = struct.Struct("<cQQ")
_READ, _UNUSED, _CONDITION, _REFUSED, _END = b"r", b"u", b"c", b"x", b"."
_MOST_WORDS = 1000  # bytes
_REFUSALS: tuple[type[SkipRefusedError], ...] = (
    FileSystemCorruptError,
    FileSystemUnsupportedError,
    VolumeNotCleanError,
    SandboxUnavailableError,
)


def scan_unused(volume: Volume, partition: Partition) -> list[Extent]:
    """What the NTFS volume in a partition does not use.

    Args:
        volume: The disk; it is read from this thread only.
        partition: Where on it.

    Returns:
        Extents in bytes from the beginning of the disk: ascending, not touching, all within the partition.

    Raises:
        SkipRefusedError: It cannot be told for certain.
        ComponentMissingError: The library is not installed.
        VolumeError: The disk cannot be read.
    """
    check_installed()
    with _process("unused", partition.length) as process:
        return list(_unused(process, volume, partition))


def scan_problems(volume: Volume, partition: Partition) -> Iterator[str]:
    """How the NTFS volume in a partition was left (`unmounting`).

    Args:
        volume: The disk; it is read from this thread only.
        partition: Where on it.

    Yields:
        What is not as it should be, at most MOST_CONDITIONS times, in words that a terminal may show.

    Raises:
        SkipRefusedError: It cannot be told; possibly after something else was.
        ComponentMissingError: The library is not installed.
        VolumeError: The disk cannot be read.
    """
    check_installed()
    with _process("conditions", partition.length) as process:
        yield from _conditions(process, volume, partition)


def check_sandbox() -> None:
    """Confine a process that then reads nothing.

    Raises:
        SandboxUnavailableError: It cannot be confined on this host.
        FileSystemCorruptError: It did not live through it.
        ComponentMissingError: The library is not installed.
    """
    check_installed()
    with _process("nothing", 0) as process:
        if _MESSAGE.unpack(head := _exactly(process, _MESSAGE.size))[0] != _END:
            _, number, length = _MESSAGE.unpack(head)
            raise _REFUSALS[number](_words(process, length))


def check_installed() -> None:
    """Raise ComponentMissingError if the library is not installed."""
    if find_spec("pytsk3") is None:
        raise ToolNotInstalled("pytsk3", "'thrave[ntfs]'", installer="pip install")


@contextmanager
def _process(task: str, length: int) -> Iterator[Program]:
    """The surveyor, which does not outlive the block nor SECONDS."""
    argv = [sys.executable, "-P", "-B", "-m", __name__, task, str(length)]
    # An empty environment; where Python finds this package is no secret.
    variables = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    try:
        process = Program(argv, timeout=math.inf, variables=variables, output="piped")
    except ProgramError as error:
        raise SandboxUnavailableError(str(error)) from error
    try:
        disarm = later("surveyor alarm", SECONDS, lambda: process.signal(signal.SIGKILL))
        try:
            yield process
        finally:
            disarm()
    finally:
        process.kill()


def _unused(process: Program, volume: Volume, partition: Partition) -> Iterator[Extent]:
    told, end = 0, 0
    for kind, first, second in _told(process, volume, partition):
        if kind != _UNUSED or not end <= first < first + second <= partition.length or told >= 2 * ntfs_scan.MOST_HOLES:
            _astray()
        told, end = told + 1, first + second
        yield Extent(partition.offset + first, second)


def _conditions(process: Program, volume: Volume, partition: Partition) -> Iterator[str]:
    for told, (kind, _, length) in enumerate(_told(process, volume, partition)):
        if kind != _CONDITION or length > _MOST_WORDS or told >= MOST_CONDITIONS:
            _astray()
        yield _words(process, length)


def _told(process: Program, volume: Volume, partition: Partition) -> Iterator[tuple[bytes, int, int]]:
    """Answer the surveyor's questions until it has told everything, and pass on what it tells. It is not trusted."""
    while True:
        kind, first, second = _MESSAGE.unpack(_exactly(process, _MESSAGE.size))
        if kind == _READ and second <= MOST_READ and first + second <= partition.length:
            _answer(process, volume, partition.offset + first, second)
        elif kind == _REFUSED and first < len(_REFUSALS) and second <= _MOST_WORDS:
            raise _REFUSALS[first](_words(process, second))
        elif kind == _END:
            return
        elif kind in (_UNUSED, _CONDITION):
            yield kind, first, second
        else:
            _astray()


def _astray() -> NoReturn:
    raise FileSystemCorruptError("reading it led the reader astray")


def _words(process: Program, length: int) -> str:
    """What it says, without anything that would move a terminal."""
    words = _exactly(process, length).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def _answer(process: Program, volume: Volume, offset: int, length: int) -> None:
    buffer = bytearray(length)
    volume.read_into(offset, memoryview(buffer))
    with suppress(BrokenPipeError):  # it has ended: there will be no next message, and that is told then
        process.stdin.write(buffer)
        process.stdin.flush()


def _exactly(process: Program, length: int) -> bytes:
    data = process.stdout.read(length)
    if len(data) == length:
        return data
    finished = process.poll(math.inf)  # the alarm ends it
    assert finished is not None
    status = finished.status
    how = signal.strsignal(-status) if status < 0 else f"exit status {status}"
    raise FileSystemCorruptError(f"reading it took too long, too much memory, or broke the reader ({how})")


class _Pipe:
    """The partition, as the surveyor sees it."""

    def __init__(self, size: int, questions: IO[bytes], answers: IO[bytes]) -> None:
        self.size = size
        self._questions = questions
        self._answers = answers

    def read(self, offset: int, length: int) -> bytes:
        """Ask for a piece; less at the end of the partition."""
        length = max(0, min(length, self.size - offset, MOST_READ))
        self.tell(_READ, offset, length)
        return self._answers.read(length)

    def tell(self, kind: bytes, first: int, second: int, words: bytes = b"") -> None:
        self._questions.write(_MESSAGE.pack(kind, first, second) + words)
        self._questions.flush()


def main() -> None:
    """Do a task, the first argument, on the volume whose size in bytes is the second.

    Questions go to stdout, answers come from stdin.
    """
    load()
    do = {"unused": _tell_unused, "conditions": _tell_conditions, "nothing": _tell_nothing}[sys.argv[1]]
    pipe = _Pipe(int(sys.argv[2]), sys.stdout.buffer, sys.stdin.buffer)
    try:
        _give_up_rights()
        do(pipe)
        pipe.tell(_END, 0, 0)
    except _REFUSALS as refusal:
        words = refusal.reason.encode()[:_MOST_WORDS]
        pipe.tell(_REFUSED, _REFUSALS.index(type(refusal)), len(words), words)


def _tell_nothing(_pipe: _Pipe) -> None:
    pass


def _tell_unused(pipe: _Pipe) -> None:
    for extent in ntfs_scan.find_unused(pipe):
        pipe.tell(_UNUSED, *extent)


def _tell_conditions(pipe: _Pipe) -> None:
    for condition in ntfs_scan.find_problems(pipe):
        words = condition.encode()[:_MOST_WORDS]
        pipe.tell(_CONDITION, 0, len(words), words)


def _give_up_rights() -> None:
    """Confine this process. What is open stays open: the two pipes."""
    try:
        sandbox.confine()
    except (sandbox.ConfinementError, OSError) as error:
        raise SandboxUnavailableError(f"the process that reads it cannot be confined on this host ({error})") from error


if __name__ == "__main__":
    main()
