"""The benchmark of the API: requests a second of one server process on one core, compared with the server of moto.

    python benchmarks/api.py [--seconds 4] [--rounds 3] [--json FILE]

Thrave has 1,000 complete tasks in its database and receives signed DescribeBundleTasks requests: for one bundle id, as
waiters send them, of a complete task and of a running one, and for all tasks. moto_server (PyPI `moto[server]`, in a
virtual environment of its own below ~/.cache) receives DescribeTags without tags, its cheapest call, and checks no
signature. Each server runs on core 0, and the load generator (wrk, Debian's) on core 1. The servers alternate, and the
median of all rounds counts. A signed request is valid for fifteen minutes, so wrk needs no secret. When moto is
installed, no network but 127.0.0.1 is needed.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.httpsession import URLLib3Session

from thrave.concurrency import utc_now
from thrave.database import bundle_task, open_engine
from thrave.identity.accounts import AccessKey
from thrave.testing import REGION, ThraveServer

TASKS = 1000
CONNECTIONS = 8
MIN_RATIO = 8.0  # to the requests a second of moto
SERVER_CORE, CLIENT_CORE = 0, 1
MOTO = Path.home() / ".cache" / "thrave-benchmarks" / "moto"

REPORT = """
function done(summary, latency, requests)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout
  io.write(string.format('{"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "failed": %d}',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), failed))
end
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU time of the server for each request. It depends least on other load of the machine."""


@dataclass(frozen=True)
class Call:
    """One kind of request, signed again in each round: a signature is valid for fifteen minutes."""

    name: str
    server: psutil.Process
    url: str
    request: Callable[[], AWSRequest]


def main() -> int:
    """Measure and print the table; return 1 if Thrave is slower than its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="for each row of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-benchmark-")))
        calls = [*stack.enter_context(running_thrave(folder / "data")), stack.enter_context(running_moto())]
        for call in calls:
            warm_up(call)
        rounds = [[measure(call, folder, arguments.seconds) for call in calls] for _ in range(arguments.rounds)]
    rows = [median(turns) for turns in zip(*rounds, strict=True)]
    ratio = rows[0].requests_per_second / rows[-1].requests_per_second
    print_table(rows)
    print(f"\n{ratio:.1f} times the requests a second of moto (target: {MIN_RATIO:.0f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "ratio": ratio}, indent=2) + "\n")
    return 0 if ratio >= MIN_RATIO else 1


@contextmanager
def running_thrave(data: Path) -> Iterator[list[Call]]:
    """Run Thrave on its core; yield the requests."""
    settings = {"max_requests_per_second": 1e6, "max_request_burst": 10**6}  # one account sends all requests
    with pinned(SERVER_CORE), ThraveServer.running(data, **settings) as server:
        account, key = server.account("benchmark")
        *complete, running = add_tasks(server, account.account_id, key)
        form = {"Action": "DescribeBundleTasks", "Version": "2016-11-15"}
        yield [
            Call(f"thrave: DescribeBundleTasks, {task}", psutil.Process(server.process.pid), server.url, request)
            for task, request in (
                ("a complete one", lambda: sign(server.url, key, {**form, "BundleId.1": complete[TASKS // 2]})),
                ("a running one", lambda: sign(server.url, key, {**form, "BundleId.1": running})),
                (f"all {TASKS + 1:,}", lambda: sign(server.url, key, form)),
            )
        ]


@contextmanager
def running_moto() -> Iterator[Call]:
    """Run the server of moto on the same core, and install it before if necessary; yield the request."""
    program = MOTO / "bin" / "moto_server"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", MOTO], check=True)
        subprocess.run([MOTO / "bin" / "python", "-m", "pip", "install", "--quiet", "moto[server]"], check=True)
    url = f"http://127.0.0.1:{free_port()}"
    with pinned(SERVER_CORE):
        server = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", url.rpartition(":")[2]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        wait_for(url)
        form = {"Action": "DescribeTags", "Version": "2016-11-15"}
        credentials = AccessKey(
            access_key_id="anyone", secret_access_key="anything", account_id="", status="Active", create_date=utc_now()
        )
        process = psutil.Process(server.pid)
        yield Call("moto_server: DescribeTags", process, url, lambda: sign(url, credentials, form))
    finally:
        server.terminate()
        server.wait()


def add_tasks(server: ThraveServer, account_id: str, key: AccessKey) -> list[str]:
    """Add complete tasks and then a running one to the database of the server; return their ids."""
    bundle_ids = [f"bun-{number:017x}" for number in range(TASKS + 1)]
    common = {
        "account_id": account_id, "owner_id": account_id, "access_key_id": key.access_key_id, "host": "localhost",
        "state": "complete", "progress": 100, "bucket": "bucket", "prefix": "winami", "run_after_task": True,
        "start_time": utc_now(), "update_time": utc_now(),
    }  # fmt: skip
    rows = [{**common, "bundle_id": each, "instance_id": each.replace("bun", "i")} for each in bundle_ids]
    rows[-1] |= {"state": "bundling", "progress": 50}
    database = open_engine(server.data.database)
    with database.begin() as connection:
        connection.execute(sa.insert(bundle_task), rows)
    database.dispose()
    return bundle_ids


def sign(url: str, key: AccessKey, form: Mapping[str, str]) -> AWSRequest:
    """Return a signed request as boto3 sends it."""
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8", "User-Agent": "Boto3/1.43.0"}
    request = AWSRequest("POST", f"{url}/", headers=headers, data=form)
    SigV4Auth(Credentials(key.access_key_id, key.secret_access_key), "ec2", REGION).add_auth(request)
    return request


def warm_up(call: Call) -> None:
    """Send one request: the first response of a server takes longer (moto reads its models)."""
    response = URLLib3Session(timeout=60).send(call.request().prepare())
    if response.status_code != 200:
        sys.exit(f"{call.name}: {response.text}")


def measure(call: Call, folder: Path, seconds: int) -> Row:
    """Send one kind of request repeatedly for some seconds."""
    prepared = call.request().prepare()
    script = folder / "request.lua"
    headers = "".join(f"wrk.headers[{json.dumps(n)}] = {json.dumps(v)}\n" for n, v in prepared.headers.items())
    script.write_text(f'wrk.method = "POST"\nwrk.body = {json.dumps(prepared.body)}\n{headers}{REPORT}')
    arguments = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", script, call.url]
    before = cpu_seconds(call.server)
    with pinned(CLIENT_CORE):
        run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout[run.stdout.index("{") :])
    if result["failed"]:
        sys.exit(f"{call.name}: {result['failed']} requests failed")
    return Row(
        name=call.name,
        requests_per_second=result["requests"] * 1e6 / result["microseconds"],
        p50_ms=result["p50"] / 1000,
        p99_ms=result["p99"] / 1000,
        cpu_us=(cpu_seconds(call.server) - before) * 1e6 / result["requests"],
    )


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process until now."""
    times = process.cpu_times()
    return times.user + times.system


def median(turns: tuple[Row, ...]) -> Row:
    """Return the medians of all rounds of one row."""

    def of(name: str) -> float:
        return statistics.median(getattr(turn, name) for turn in turns)

    return Row(turns[0].name, of("requests_per_second"), of("p50_ms"), of("p99_ms"), of("cpu_us"))


def print_table(rows: list[Row]) -> None:
    """Print the table."""
    print(f"{'':42} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'CPU us':>8}")
    for row in rows:
        print(f"{row.name:42} {row.requests_per_second:10.0f} {row.p50_ms:8.2f} {row.p99_ms:8.2f} {row.cpu_us:8.0f}")


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run processes that are started in the block on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(url: str, seconds: float = 60) -> None:
    """Wait until a server accepts connections."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    deadline = time.monotonic() + seconds
    with socket.socket() as trial:
        while trial.connect_ex((host, int(port))):
            if time.monotonic() > deadline:
                sys.exit(f"no server on {url} after {seconds:.0f} seconds")
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
