"""Writes docs/reference/clients.md from the results of the conformance suite of clients.

    THRAVE_CLIENTS_TABLE=clients.json pytest tests/clients
    python scripts/make_clients_table.py clients.json

A page needs a run of every client: an action that was not tried or that failed is an error.
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

Real, unmodified clients did this with a real Thrave, each through its own interface. The run generated this page. API
version, signature and HTTP method are those of the received request. If a client does not sign the upload policy, its
user does.

- **bundle**: bundles an instance with an upload policy; the bundle is stored.
- **describe**: describes the bundle tasks of one prefix, with a filter.
- **wait**: waits until a task is complete, with the client's own waiter if it has one.
- **cancel**: cancels a task.
- **dry-run**: receives the response that the request would have succeeded.
- **error**: reports the error code for an instance that does not exist.

"""


class Row(TypedDict):
    """The run of one client."""

    client: str
    version: str | None
    api_version: str
    signature: str
    method: str
    signs_policy: bool
    outcomes: dict[str, str]
    cannot: dict[str, str]


def page(rows: list[Row]) -> str:
    """Return the page."""
    reasons = sorted({reason for row in rows for reason in row["cannot"].values()})
    notes = "".join(f"{number}. The client {reason}.\n" for number, reason in enumerate(reasons, 1))
    return f"{PREAMBLE}{table(HEADER, (cells(row, reasons) for row in rows))}\n{notes}"


def cells(row: Row, reasons: list[str]) -> list[str]:
    """Return the table row of one client."""
    signs = "yes" if row["signs_policy"] else "no"
    values = [row["client"], str(row["version"]), row["api_version"], row["signature"], row["method"], signs]
    return values + [
        f"no ({reasons.index(row['cannot'][action]) + 1})" if action in row["cannot"] else "yes" for action in ACTIONS
    ]


def missing_actions(row: Row) -> list[str]:
    """Return actions that the client supports and did not pass in this run."""
    supported = (action for action in ACTIONS if action not in row["cannot"])
    return [action for action in supported if row["outcomes"].get(action) != "passed"]


def main() -> int:
    """Write the page, unless the run is incomplete."""
    rows: list[Row] = json.loads(Path(sys.argv[1]).read_text())
    failed = [f"{row['client']}: {', '.join(missing_actions(row))}" for row in rows if missing_actions(row)]
    for line in failed:
        print(f"not passed in this run: {line}")
    if not failed:
        PAGE.write_text(page(rows))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
