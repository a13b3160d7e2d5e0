"""Writes docs/reference/clients.md from what the conformance suite of clients wrote of its run.

    THRAVE_CLIENTS_TABLE=clients.json pytest tests/clients
    python scripts/make_clients_table.py clients.json

Only a run of every client makes a page: an action that was not tried, or that failed, is an error.
"""

import json
import sys
from pathlib import Path
from typing import TypedDict

from make_docs import REFERENCE, table

PAGE = REFERENCE / "clients.md"
ACTIONS = ("bundle", "describe", "wait", "cancel", "dry-run", "error")
HEADER = ("client", "version", "API version", "signature", "HTTP", "signs the policy", *ACTIONS)
PREAMBLE = """\
<!-- Made by scripts/make_clients_table.py from a run of tests/clients. Do not edit. -->

# EC2 clients

Real, unmodified clients did this with a real Thrave, each through its own interface; the page is made by that run. API
version, signature and HTTP method are what the service received. Where a client does not sign the upload policy, its
user does.

- **bundle**: bundles an instance, with an upload policy, and the bundle is stored.
- **describe**: describes the bundle tasks of one prefix, with a filter.
- **wait**: waits until a task is complete, with the client's own waiter if it has one.
- **cancel**: cancels a task.
- **dry-run**: is told that the request would have succeeded.
- **error**: gives the code of an error, of a request to bundle an instance that does not exist.

"""


class Row(TypedDict):
    """One client's run."""

    client: str
    version: str | None
    api_version: str
    signature: str
    method: str
    signs_policy: bool
    outcomes: dict[str, str]
    cannot: dict[str, str]


def page(rows: list[Row]) -> str:
    """The page."""
    reasons = sorted({reason for row in rows for reason in row["cannot"].values()})
    notes = "".join(f"{number}. The client {reason}.\n" for number, reason in enumerate(reasons, 1))
    return f"{PREAMBLE}{table(HEADER, (cells(row, reasons) for row in rows))}\n{notes}"


def cells(row: Row, reasons: list[str]) -> list[str]:
    """One client's line."""
    signs = "yes" if row["signs_policy"] else "no"
    told = [row["client"], str(row["version"]), row["api_version"], row["signature"], row["method"], signs]
    return told + [
        f"no ({reasons.index(row['cannot'][action]) + 1})" if action in row["cannot"] else "yes" for action in ACTIONS
    ]


def undone(row: Row) -> list[str]:
    """What the client should have done in this run and did not."""
    wanted = (action for action in ACTIONS if action not in row["cannot"])
    return [action for action in wanted if row["outcomes"].get(action) != "passed"]


def main() -> int:
    """Write the page, unless something is missing from the run."""
    rows: list[Row] = json.loads(Path(sys.argv[1]).read_text())
    failed = [f"{row['client']}: {', '.join(undone(row))}" for row in rows if undone(row)]
    for line in failed:
        print(f"not done in this run: {line}")
    if not failed:
        PAGE.write_text(page(rows))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
