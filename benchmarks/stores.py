"""The benchmark of stores: memory and connections of a long upload, and throughput compared with other tools.

    python benchmarks/stores.py [--gib 8] [--mib 256] [--rounds 3] [--json FILE]

1. A simulated disk is sealed into a store that discards the parts, as a bundle task does it. Memory (RSS) and open
   connections are sampled; neither may grow with the disk. `stores.py discard` and `stores.py seal` are the two
   processes of this measurement.
2. The same bytes, in one file, are sent to SeaweedFS and to Ceph RGW, both of the tests: by the S3 driver in parts of
   10 MiB, four at the same time; by the AWS CLI and by rclone (Debian's) with their defaults. The tools alternate, and
   the median counts. Client and store share the machine. `--mib 0` skips this part.
"""

import argparse
import hashlib
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from harness import RESULTS, describe_machine, write_json

from thrave.buckets.retrying_store import retry_store
from thrave.buckets.s3_client import Credentials, StoreConfig
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.s3_store import OwnerKeyStore
from thrave.bundle.model import PART_SIZE
from thrave.volumes.base import Extent

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET
from support.servers import stores
from support.service.upload_bench import UploadBench

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SAMPLE_INTERVAL = 0.2  # seconds
MAX_SAMPLES = 300  # in the results
CONCURRENCY = 4
RETRY_TIMEOUT = 120.0  # seconds, the default of the setting
BUCKET = "alice-bench"


@dataclass(frozen=True)
class Sample:
    """The sealing process at one moment."""

    seconds: float
    """Since its start."""
    rss: int
    """Bytes."""
    connections: int


@dataclass(frozen=True)
class Endurance:
    """Costs of sealing one disk."""

    size: int
    """Bytes."""
    seconds: float
    parts: int
    peak_rss: int
    """Bytes."""
    peak_connections: int
    samples: list[Sample]


@dataclass(frozen=True)
class Throughput:
    """Speed of one tool with one store."""

    store: str
    tool: str
    mib_per_second: float
    """The median of the rounds."""
    to_ours: float
    """Speed of Thrave divided by this."""


def main() -> None:
    """Measure, print, and store the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the sealed disk")
    parser.add_argument("--mib", type=int, default=256, help="size of the file that every tool sends")
    parser.add_argument("--rounds", type=int, default=3, help="how often every tool sends it")
    parser.add_argument("--json", type=Path, default=RESULTS / "stores.json", help="file for the results")
    options = parser.parse_args()
    endurance = measure_endurance(int(options.gib * GIB))
    print(describe(endurance))
    throughput = measure_throughput(options.mib, options.rounds) if options.mib else []
    for one in throughput:
        ratio = f"thrave is {one.to_ours:.2f} times as fast"
        print(f"{one.store:<10} {one.tool:<10} {one.mib_per_second:6.0f} MiB/s   {ratio}")
    results = {
        "machine": describe_machine(),
        "endurance": asdict(endurance),
        "mib": options.mib,
        "throughput": [asdict(one) for one in throughput],
    }
    write_json(options.json, results)


# Endurance.


def measure_endurance(size: int) -> Endurance:
    """Seal a disk of `size` bytes into a store that discards, and sample the process."""
    with tempfile.TemporaryDirectory(prefix="thrave-bench-") as folder, discarding() as url:
        started = time.monotonic()
        command = [sys.executable, __file__, "seal", url, str(size), folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sealing:
            samples = [*sample(psutil.Process(sealing.pid), started)]
            parts = sealing.communicate()[0]
        if sealing.returncode != 0:
            sys.exit("sealing failed")
    seconds = time.monotonic() - started
    peak_rss, peak_connections = max(one.rss for one in samples), max(one.connections for one in samples)
    kept = samples[:: len(samples) // MAX_SAMPLES + 1]
    return Endurance(size, seconds, int(parts), peak_rss, peak_connections, kept)


def sample(process: psutil.Process, started: float) -> Iterator[Sample]:
    """Sample a process until it ends."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            lines = [line for line in process.net_connections(kind="tcp") if line.status == psutil.CONN_ESTABLISHED]
            yield Sample(round(time.monotonic() - started, 2), process.memory_info().rss, len(lines))
            time.sleep(SAMPLE_INTERVAL)


def describe(one: Endurance) -> str:
    """The result in one line."""
    rate = one.size / MIB / one.seconds
    return (
        f"{one.size / GIB:g} GiB in {one.seconds:.0f} s ({rate:.0f} MiB/s), {one.parts} parts into a store that"
        f" discards them: at most {one.peak_rss / MIB:.0f} MiB of memory and {one.peak_connections} connections"
    )


def seal(url: str, size: str, folder: str) -> None:
    """Seal a volume of `size` bytes into a store, as a bundle task does: with its database rows, journal and monitor.

    Prints the number of parts when all are stored.
    """
    key = Credentials(access_key_id=ACCESS_KEY_ID, secret_access_key=SECRET)
    buckets = OwnerKeyStore(StoreConfig(endpoint=url, credentials=key), lambda _access_key_id: None)
    bench = UploadBench(Path(folder), buckets)
    sealed = bench.seal(NoiseVolume(int(size)), at_once=CONCURRENCY, stall_timeout=600.0)
    print(len(sealed.parts))
    bench.close()


class NoiseVolume:
    """A simulated disk full of noise, which repeats only beyond the distance that deflate searches."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._noise = random.Random(1).randbytes(4 * MIB)

    def extents(self) -> Sequence[Extent]:
        """See Volume: all of the disk."""
        return [Extent(0, self.size)]

    def prefetch(self, offset: int, length: int) -> None:
        """See Volume: nothing to prepare."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See Volume."""
        done = 0
        while done < len(buffer):
            start = (offset + done) % len(self._noise)
            piece = self._noise[start : start + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """See Volume: nothing to close."""


# A store that discards.


@contextmanager
def discarding() -> Iterator[str]:
    """Run a store that discards, in a process of its own; yield its URL."""
    with subprocess.Popen([sys.executable, __file__, "discard"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


def discard() -> None:
    """Run a store that discards on a free port, and print its URL."""
    DiscardHandler.stored = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), DiscardHandler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


class DiscardHandler(BaseHTTPRequestHandler):
    """One connection. Answers uploads as S3 does, but stores only size and MD5. Signatures are not checked."""

    protocol_version = "HTTP/1.1"
    stored: dict[str, tuple[int, str]]
    """Size and MD5 of every object, by path."""

    _READ_SIZE = 256 * KIB
    _MAX_FIELDS = 64 * KIB  # the fields before the file of a form are shorter
    _KEY = re.compile(rb'name="key"\r\n\r\n([^\r]*)\r\n')
    _FILE = re.compile(rb'name="file"[^\r]*\r\n\r\n')

    def do_PUT(self) -> None:
        """Receive an object."""
        digest = hashlib.md5(usedforsecurity=False)
        length = self._length()
        self._read(length, digest)
        self._store(urlsplit(self.path).path, length, digest)

    def do_POST(self) -> None:
        """Receive a form with an object, or a list of objects to delete."""
        length = self._length()
        if "?delete" in self.path:
            self._read(length, None)
            self._respond(200, b"<DeleteResult/>")
            return
        head = self.rfile.read(min(length, self._MAX_FIELDS))
        key, file = self._KEY.search(head), self._FILE.search(head)
        assert key is not None
        assert file is not None
        closing = len("\r\n----\r\n") + len(self.headers["Content-Type"].partition("boundary=")[2])
        size = length - file.end() - closing
        digest = hashlib.md5(head[file.end() : file.end() + size], usedforsecurity=False)
        self._read(file.end() + size - len(head), digest)
        self._read(length - max(file.end() + size, len(head)), None)
        self._store(f"{self.path}/{key[1].decode()}", size, digest)

    def do_HEAD(self) -> None:
        """Return size and ETag."""
        size, digest = self.stored.get(urlsplit(self.path).path, (-1, ""))
        if size < 0:
            self._respond(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", f'"{digest}"')
        self.end_headers()

    def do_GET(self) -> None:
        """Return an error: nothing is stored."""
        self._respond(404, b"<Error><Code>NoSuchKey</Code><Message>It was discarded</Message></Error>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name in the base class)
        """Log nothing."""

    def _length(self) -> int:
        return int(self.headers["Content-Length"])

    def _read(self, length: int, digest: "hashlib._Hash | None") -> None:
        while length > 0:
            piece = self.rfile.read(min(length, self._READ_SIZE))
            if not piece:
                return
            length -= len(piece)
            if digest is not None:
                digest.update(piece)

    def _store(self, path: str, size: int, digest: "hashlib._Hash") -> None:
        self.stored[path] = (size, digest.hexdigest())
        self.send_response(200)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _respond(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# Throughput.


def measure_throughput(mebibytes: int, rounds: int) -> list[Throughput]:
    """Send the same bytes to each store with each tool."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-bench-")))
        file = folder / "bytes"
        with file.open("wb") as output:
            for _ in range(mebibytes):
                output.write(os.urandom(MIB))
        return [
            *compare_tools(stack.enter_context(stores.seaweedfs(folder / "seaweedfs")), file, rounds),
            *compare_tools(stack.enter_context(stores.ceph_rgw(folder / "rgw")), file, rounds),
        ]


def compare_tools(store: stores.Store, file: Path, rounds: int) -> list[Throughput]:
    """Send a file to one store with every tool, in each round."""
    objects = S3ObjectClient(store.connection(stores.ALICE))
    run_tool(aws(store, "mb", f"s3://{BUCKET}"))
    tools: Mapping[str, Callable[[], None]] = {
        "thrave": lambda: send_with_driver(objects, file),
        "aws s3 cp": lambda: run_tool(aws(store, "cp", str(file), f"s3://{BUCKET}/aws")),
        "rclone": lambda: run_tool(rclone(store, file)),
    }
    durations: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, send in tools.items():
            started = time.monotonic()
            send()
            durations[name].append(time.monotonic() - started)
            objects.delete(BUCKET, objects.list(BUCKET, ""))
    size = file.stat().st_size / MIB
    rates = {name: size / statistics.median(seconds) for name, seconds in durations.items()}
    return [Throughput(store.name, name, rate, rates["thrave"] / rate) for name, rate in rates.items()]


def send_with_driver(objects: S3ObjectClient, file: Path) -> None:
    """Send a file in parts, as a task does; a failed part is retried, which the other tools do as well."""

    def send(start: int) -> None:
        with file.open("rb") as content:
            content.seek(start)
            part = content.read(PART_SIZE)
        retry_store(lambda: objects.put(BUCKET, f"thrave/{start}", part), RETRY_TIMEOUT, lambda *_: None)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        for _ in pool.map(send, range(0, file.stat().st_size, PART_SIZE)):
            pass


def aws(store: stores.Store, *words: str) -> list[str]:
    """Return a command of the AWS CLI."""
    return [str(Path(sys.executable).parent / "aws"), "--endpoint-url", store.url, "s3", *words]


def rclone(store: stores.Store, file: Path) -> list[str]:
    """Return the command of rclone, without its check of the bucket, which would create the bucket."""
    remote = f":s3,provider=Other,env_auth,no_check_bucket,force_path_style,endpoint='{store.url}':{BUCKET}/rclone"
    return ["rclone", "--config", "", "copyto", str(file), remote]


def run_tool(command: list[str]) -> None:
    """Run a tool, with the access key in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = {
        **clean,
        "AWS_ACCESS_KEY_ID": stores.ALICE.access_key_id,
        "AWS_SECRET_ACCESS_KEY": stores.ALICE.secret_access_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


PROCESSES: Mapping[str, Callable[..., None]] = {"discard": discard, "seal": seal}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in PROCESSES:
        PROCESSES[name](*sys.argv[2:])
    else:
        main()
