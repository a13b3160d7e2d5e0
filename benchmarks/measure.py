"""Runs programs and says what they cost: wall time, CPU seconds, memory, bytes written to a disk, and the others' CPU.

Programs run as pipelines without a shell. A run's memory is the sum of each process's own peak (VmHWM), which is never
less than the true peak of them all at once. Bytes written to a disk are those that Linux accounts to the process; they
do not include tmpfs, where all outputs go. Needs Linux.
"""

import os
import resource
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Thread
from typing import IO, Self, TypeAlias

import psutil

CORES = os.cpu_count() or 1
TMPFS = Path("/dev/shm")
_LOOK_EVERY = 0.05  # seconds between two looks at memory
_TICKS = os.sysconf("SC_CLK_TCK")
_BLOCK = 512  # bytes; the unit of ru_oublock, which Linux derives from the same counter as /proc/PID/io's write_bytes

Arguments = Sequence[str | Path]
"""A program and its arguments."""

Process: TypeAlias = "subprocess.Popen[bytes]"
_File: TypeAlias = "IO[bytes] | int | None"


class ProgramFailedError(Exception):
    """A program that is measured ended with an error."""


@dataclass(frozen=True)
class Step:
    """Programs that run at the same time.

    Attributes:
        pipeline: each reads what the one before writes.
        output: where the last one's output goes.
        beside: others that run beside them.
    """

    pipeline: Sequence[Arguments]
    output: Path = Path(os.devnull)
    beside: Sequence[Arguments] = ()


@dataclass(frozen=True)
class Run:
    """What one run cost.

    Attributes:
        wall: seconds.
        cpu: seconds of user and system time, of all its processes.
        memory: bytes; the sum of the processes' own peaks.
        written: bytes written to a disk.
        staged: bytes of files that were written on the way and are not the result.
        foreign: share of the machine's CPU time that others used meanwhile, 0 to 1.
        size: bytes of the result.
        detail: what else the run has to say.
    """

    wall: float
    cpu: float
    memory: int = 0
    written: int = 0
    staged: int = 0
    foreign: float = 0.0
    size: int = 0
    detail: dict[str, float] = field(default_factory=dict)


def run(steps: Iterable[Step]) -> Run:
    """Run steps one after the other; each is asked for when the one before has ended.

    Raises:
        ProgramFailedError: one of the programs did not end with 0.
    """
    usages = []
    with observed() as seen:
        for step in steps:
            usages += _run_step(step, seen)
    cpu = sum(usage.cpu for usage in usages)
    written = sum(usage.written for usage in usages)
    return Run(seen.wall, cpu, seen.memory, written, foreign=seen.foreign(cpu))


@dataclass
class Observed:
    """What was seen of a stretch of time and of the processes in it."""

    began: float = 0.0
    wall: float = 0.0
    busy: float = 0.0
    own: float = 0.0
    peaks: dict[int, int] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Bytes; the sum of the processes' own peaks."""
        return sum(self.peaks.values())

    def foreign(self, cpu: float) -> float:
        """The share of the CPU that neither this program nor the measured ones, with `cpu` seconds, used."""
        return max(0.0, (self.busy - self.own - cpu) / (self.wall * CORES))

    def look(self) -> None:
        """Look at the memory of all processes below the roots."""
        for root in tuple(self.roots):
            try:
                family = [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            for pid in family:
                self.peaks[pid] = max(self.peaks.get(pid, 0), _peak_memory(pid))


@contextmanager
def observed() -> Iterator[Observed]:
    """Observe a stretch of time; the caller fills in `roots` as processes begin."""
    seen = Observed(time.perf_counter(), busy=_busy_seconds(), own=_own_seconds())
    done = Event()

    def watch() -> None:
        while not done.wait(_LOOK_EVERY):
            seen.look()

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield seen
        seen.wall = time.perf_counter() - seen.began
    finally:
        done.set()
        watcher.join()
    seen.busy = _busy_seconds() - seen.busy
    seen.own = _own_seconds() - seen.own


@dataclass(frozen=True)
class Usage:
    """What a process and the children that it has waited for have used so far.

    Attributes:
        cpu: Seconds of user and system time.
        written: Bytes written to a disk; None if Linux does not show them.
    """

    cpu: float
    written: int | None

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the usage of a process of this user.

        Linux shows the bytes written by a process that has ended to root only; `_ended` has them for everybody.
        """
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        try:
            io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            written = int(io["write_bytes"])
        except PermissionError:
            written = None
        return cls(sum(map(int, fields[11:15])) / _TICKS, written)

    def since(self, before: "Usage") -> "Usage":
        """Return what was used between two measurements."""
        known = self.written is not None and before.written is not None
        return Usage(self.cpu - before.cpu, self.written - before.written if known else None)


def _run_step(step: Step, seen: Observed) -> list[Usage]:
    with TemporaryFile(dir=TMPFS) as errors:
        processes = _started(step, errors)
        seen.roots += [process.pid for process in processes]
        usages = [_ended(process) for process in processes]
        for process in processes:
            if process.returncode:
                errors.seek(0)
                said = errors.read()[-2000:].decode(errors="replace")
                raise ProgramFailedError(f"{process.args!r} ended with {process.returncode}: {said}")
    return usages


def _started(step: Step, errors: IO[bytes]) -> list[Process]:
    processes = [_start(arguments, None, subprocess.DEVNULL, errors) for arguments in step.beside]
    with ExitStack() as pipes, step.output.open("wb") as output:
        upstream = None
        for arguments in step.pipeline:
            last = arguments is step.pipeline[-1]
            process = _start(arguments, upstream, output if last else subprocess.PIPE, errors)
            processes.append(process)
            if process.stdout is not None:
                # Closed here in the end, or a program would not notice that its reader has gone.
                upstream = pipes.enter_context(process.stdout)
    return processes


def _start(arguments: Arguments, given: _File, said: _File, errors: _File) -> Process:
    return subprocess.Popen(arguments, stdin=given, stdout=said, stderr=errors)


def _ended(process: Process) -> Usage:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_oublock * _BLOCK)


def _peak_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _busy_seconds() -> float:
    """CPU seconds of the whole machine since it started, with what the host took from it."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
