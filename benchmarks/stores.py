"""What storing costs: memory and connections of a long upload, and throughput beside `aws s3 cp` and `rclone`.

    PYTHONPATH=tests python benchmarks/stores.py [--gib 8] [--mib 256] [--rounds 3] [--json FILE]

1. A simulated disk of so many GiB is sealed into a store that discards (`discard.py`), as a bundle task does it. Its
   memory (RSS) and open connections are looked at all the time; what counts is that neither grows with the disk.
2. The same bytes, in one file, are sent to SeaweedFS and to Ceph RGW, both of the tests: by the S3 driver in parts of
   10 MiB, four at once; by the AWS CLI and by rclone (Debian's), each as it comes. The rounds take turns, and the
   median is told. Client and store share the machine. `--mib 0` leaves this out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from harness import describe_machine

from support.servers import stores
from thrave.buckets.objects import S3Objects
from thrave.buckets.retrying import patiently
from thrave.bundle.names import PART_SIZE

HERE = Path(__file__).parent
LOOK_EVERY = 0.2  # seconds
MOST_SAMPLES = 300  # that are kept
AT_ONCE = 4
PATIENCE = 120.0  # seconds, as the setting s3_patience
BUCKET = "alice-bench"


@dataclass(frozen=True)
class Sample:
    """The sealing process at one moment."""

    seconds: float
    rss: int
    """Bytes."""
    connections: int


@dataclass(frozen=True)
class Endurance:
    """What sealing one disk took."""

    size: int
    """Bytes."""
    seconds: float
    parts: int
    peak_rss: int
    peak_connections: int
    samples: list[Sample]


@dataclass(frozen=True)
class Throughput:
    """How fast one tool sent the bytes to one store."""

    store: str
    tool: str
    mib_per_second: float
    """The median of the rounds."""
    to_ours: float
    """Ours divided by this."""


def endure(size: int) -> Endurance:
    """Seal a disk of so many bytes into a store that discards, and look on."""
    with tempfile.TemporaryDirectory(prefix="thrave-bench-") as folder, discarding() as url:
        argv = [sys.executable, HERE / "store_sealing.py", url, str(size), folder]
        begun = time.monotonic()
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as sealing:
            samples = [*watched(psutil.Process(sealing.pid), begun)]
            parts = sealing.communicate()[0]
        if sealing.returncode != 0:
            sys.exit("sealing failed")
    seconds = time.monotonic() - begun
    peak_rss, peak_connections = max(one.rss for one in samples), max(one.connections for one in samples)
    kept = samples[:: len(samples) // MOST_SAMPLES + 1]
    return Endurance(size, seconds, int(parts), peak_rss, peak_connections, kept)


def watched(process: psutil.Process, begun: float) -> Iterator[Sample]:
    """Look at a process until it ends."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            lines = [line for line in process.net_connections(kind="tcp") if line.status == psutil.CONN_ESTABLISHED]
            yield Sample(round(time.monotonic() - begun, 2), process.memory_info().rss, len(lines))
            time.sleep(LOOK_EVERY)


@contextmanager
def discarding() -> Iterator[str]:
    """The URL of a store that discards."""
    with subprocess.Popen([sys.executable, HERE / "discard.py"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


def compare(mebibytes: int, rounds: int) -> list[Throughput]:
    """Send the same bytes to each store by each tool."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-bench-")))
        file = folder / "bytes"
        with file.open("wb") as output:
            for _ in range(mebibytes):
                output.write(os.urandom(1 << 20))
        return [
            *race(stack.enter_context(stores.seaweedfs(folder / "seaweedfs")), file, rounds),
            *race(stack.enter_context(stores.ceph_rgw(folder / "rgw")), file, rounds),
        ]


def race(store: stores.Store, file: Path, rounds: int) -> list[Throughput]:
    """Every tool's turn, several times."""
    objects = S3Objects(store.connection(stores.ALICE))
    subprocess.run(aws(store, "mb", f"s3://{BUCKET}"), env=environment(), check=True, stdout=subprocess.DEVNULL)
    tools: Mapping[str, Callable[[], None]] = {
        "thrave": lambda: by_the_driver(objects, file),
        "aws s3 cp": lambda: run(aws(store, "cp", str(file), f"s3://{BUCKET}/aws")),
        "rclone": lambda: run(rclone(store, file)),
    }
    took: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, send in tools.items():
            begun = time.monotonic()
            send()
            took[name].append(time.monotonic() - begun)
            objects.delete(BUCKET, objects.list(BUCKET, ""))
    size = file.stat().st_size / (1 << 20)
    rates = {name: size / statistics.median(seconds) for name, seconds in took.items()}
    return [Throughput(store.name, name, rate, rates["thrave"] / rate) for name, rate in rates.items()]


def by_the_driver(objects: S3Objects, file: Path) -> None:
    """Send a file in parts, as a bundle's are sent; again what fails for a while, as all three tools do."""

    def send(start: int) -> None:
        with file.open("rb") as content:
            content.seek(start)
            part = content.read(PART_SIZE)
        patiently(lambda: objects.put(BUCKET, f"thrave/{start}", part), PATIENCE, lambda *_: None)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(send, range(0, file.stat().st_size, PART_SIZE)):
            pass


def aws(store: stores.Store, *words: str) -> list[str]:
    """A command of the AWS CLI."""
    return [str(Path(sys.executable).parent / "aws"), "--endpoint-url", store.url, "s3", *words]


def rclone(store: stores.Store, file: Path) -> list[str]:
    """Rclone's command; it is told not to look for the bucket, which it would create."""
    remote = f":s3,provider=Other,env_auth,no_check_bucket,force_path_style,endpoint='{store.url}':{BUCKET}/rclone"
    return ["rclone", "--config", "", "copyto", str(file), remote]


def run(argv: list[str]) -> None:
    """Run a tool to its end."""
    subprocess.run(argv, env=environment(), check=True, stdout=subprocess.DEVNULL)


def environment() -> dict[str, str]:
    """Where both tools find the key."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {
        **mine,
        "AWS_ACCESS_KEY_ID": stores.ALICE.access_key_id,
        "AWS_SECRET_ACCESS_KEY": stores.ALICE.secret_access_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "stores.json")
    given = parser.parse_args()
    endurance = endure(int(given.gib * (1 << 30)))
    print(told(endurance))
    throughput = compare(given.mib, given.rounds) if given.mib else []
    for one in throughput:
        print(
            f"{one.store:<10} {one.tool:<10} {one.mib_per_second:6.0f} MiB/s   thrave is {one.to_ours:.2f} times that"
        )
    document = {
        "machine": describe_machine(),
        "endurance": asdict(endurance),
        "mib": given.mib,
        "throughput": [asdict(one) for one in throughput],
    }
    given.json.write_text(json.dumps(document, indent=1) + "\n")


def told(one: Endurance) -> str:
    """A line for people."""
    gib, mib = one.size / (1 << 30), one.peak_rss / (1 << 20)
    rate = one.size / (1 << 20) / one.seconds
    return (
        f"{gib:g} GiB in {one.seconds:.0f} s ({rate:.0f} MiB/s), {one.parts} parts into a store that discards: "
        f"at most {mib:.0f} MiB of memory and {one.peak_connections} connections"
    )


if __name__ == "__main__":
    main()
