"""The benchmark of downtime: how long a guest is off while it is bundled, with an overlay and without.

    python benchmarks/downtime.py            1, 4 and 16 GiB of data: a quarter of an hour, 60 GiB of disk, 12 of memory
    python benchmarks/downtime.py --quick    a minute; 32 MiB; shows only that it works

The guest is the tests' own (tests/support/libvirt/guest.py), in QEMU without hardware virtualisation, with so much
data in files on its C:. Its downtime begins with its power-off. Both ends are measured: when libvirt has started it
again, and when it has booted and writes again. Bundles go to tmpfs.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from disks import DEFAULT_FOLDER, GIB, MIB, DiskFolder, mixed
from harness import RESULTS, describe_machine, write_json

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.disks.ntfs_disk import ntfs_tool
from support.eventually import eventually
from support.libvirt.guest import guest_image, make_disk, make_volume
from support.libvirt.guest_domain import Domain
from support.libvirt.libvirt_host import Host, running_host
from support.libvirt.libvirt_service import LibvirtService
from thrave.demo.disk import PARTITION_OFFSET

MODES = ("overlay", "offline")
_FREE_SPACE = 256 * MIB  # on the volume, in addition to the data
_TASK_TIMEOUT = 3600.0  # seconds for a task
_LARGE = 8 * GIB  # larger data have one round only


@dataclass(frozen=True)
class Downtime:
    """Seconds that one bundle takes.

    Attributes:
        started: From the power-off of the guest until libvirt has started it again.
        ready: From the power-off until the guest has booted and writes again.
        task: From the request until `complete`.
    """

    started: float
    ready: float
    task: float


@dataclass
class Point:
    """All rounds with one size of data, in one mode."""

    data: int
    """Bytes."""
    mode: str
    rounds: list[Downtime] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and store the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 MiB, one round")
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 4, 16], help="sizes of the data")
    parser.add_argument("--rounds", type=int, default=3, help="for sizes up to 8 GiB")
    parser.add_argument("--inputs", type=Path, default=DEFAULT_FOLDER, help="folder for disks; not on tmpfs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    sizes = [32 * MIB] if options.quick else [int(gib * GIB) for gib in options.gib]
    load = os.getloadavg()[0]
    options.inputs.mkdir(parents=True, exist_ok=True)
    points = [*_measure(sizes, 1 if options.quick else options.rounds, options.inputs)]
    results = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": load,
        "machine": describe_machine(),
        "points": [asdict(point) for point in points],
    }
    path = options.results / ("downtime-quick.json" if options.quick else "downtime.json")
    write_json(path, results)
    print(f"\n{path}")


def _measure(sizes: Sequence[int], rounds: int, inputs: Path) -> Iterator[Point]:
    print(f"{'data MiB':>9}  {'mode':8}{'started s':>10}{'ready s':>10}{'task s':>10}")
    tmpfs = tempfile.TemporaryDirectory(prefix="thrave-downtime-", dir="/dev/shm")
    with tmpfs as folder, running_host() as host:
        service = LibvirtService(Path(folder), host, upload_concurrency=4)
        for size in sizes:
            with _guest(host, service, size, inputs) as domain:
                yield from _measure_size(service, domain, size, 1 if size > _LARGE else rounds)


def _measure_size(service: LibvirtService, domain: Domain, size: int, rounds: int) -> Iterator[Point]:
    points = [Point(size, mode) for mode in MODES]
    for _ in range(rounds):
        for point in points:
            point.rounds.append(_measure_bundle(service, domain, point.mode))
    for point in points:
        medians = [
            statistics.median(getattr(one, name) for one in point.rounds) for name in ("started", "ready", "task")
        ]
        print(f"{size // MIB:9}  {point.mode:8}" + "".join(f"{seconds:10.1f}" for seconds in medians), flush=True)
    yield from points


def _measure_bundle(service: LibvirtService, domain: Domain, mode: str) -> Downtime:
    """Bundle the guest once, and measure."""
    service.start(capture_mode=mode)
    boots = domain.boots
    domain.await_written(boots[-1], 3)
    try:
        with _events(domain) as events:
            started_at = time.monotonic()
            bundle = service.bundle(domain)
            eventually(lambda: len(domain.boots) > len(boots), details=bundle.task, timeout=_TASK_TIMEOUT)
            ready = time.monotonic()
            bundle.completed(_TASK_TIMEOUT)
            done = time.monotonic()
        off = next(at for at, event in events if "Shutdown" in event or "Stopped" in event)
        started = next(at for at, event in events if "Started" in event)
        bundle.remove()
    finally:
        service.stop()
    return Downtime(started - off, ready - off, done - started_at)


@contextmanager
def _guest(host: Host, service: LibvirtService, size: int, inputs: Path) -> Iterator[Domain]:
    """Run a guest with so many bytes in files on its C:."""
    with tempfile.TemporaryDirectory(prefix="guest-", dir=inputs) as name:
        folder = Path(name)
        volume = folder / "volume"
        make_volume(volume, size + _FREE_SPACE - PARTITION_OFFSET)
        piece = min(size, GIB)
        content = DiskFolder(inputs).path(mixed(piece))
        for number in range(size // piece):
            ntfs_tool("ntfscp", "-q", volume, content, f"data-{number:02}.bin")
        make_disk(folder / "root.raw", volume)
        volume.unlink()
        domain = Domain(host, f"guest-{size // MIB}", folder, guest_image(), service.account.account_id).start()
        try:
            domain.await_boot()
            yield domain
        finally:
            domain.remove()


@contextmanager
def _events(domain: Domain) -> Iterator[list[tuple[float, str]]]:
    """Collect the lifecycle events of a domain, each with its time."""
    events: list[tuple[float, str]] = []
    virsh = [
        "stdbuf",
        "-oL",
        "virsh",
        "--connect",
        domain.host.uri,
        "event",
        domain.name,
        "--event",
        "lifecycle",
        "--loop",
    ]
    with subprocess.Popen(virsh, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout

        def listen() -> None:
            events.extend((time.monotonic(), line) for line in output)

        listener = threading.Thread(target=listen)
        listener.start()
        time.sleep(1)  # virsh prints nothing when it starts to listen
        try:
            yield events
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            listener.join()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # to remove files on tmpfs, which would occupy memory
    main()
