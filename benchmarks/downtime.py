"""How long a guest is down for being bundled: until it runs on an overlay, or until its whole volume has been read.

    python benchmarks/downtime.py            1, 4 and 16 GiB of data: a quarter of an hour, 60 GiB of disk, 12 of memory
    python benchmarks/downtime.py --quick    a minute; 32 MiB; says that it runs

The guest is the tests' own (tests/support/libvirt/guest.py), in QEMU without hardware virtualisation, with so much
data in files on its C:. Down it is from its power-off until libvirt has started it again, and until it has booted and
writes again. Bundles go to tmpfs.
"""

import argparse
import json
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

from disks import GIB, MIB, DiskFolder, mixed
from harness import describe_machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.disks.ntfs_disk import ntfs_tool
from support.eventually import eventually
from support.libvirt.guest import guest_image, make_disk, make_volume
from support.libvirt.guest_domain import Domain
from support.libvirt.libvirt_host import Host, running_host
from support.libvirt.libvirt_service import LibvirtService
from thrave.demo.disk import PARTITION_OFFSET

MODES = ("overlay", "whole")
_RESULTS = Path(__file__).with_name("results")
_INPUTS = Path.home() / ".cache" / "thrave-bench"
_ROOM = 256 * MIB  # of the volume, beside the data
_PATIENCE = 3600.0  # seconds for a task
_LOOK_EVERY = 0.01  # seconds
_MANY = 8 * GIB  # of which one round is enough


@dataclass(frozen=True)
class Down:
    """One bundle's cost, in seconds.

    Attributes:
        started: from the guest's power-off until libvirt had started it again.
        ready: from there until it had booted and wrote again.
        task: from the call to `complete`.
    """

    started: float
    ready: float
    task: float


@dataclass
class Point:
    """What was measured with so much data, in one mode."""

    data: int
    """Bytes."""
    mode: str
    rounds: list[Down] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure it all, print a table, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 MiB, one round")
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 4, 16], help="how much data")
    parser.add_argument("--rounds", type=int, default=3, help="how often, below 8 GiB")
    parser.add_argument("--inputs", type=Path, default=_INPUTS, help="where disks are made; not on tmpfs")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="where the JSON goes")
    options = parser.parse_args(arguments)
    sizes = [32 * MIB] if options.quick else [int(gib * GIB) for gib in options.gib]
    load = os.getloadavg()[0]
    options.inputs.mkdir(parents=True, exist_ok=True)
    points = [*_measured(sizes, 1 if options.quick else options.rounds, options.inputs)]
    results = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": load,
        "machine": describe_machine(),
        "points": [asdict(point) for point in points],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / ("downtime-quick.json" if options.quick else "downtime.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path}")


def _measured(sizes: Sequence[int], rounds: int, inputs: Path) -> Iterator[Point]:
    print(f"{'data MiB':>9}  {'mode':8}{'started s':>10}{'ready s':>10}{'task s':>10}")
    tmpfs = tempfile.TemporaryDirectory(prefix="thrave-downtime-", dir="/dev/shm")
    with tmpfs as folder, running_host() as host:
        service = LibvirtService(Path(folder), host, uploads_at_once=4)
        for size in sizes:
            with _guest(host, service, size, inputs) as domain:
                yield from _points(service, domain, size, 1 if size > _MANY else rounds)


def _points(service: LibvirtService, domain: Domain, size: int, rounds: int) -> Iterator[Point]:
    points = [Point(size, mode) for mode in MODES]
    for _ in range(rounds):
        for point in points:
            point.rounds.append(_bundled(service, domain, point.mode))
    for point in points:
        medians = [
            statistics.median(getattr(one, name) for one in point.rounds) for name in ("started", "ready", "task")
        ]
        print(f"{size // MIB:9}  {point.mode:8}" + "".join(f"{seconds:10.1f}" for seconds in medians), flush=True)
    yield from points


def _bundled(service: LibvirtService, domain: Domain, mode: str) -> Down:
    """Bundle it once, and look on."""
    service.start(downtime=mode)
    boots = domain.boots
    domain.await_written(boots[-1], 3)
    try:
        with _events(domain) as events:
            begun = time.monotonic()
            bundle = service.bundle(domain)
            eventually(lambda: len(domain.boots) > len(boots), details=bundle.task, timeout=_PATIENCE)
            ready = time.monotonic()
            bundle.completed(_PATIENCE)
            done = time.monotonic()
        off = next(at for at, said in events if "Shutdown" in said or "Stopped" in said)
        started = next(at for at, said in events if "Started" in said)
        bundle.remove()
    finally:
        service.stop()
    return Down(started - off, ready - off, done - begun)


@contextmanager
def _guest(host: Host, service: LibvirtService, size: int, inputs: Path) -> Iterator[Domain]:
    """A guest that runs, with so many bytes in files on its C:."""
    with tempfile.TemporaryDirectory(prefix="guest-", dir=inputs) as name:
        folder = Path(name)
        volume = folder / "volume"
        make_volume(volume, size + _ROOM - PARTITION_OFFSET)
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
    """What libvirt tells of the domain, each with the time when it did."""
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
    with subprocess.Popen(virsh, stdout=subprocess.PIPE, text=True) as telling:
        assert telling.stdout is not None
        said = telling.stdout

        def listen() -> None:
            events.extend((time.monotonic(), line) for line in said)

        listener = threading.Thread(target=listen)
        listener.start()
        time.sleep(1)  # it says nothing when it has begun to listen
        try:
            yield events
        finally:
            telling.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                telling.wait(timeout=10)
            telling.kill()
            listener.join()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or what lies on tmpfs would stay in memory
    main()
