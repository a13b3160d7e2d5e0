"""The harness of the benchmarks: runs programs and measures them, and stores results as JSON.

A run has wall time, CPU time, memory, bytes written to a disk, and the CPU time that other programs used meanwhile.
Programs run as pipelines without a shell. Needs Linux. What is measured is defined elsewhere, e.g. in `contests.py`.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from threading import Event, Thread
from typing import IO, Any, Self, TypeAlias

import psutil

CORES = os.cpu_count() or 1
TMPFS = Path("/dev/shm")
RESULTS = Path(__file__).with_name("results")
MAX_FOREIGN = 0.05
"""Above this share of the CPU used by other programs a run is repeated, and marked as noisy."""

_MEMORY_INTERVAL = 0.05  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")
_BLOCK = 512  # bytes; the unit of ru_oublock, which Linux derives from the same counter as /proc/PID/io's write_bytes
_FIGURES = ("wall", "cpu", "memory", "written", "staged", "foreign", "size")

Arguments = Sequence[str | Path]
"""A program and its arguments."""

Process: TypeAlias = "subprocess.Popen[bytes]"
_File: TypeAlias = "IO[bytes] | int | None"


# Running and measuring programs.


class ProgramFailedError(Exception):
    """A measured program ended with an error."""


@dataclass(frozen=True)
class Step:
    """Programs that run at the same time.

    Attributes:
        pipeline: Each reads the output of the one before.
        output: Receives the output of the last one.
        others: Programs that run at the same time, outside the pipeline.
    """

    pipeline: Sequence[Arguments]
    output: Path = Path(os.devnull)
    others: Sequence[Arguments] = ()


@dataclass(frozen=True)
class Run:
    """Costs of one run.

    Attributes:
        wall: Seconds.
        cpu: Seconds of user and system time of all processes.
        memory: Bytes; the sum of each process's own peak (VmHWM), never less than the peak of all at one time.
        written: Bytes written to a disk, as Linux counts them for a process; tmpfs is not included.
        staged: Bytes of temporary files.
        foreign: Share of the machine's CPU time that other programs used, 0 to 1.
        size: Bytes of the result.
        detail: Further figures, by name.
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
    """Run steps one after the other; the iterable may look at the results of the steps before.

    Raises:
        ProgramFailedError: A program did not end with status 0.
    """
    usages = []
    with observe() as observation:
        for step in steps:
            usages += _run_step(step, observation)
    cpu = sum(usage.cpu for usage in usages)
    written = sum(usage.written or 0 for usage in usages)
    return Run(observation.wall, cpu, observation.memory, written, foreign=observation.foreign(cpu))


@dataclass
class Observation:
    """A period of time and the processes in it.

    Attributes:
        wall: Seconds; set at the end.
        busy: CPU seconds of the machine.
        own: CPU seconds of this process.
        peaks: Bytes of memory, by process id.
        roots: Ids of the processes to observe, with their children.
    """

    started: float = 0.0
    wall: float = 0.0
    busy: float = 0.0
    own: float = 0.0
    peaks: dict[int, int] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Bytes; the sum of each process's own peak."""
        return sum(self.peaks.values())

    def foreign(self, cpu: float) -> float:
        """Share of the CPU that neither this process used nor the measured ones, which used `cpu` seconds."""
        return max(0.0, (self.busy - self.own - cpu) / (self.wall * CORES))

    def read_memory(self) -> None:
        """Read the peak memory of all processes below the roots."""
        for root in tuple(self.roots):
            try:
                family = [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            for pid in family:
                self.peaks[pid] = max(self.peaks.get(pid, 0), _peak_memory(pid))


@contextmanager
def observe() -> Iterator[Observation]:
    """Observe the block; the caller adds to `roots` as processes start."""
    observation = Observation(time.perf_counter(), busy=_busy_seconds(), own=_own_seconds())
    done = Event()

    def poll() -> None:
        while not done.wait(_MEMORY_INTERVAL):
            observation.read_memory()

    poller = Thread(target=poll)
    poller.start()
    try:
        yield observation
        observation.wall = time.perf_counter() - observation.started
    finally:
        done.set()
        poller.join()
    observation.busy = _busy_seconds() - observation.busy
    observation.own = _own_seconds() - observation.own


@dataclass(frozen=True)
class Usage:
    """Resources that a process, and the children that it has waited for, have used until now.

    Attributes:
        cpu: Seconds of user and system time.
        written: Bytes written to a disk; None if Linux does not show them.
    """

    cpu: float
    written: int | None

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the usage of a process of this user.

        Linux shows the bytes written by an ended process to root only; `_wait` has them for every user.
        """
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        try:
            io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            written = int(io["write_bytes"])
        except PermissionError:
            written = None
        return cls(sum(map(int, fields[11:15])) / _TICKS, written)

    def since(self, before: "Usage") -> "Usage":
        """Return what was used between two readings."""
        if self.written is None or before.written is None:
            return Usage(self.cpu - before.cpu, None)
        return Usage(self.cpu - before.cpu, self.written - before.written)


def _run_step(step: Step, observation: Observation) -> list[Usage]:
    with TemporaryFile(dir=TMPFS) as errors:
        processes = _start_step(step, errors)
        observation.roots += [process.pid for process in processes]
        usages = [_wait(process) for process in processes]
        for process in processes:
            if process.returncode:
                errors.seek(0)
                message = errors.read()[-2000:].decode(errors="replace")
                raise ProgramFailedError(f"{process.args!r} ended with {process.returncode}: {message}")
    return usages


def _start_step(step: Step, errors: IO[bytes]) -> list[Process]:
    processes = [_start(arguments, None, subprocess.DEVNULL, errors) for arguments in step.others]
    with ExitStack() as pipes, step.output.open("wb") as output:
        upstream = None
        for arguments in step.pipeline:
            is_last = arguments is step.pipeline[-1]
            process = _start(arguments, upstream, output if is_last else subprocess.PIPE, errors)
            processes.append(process)
            if process.stdout is not None:
                # Our end is closed when all have started: else a program gets no SIGPIPE when its reader ends.
                upstream = pipes.enter_context(process.stdout)
    return processes


def _start(arguments: Arguments, stdin: _File, stdout: _File, stderr: _File) -> Process:
    return subprocess.Popen(arguments, stdin=stdin, stdout=stdout, stderr=stderr)


def _wait(process: Process) -> Usage:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_oublock * _BLOCK)


def _peak_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # the process has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _busy_seconds() -> float:
    """CPU seconds of the whole machine since it started, including those that a hypervisor took from it."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# Results of contests.


@dataclass(frozen=True)
class Row:
    """The runs of one contender.

    Attributes:
        name: Of the contender.
        data: Bytes of data that each run processed.
        runs: One for each round.
    """

    name: str
    data: int
    runs: Sequence[Run]

    @cached_property
    def median(self) -> Run:
        """The median of each figure."""
        figures = {figure: median(getattr(run, figure) for run in self.runs) for figure in _FIGURES}
        details = {detail: median(run.detail[detail] for run in self.runs) for detail in self.runs[0].detail}
        return Run(**figures, detail=details)

    @property
    def pace(self) -> float:
        """Seconds for each byte of data."""
        return self.median.wall / self.data

    @property
    def effort(self) -> float:
        """CPU seconds for each byte of data."""
        return self.median.cpu / self.data


Rows = Mapping[str, Row]
"""By the names of the contenders."""


@dataclass(frozen=True)
class Result:
    """The result of one contest.

    Attributes:
        name: Of the contest.
        title: Of the contest, for its table.
        when: ISO 8601.
        rows: In the order of the table; none if it could not run.
        reason: Why it could not run.
    """

    name: str
    title: str
    when: str
    rows: Sequence[Row]
    reason: str = ""

    @property
    def by_name(self) -> Rows:
        """The rows by the names of their contenders."""
        return {row.name: row for row in self.rows}


def load_results(path: Path) -> list[Result]:
    """Read a file of results; none if the file does not exist."""
    if not path.exists():
        return []
    return [_parse_result(contest) for contest in json.loads(path.read_text())["contests"]]


def save_results(path: Path, results: Sequence[Result], verdicts: Iterable[Mapping[str, object]]) -> None:
    """Write a file of results, with the verdicts on the targets."""
    contests = [asdict(result) for result in results]
    write_json(path, {"machine": describe_machine(), "targets": [*verdicts], "contests": contests})


def merge_results(old: Iterable[Result], new: Iterable[Result], order: Iterable[str]) -> list[Result]:
    """Merge new results with the old ones of contests that did not run again, in this order of their names."""
    by_name = {result.name: result for result in (*old, *new)}
    return [by_name[name] for name in order if name in by_name]


def _parse_result(contest: dict[str, Any]) -> Result:
    rows = [Row(row["name"], row["data"], [Run(**run) for run in row["runs"]]) for row in contest["rows"]]
    return Result(**{**contest, "rows": rows})


# Results of all benchmarks.


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write results to a file; its folder is made if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def describe_machine() -> dict[str, object]:
    """Processor, memory, kernel and versions, for the results."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "flags": sorted({"sha_ni", "aes", "vaes", "avx2", "avx512f"} & set(cpu.get("flags", "").split())),
        "cores": CORES,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("isal", "cryptography", "thrave")},
        "programs": {name: _program_version(name) for name in ("gzip", "pigz", "igzip", "openssl", "tar")},
    }


def _program_version(name: str) -> str:
    if shutil.which(name) is None:
        return "not installed"
    argument = "version" if name == "openssl" else "--version"
    done = subprocess.run([name, argument], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0]
