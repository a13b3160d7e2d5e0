"""Writes docs/reference/stores.md from runs of `thrave doctor` against every store that starts here.

    PYTHONPATH=tests python scripts/make_stores_table.py

The stores are those of the tests (tests/support/servers/stores.py); this script starts and stops them. A store whose
program is missing, or a check that does not return, is an error: only a run of all stores makes a page.
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
from thrave.buckets.connection import Credentials

PAGE = REFERENCE / "stores.md"
PREAMBLE = """\
<!-- Made by scripts/make_stores_table.py from runs of `thrave doctor`. Do not edit. -->

# Stores

What [`thrave doctor`](doctor.md) found of each, run for this page. Any store that speaks S3 may be used; these are the
ones that every test of Thrave runs on. Run it against yours:
[check before you start](../howto/run-the-doctor.md).

"""
Doctored = dict[str, "Finding"]


class Finding(TypedDict):
    """A check, as the doctor prints it."""

    area: str
    check: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class Column:
    """A store as one setting has it."""

    name: str
    version: str
    upload: str
    found: Doctored


def main() -> None:
    """Start each store, have it examined, write the page."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-stores-")))
        columns = [Column("directory", version("thrave"), "", examined(folder / "directory", {}))]
        seaweedfs = stack.enter_context(stores.seaweedfs(folder / "seaweedfs"))
        columns += on(folder, "SeaweedFS", version("weed", "version"), seaweedfs)
        rgw = stack.enter_context(stores.ceph_rgw(folder / "rgw"))
        columns += on(folder, "Ceph RGW", version("radosgw"), rgw)
        PAGE.write_text(page(columns))


def on(folder: Path, name: str, its_version: str, store: stores.Store) -> Iterator[Column]:
    """One store, with the accounts' keys and with the service's own."""
    reached = {"THRAVE_STORE": "s3", "THRAVE_S3_ENDPOINT": store.url}
    own = {
        "THRAVE_UPLOAD_CREDENTIALS": "service",
        "THRAVE_S3_ACCESS_KEY_ID": stores.SERVICE.access_key_id,
        "THRAVE_S3_SECRET_ACCESS_KEY": stores.SERVICE.secret_access_key,
    }
    yield Column(name, its_version, "policy", examined(folder / f"{store.name}-policy", reached))
    yield Column(name, its_version, "service", examined(folder / f"{store.name}-service", reached | own))


def examined(data: Path, settings: dict[str, str]) -> Doctored:
    """What the doctor finds of a new service with these settings."""
    environment = {**os.environ, **settings, "THRAVE_DATA_DIR": str(data)}
    account = json.loads(thrave(environment, "account", "create", "alice"))["accountId"]
    thrave(environment, "account", "key", "import", account, "--credentials", str(credentials(data, stores.ALICE)))
    said = thrave(environment, "doctor", "--bucket", "alice-doctor", "--access-key-id", stores.ALICE.access_key_id)
    return {found["check"]: found for found in json.loads(said)["checks"]}


def thrave(environment: dict[str, str], *words: str) -> str:
    """What a command prints; the doctor's may have found something."""
    argv = [sys.executable, "-m", "thrave", *words, "--output", "json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode not in {0, 1} or not done.stdout:
        sys.exit(f"{words[0]}: {done.stderr}")
    return done.stdout


def credentials(data: Path, key: Credentials) -> Path:
    """A file of an access key."""
    file = data / "credentials"
    file.write_text(
        f"[default]\naws_access_key_id = {key.access_key_id}\naws_secret_access_key = {key.secret_access_key}\n"
    )
    file.chmod(0o600)
    return file


def version(program: str, option: str = "--version") -> str:
    """The number that a program gives as its version."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = subprocess.run(
        [program, option], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    number = re.search(r"[0-9]+\.[0-9]+(\.[0-9]+)?", said)
    if number is None:
        sys.exit(f"{program} {option}: {said}")
    return number[0]


def page(columns: list[Column]) -> str:
    """The page: a line for each check of the store, and what was said where it did not pass."""
    header = ("check", *(titled(one) for one in columns))
    names = [name for name, found in columns[0].found.items() if found["area"] == "store"]
    rows = [(name, *(one.found[name]["outcome"] for one in columns)) for name in names]
    said = [
        f"- {name}, {one.name} with `upload = {one.upload}`: {one.found[name]['detail']}\n"
        for one in columns
        for name in names
        if one.found[name]["outcome"] in {"failed", "warning"}
    ]
    return f"{PREAMBLE}{table(header, rows)}\n## What was said\n\n{''.join(said)}"


def titled(column: Column) -> str:
    """What stands above a column."""
    if not column.upload:
        return f"{column.name} (Thrave {column.version})"
    return f"{column.name} {column.version}<br>`upload = {column.upload}`"


if __name__ == "__main__":
    main()
