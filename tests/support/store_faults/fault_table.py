"""The expected result of each fault for each kind of request. The tests check every cell of the table.

`PYTHONPATH=tests python -m support.store_faults.fault_table` writes docs/reference/store-faults.md.
"""

from dataclasses import dataclass
from pathlib import Path

from support.store_faults import faults
from support.store_faults.fault_proxy import Fault, Kind

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "store-faults.md"

SURVIVES = "survives"
LATER = "removed later"
"""The task has failed, and its objects stay until the store allows their deletion."""


@dataclass(frozen=True)
class Outcome:
    """The result of a fault that happens to one request, and of one that happens to all requests."""

    once: str
    always: str


def _same(outcome):
    return Outcome(outcome, outcome)


NOTHING = _same(SURVIVES)
# While a bucket is claimed: codes of the EC2 API
AWAY = Outcome(SURVIVES, "Unavailable")
CLOCK = HIDDEN = _same("InaccessibleStorageLocation")
REFUSED = _same("InvalidParameterValue")
NOT_OURS = Outcome(SURVIVES, "InaccessibleStorageLocation")
# While a task stores its bundle: codes of bundle tasks
FAILS = Outcome(SURVIVES, "Server.S3Error")
BROKEN = _same("Server.S3Error")
DENIED = _same("Client.S3Error")
DELAYED = Outcome(SURVIVES, LATER)
STAYS = _same(LATER)
# While a bundle is read: exit codes
UNREAD = Outcome(SURVIVES, "FAILED")
UNREADABLE, FORBIDDEN, DAMAGED = map(_same, ("FAILED", "REFUSED", "DAMAGED"))

Row = tuple[Outcome | None, ...]
"""One result for each kind of request; None: the fault is not possible."""

CLAIMING = (Kind.HEAD_BUCKET, Kind.CREATE_BUCKET, Kind.GET_OBJECT, Kind.LIST_OBJECTS, Kind.PUT_OWNER)
WHEN_CLAIMED: dict[Fault, Row] = {
    faults.internal_error: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.slow_down: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.denied_early: (HIDDEN, REFUSED, NOT_OURS, NOTHING, HIDDEN),
    faults.clock_skewed: (CLOCK, CLOCK, CLOCK, CLOCK, CLOCK),
    faults.request_cut: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.response_lost: (AWAY, NOTHING, AWAY, AWAY, NOTHING),
    faults.headers_cut: (AWAY, NOTHING, AWAY, AWAY, NOTHING),
    faults.response_cut: (None, None, AWAY, AWAY, None),
    faults.no_response: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.stalled_response: (AWAY, NOTHING, AWAY, AWAY, NOTHING),
    faults.discarded: (None, AWAY, None, None, AWAY),
    faults.byte_changed: (None, None, None, None, AWAY),
    faults.wrong_etag: (None, None, None, None, NOTHING),
    faults.sent_twice: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
    faults.old_date: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
}

STORING = (
    Kind.PUT_OBJECT, Kind.PUT_MANIFEST, Kind.POST_OBJECT, Kind.POST_MANIFEST, Kind.HEAD_OBJECT, Kind.DELETE_OBJECTS,
    Kind.GET_RANGE,
)  # fmt: skip
WHEN_STORED: dict[Fault, Row] = {
    faults.internal_error: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.slow_down: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.denied_early: (DENIED, DENIED, DENIED, DENIED, DENIED, STAYS, FORBIDDEN),
    faults.clock_skewed: (BROKEN, BROKEN, BROKEN, BROKEN, DENIED, STAYS, UNREADABLE),
    faults.request_cut: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.response_lost: (FAILS, NOTHING, FAILS, NOTHING, FAILS, DELAYED, UNREAD),
    faults.headers_cut: (FAILS, NOTHING, NOTHING, NOTHING, FAILS, DELAYED, UNREAD),
    faults.response_cut: (None, None, None, None, None, DELAYED, UNREAD),
    faults.no_response: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.stalled_response: (FAILS, NOTHING, FAILS, NOTHING, FAILS, DELAYED, UNREAD),
    faults.discarded: (BROKEN, BROKEN, BROKEN, BROKEN, None, STAYS, None),
    faults.discarded_without_etag: (FAILS, FAILS, FAILS, FAILS, None, None, None),
    faults.byte_changed: (FAILS, FAILS, FAILS, FAILS, None, None, DAMAGED),
    faults.wrong_etag: (FAILS, NOTHING, FAILS, NOTHING, DENIED, None, NOTHING),
    faults.sent_twice: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
    faults.old_date: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
}


def cases(table: dict[Fault, Row], only: tuple[Kind, ...]) -> list[tuple[Fault, Kind, Outcome]]:
    """Return the cells of some columns, without empty ones."""
    kinds = CLAIMING if table is WHEN_CLAIMED else STORING
    return [
        (fault, kind, outcome)
        for fault, row in table.items()
        for kind, outcome in zip(kinds, row, strict=True)
        if outcome is not None and kind in only
    ]


_PAGE = """\
<!-- Made by `PYTHONPATH=tests python -m support.store_faults.fault_table`. Do not edit. -->

# Results of faults of a store

Each cell is a test: a proxy between Thrave and SeaweedFS makes the fault on the wire. First the fault happens to one
request of that kind, then to all of them. A cell with one result has the same result in both cases. Otherwise the
result of a single fault is before the `/`. "Survives" means that the bundle is complete and opens to the same bytes.
After every other result the instance runs and no object remains in the bucket; if the store refuses the deletion,
Thrave deletes the objects as soon as the store allows it.

The settings `s3_timeout` (a connection without a byte sent or received) and `s3_retry_timeout` (a transient error)
limit the waits; while a client waits for a response, the limit is five seconds. If a store executes a request only
after the task has failed and deleted the object, the object stays in the bucket. No S3 client can detect this.

## While BundleInstance claims the bucket

The codes are those of [the EC2 API](ec2-errors.md). After an error the instance is unchanged. With
`upload_credentials = policy` only the first two requests are sent. The others belong to `upload_credentials = service`,
which stores the owner of a bucket in an object. A bucket that the key may not list counts as empty.

{claiming}
## While a task stores its bundle, and when it is opened

The codes are those of [bundle tasks](task-errors.md); in the column `GET range`, which `thrave open s3://…` uses, they
are [exit codes](exit-codes.md). Parts and manifest are sent by POST with `upload_credentials = policy`, by PUT with
`upload_credentials = service`. "delete objects" is the cleanup of a task that has failed for another reason.

{storing}
## The faults

{faults}"""


def page() -> str:
    """Return the page of the documentation."""
    described = {fault: fault.__doc__ for fault in [*WHEN_STORED]}
    return _PAGE.format(
        claiming=_table(CLAIMING, WHEN_CLAIMED),
        storing=_table(STORING, WHEN_STORED),
        faults="".join(f"- **{name(fault)}**: {text}\n" for fault, text in described.items()),
    )


def name(fault: Fault) -> str:
    """Return the name of a fault in the documentation."""
    return fault.__name__.replace("_", " ")


def _table(kinds, table):
    lines = [["", *kinds], ["---"] * (len(kinds) + 1)]
    lines += [[name(fault), *map(_cell, row)] for fault, row in table.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(outcome):
    if outcome is None:
        return "-"
    results = [outcome.once] if outcome.once == outcome.always else [outcome.once, outcome.always]
    return " / ".join(result if result in (SURVIVES, LATER) else f"`{result}`" for result in results)


if __name__ == "__main__":
    PAGE.write_text(page())
