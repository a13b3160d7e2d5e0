"""How many requests a second one server process on one core answers, beside moto's server on the same core.

    python benchmarks/api.py [--seconds 4] [--rounds 3] [--json FILE]

Thrave answers signed DescribeBundleTasks calls, with 1,000 finished tasks in its database: by bundle id, which is what
every waiter sends, of one that has ended and of one under way, and for all of them. moto_server (PyPI `moto[server]`,
in a virtual environment of its own under ~/.cache) answers DescribeTags for nothing, its cheapest call; it checks no
signature. Each server has core 0 and the load generator (wrk, Debian's) core 1; the rounds take turns, and the median
of each row is told. A signed request may be sent again for fifteen minutes, so wrk needs no secret. It never needs
anything beyond 127.0.0.1 once moto is there.
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

from thrave.database import bundle_task, open_engine, utc_now
from thrave.identity.keys import AccessKey
from thrave.testing import REGION, ThraveServer

TASKS = 1000
CONNECTIONS = 8
WANTED = 8.0  # times moto's requests a second
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
    """Of the server, for each request: what a busy neighbour of this machine changes least."""


@dataclass(frozen=True)
class Call:
    """One request of the benchmark, made anew for each round: a signature is good for fifteen minutes."""

    name: str
    server: psutil.Process
    url: str
    request: Callable[[], AWSRequest]


def main() -> int:
    """Measure, print the table, and end with 1 if Thrave is slower than it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="for each row of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-benchmark-")))
        calls = [*stack.enter_context(thrave(folder / "data")), stack.enter_context(moto())]
        for call in calls:
            warm_up(call)
        rounds = [[measured(call, folder, arguments.seconds) for call in calls] for _ in range(arguments.rounds)]
    rows = [median(turns) for turns in zip(*rounds, strict=True)]
    ratio = rows[0].requests_per_second / rows[-1].requests_per_second
    show(rows)
    print(f"\n{ratio:.1f} times moto's requests a second (wanted: {WANTED:.0f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "ratio": ratio}, indent=2) + "\n")
    return 0 if ratio >= WANTED else 1


@contextmanager
def thrave(data: Path) -> Iterator[list[Call]]:
    """Thrave's server on its core, and the calls to it."""
    settings = {"requests_per_second": 1e6, "request_burst": 10**6}  # one account sends them all
    with pinned(SERVER_CORE), ThraveServer.running(data, **settings) as server:
        account, key = server.account("benchmark")
        *ended, under_way = tasks(server, account.account_id, key)
        form = {"Action": "DescribeBundleTasks", "Version": "2016-11-15"}
        yield [
            Call(f"thrave: DescribeBundleTasks, {what}", psutil.Process(server.process.pid), server.url, request)
            for what, request in (
                ("an ended one", lambda: signed(server.url, key, {**form, "BundleId.1": ended[TASKS // 2]})),
                ("one under way", lambda: signed(server.url, key, {**form, "BundleId.1": under_way})),
                (f"all {TASKS + 1:,}", lambda: signed(server.url, key, form)),
            )
        ]


@contextmanager
def moto() -> Iterator[Call]:
    """The server of moto on the same core, and the call to it."""
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
        yield Call("moto_server: DescribeTags", process, url, lambda: signed(url, credentials, form))
    finally:
        server.terminate()
        server.wait()


def tasks(server: ThraveServer, account_id: str, key: AccessKey) -> list[str]:
    """Put complete tasks and one that is under way into the server's database; return their ids."""
    bundle_ids = [f"bun-{number:017x}" for number in range(TASKS + 1)]
    same = {
        "account_id": account_id, "owner_id": account_id, "access_key_id": key.access_key_id, "host": "localhost",
        "state": "complete", "progress": 100, "bucket": "bucket", "prefix": "winami", "was_running": True,
        "start_time": utc_now(), "update_time": utc_now(),
    }  # fmt: skip
    rows = [{**same, "bundle_id": each, "instance_id": each.replace("bun", "i")} for each in bundle_ids]
    rows[-1] |= {"state": "bundling", "progress": 50}
    database = open_engine(server.data.database)
    with database.begin() as connection:
        connection.execute(sa.insert(bundle_task), rows)
    database.dispose()
    return bundle_ids


def signed(url: str, key: AccessKey, form: Mapping[str, str]) -> AWSRequest:
    """A call as boto3 sends it."""
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8", "User-Agent": "Boto3/1.43.0"}
    request = AWSRequest("POST", f"{url}/", headers=headers, data=form)
    SigV4Auth(Credentials(key.access_key_id, key.secret_access_key), "ec2", REGION).add_auth(request)
    return request


def warm_up(call: Call) -> None:
    """Send one call alone: a server's first answer takes it longest (moto reads its models for it)."""
    answer = URLLib3Session(timeout=60).send(call.request().prepare())
    if answer.status_code != 200:
        sys.exit(f"{call.name}: {answer.text}")


def measured(call: Call, folder: Path, seconds: int) -> Row:
    """Send one call for some seconds, over and over."""
    prepared = call.request().prepare()
    script = folder / "request.lua"
    headers = "".join(f"wrk.headers[{json.dumps(n)}] = {json.dumps(v)}\n" for n, v in prepared.headers.items())
    script.write_text(f'wrk.method = "POST"\nwrk.body = {json.dumps(prepared.body)}\n{headers}{REPORT}')
    arguments = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", script, call.url]
    before = cpu_seconds(call.server)
    with pinned(CLIENT_CORE):
        run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    told = json.loads(run.stdout[run.stdout.index("{") :])
    if told["failed"]:
        sys.exit(f"{call.name}: {told['failed']} requests failed")
    return Row(
        name=call.name,
        requests_per_second=told["requests"] * 1e6 / told["microseconds"],
        p50_ms=told["p50"] / 1000,
        p99_ms=told["p99"] / 1000,
        cpu_us=(cpu_seconds(call.server) - before) * 1e6 / told["requests"],
    )


def cpu_seconds(process: psutil.Process) -> float:
    """What a process has used so far."""
    times = process.cpu_times()
    return times.user + times.system


def median(turns: tuple[Row, ...]) -> Row:
    """The medians of one row's rounds."""

    def of(name: str) -> float:
        return statistics.median(getattr(turn, name) for turn in turns)

    return Row(turns[0].name, of("requests_per_second"), of("p50_ms"), of("p99_ms"), of("cpu_us"))


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(f"{'':42} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'CPU us':>8}")
    for row in rows:
        print(f"{row.name:42} {row.requests_per_second:10.0f} {row.p50_ms:8.2f} {row.p99_ms:8.2f} {row.cpu_us:8.0f}")


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Give what is started meanwhile one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(url: str, seconds: float = 60) -> None:
    """Wait until a server listens."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    given_up = time.monotonic() + seconds
    with socket.socket() as trial:
        while trial.connect_ex((host, int(port))):
            if time.monotonic() > given_up:
                sys.exit(f"{url} does not answer")
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
