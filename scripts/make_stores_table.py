"""Writes docs/reference/stores.md from runs of `thrave doctor` with every store of the tests.

    PYTHONPATH=tests python scripts/make_stores_table.py

Starts and stops the stores of tests/support/servers/stores.py. A missing program, or a check without a result, is an
error: a page needs a run of all stores.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from make_docs import REFERENCE, table

from support.servers import stores
from thrave.buckets.s3_client import Credentials

PAGE = REFERENCE / "stores.md"
PREAMBLE = """\
<!-- Made by scripts/make_stores_table.py from runs of `thrave doctor`. Do not edit. -->

# Stores

The results of [`thrave doctor`](doctor.md) with each store, run for this page. Any S3-compatible store can be used; the
tests of Thrave run with these. To check another store:
[run the doctor](../howto/run-the-doctor.md).

"""
Findings = dict[str, "Finding"]


class Finding(TypedDict):
    """The result of a check, as `thrave doctor` prints it."""

    area: str
    check: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class Column:
    """A store with one value of the setting."""

    name: str
    version: str
    upload: str
    found: Findings


def main() -> None:
    """Start each store, run the doctor, and write the page."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-stores-")))
        columns = [Column("directory", version("thrave"), "", run_doctor(folder / "directory", {}))]
        seaweedfs = stack.enter_context(stores.seaweedfs(folder / "seaweedfs"))
        columns += check_store(folder, "SeaweedFS", version("weed", "version"), seaweedfs)
        rgw = stack.enter_context(stores.ceph_rgw(folder / "rgw"))
        columns += check_store(folder, "Ceph RGW", version("radosgw"), rgw)
        PAGE.write_text(page(columns))


def check_store(folder: Path, name: str, number: str, store: stores.Store) -> Iterator[Column]:
    """Check one store with the keys of accounts and with the keys of the service."""
    common = {"THRAVE_STORE": "s3", "THRAVE_S3_ENDPOINT": store.url}
    own = {
        "THRAVE_UPLOAD_CREDENTIALS": "service",
        "THRAVE_S3_ACCESS_KEY_ID": stores.SERVICE.access_key_id,
        "THRAVE_S3_SECRET_ACCESS_KEY": stores.SERVICE.secret_access_key,
    }
    yield Column(name, number, "policy", run_doctor(folder / f"{store.name}-policy", common))
    yield Column(name, number, "service", run_doctor(folder / f"{store.name}-service", common | own))


def run_doctor(data: Path, settings: dict[str, str]) -> Findings:
    """Run the doctor for a new service with these settings; return its results by check."""
    environment = {**os.environ, **settings, "THRAVE_DATA_DIR": str(data)}
    account = json.loads(thrave(environment, "account", "create", "alice"))["accountId"]
    thrave(environment, "account", "key", "import", account, "--credentials", str(credentials(data, stores.ALICE)))
    output = thrave(environment, "doctor", "--bucket", "alice-doctor", "--access-key-id", stores.ALICE.access_key_id)
    return {found["check"]: found for found in json.loads(output)["checks"]}


def thrave(environment: dict[str, str], *words: str) -> str:
    """Return the output of a command; status 1 is a finding of the doctor."""
    argv = [sys.executable, "-m", "thrave", *words, "--output", "json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode not in {0, 1} or not done.stdout:
        sys.exit(f"{words[0]}: {done.stderr}")
    return done.stdout


def credentials(data: Path, key: Credentials) -> Path:
    """Write a file with an access key."""
    file = data / "credentials"
    file.write_text(
        f"[default]\naws_access_key_id = {key.access_key_id}\naws_secret_access_key = {key.secret_access_key}\n"
    )
    file.chmod(0o600)
    return file


def version(program: str, option: str = "--version") -> str:
    """Return the version number of a program."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = subprocess.run(
        [program, option], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    number = re.search(r"[0-9]+\.[0-9]+(\.[0-9]+)?", output)
    if number is None:
        sys.exit(f"{program} {option}: {output}")
    return number[0]


def page(columns: list[Column]) -> str:
    """Return the page: a row for each check of the store, and the details of those that did not pass."""
    header = ("check", *(title(one) for one in columns))
    names = [name for name, found in columns[0].found.items() if found["area"] == "store"]
    rows = [(name, *(one.found[name]["outcome"] for one in columns)) for name in names]
    details = [
        f"- {name}, {one.name} with `upload = {one.upload}`: {one.found[name]['detail']}\n"
        for one in columns
        for name in names
        if one.found[name]["outcome"] in {"failed", "warning"}
    ]
    return f"{PREAMBLE}{table(header, rows)}\n## Details\n\n{''.join(details)}"


def title(column: Column) -> str:
    """Return the title of a column."""
    if not column.upload:
        return f"{column.name} (Thrave {column.version})"
    return f"{column.name} {column.version}<br>`upload = {column.upload}`"


if __name__ == "__main__":
    main()
