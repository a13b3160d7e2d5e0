"""The expected result of each fault for each kind of request: the one table that the tests run through.

`PYTHONPATH=tests python -m support.store_faults.fault_table` makes docs/reference/store-faults.md of it.
"""

from dataclasses import dataclass
from pathlib import Path

from support.store_faults import faults
from support.store_faults.fault_proxy import Fault, Kind

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "store-faults.md"

SURVIVES = "survives"
LATER = "removed later"
"""A task has failed, and what it had stored stays until the store lets it be removed."""


@dataclass(frozen=True)
class Outcome:
    """What comes of a fault: of one that is met once, and of one that is met from then on."""

    once: str
    always: str


def _either_way(outcome):
    return Outcome(outcome, outcome)


NOTHING = _either_way(SURVIVES)
# When a bucket is claimed, in codes of the EC2 door
AWAY = Outcome(SURVIVES, "Unavailable")
CLOCK = HIDDEN = _either_way("InaccessibleStorageLocation")
REFUSED = _either_way("InvalidParameterValue")
NOT_OURS = Outcome(SURVIVES, "InaccessibleStorageLocation")
# When a task stores its bundle, in codes of a bundle task's errors
FAILS = Outcome(SURVIVES, "Server.S3Error")
BROKEN = _either_way("Server.S3Error")
DENIED = _either_way("Client.S3Error")
DELAYED = Outcome(SURVIVES, LATER)
STAYS = _either_way(LATER)
# When a bundle is read, in exit codes of the command
UNREAD = Outcome(SURVIVES, "FAILED")
UNREADABLE, FORBIDDEN, DAMAGED = map(_either_way, ("FAILED", "REFUSED", "DAMAGED"))

Row = tuple[Outcome | None, ...]
"""By the kinds of requests; None where the fault cannot be."""

CLAIMING = (Kind.HEAD_BUCKET, Kind.CREATE_BUCKET, Kind.GET_OBJECT, Kind.LIST_OBJECTS, Kind.PUT_OWNER)
WHEN_CLAIMED: dict[Fault, Row] = {
    faults.internal_error: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.slow_down: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.denied_midway: (HIDDEN, REFUSED, NOT_OURS, NOTHING, HIDDEN),
    faults.clock_skewed: (CLOCK, CLOCK, CLOCK, CLOCK, CLOCK),
    faults.request_cut: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.answer_lost: (AWAY, NOTHING, AWAY, AWAY, NOTHING),
    faults.head_cut: (AWAY, NOTHING, AWAY, AWAY, NOTHING),
    faults.content_cut: (None, None, AWAY, AWAY, None),
    faults.silence: (AWAY, AWAY, AWAY, AWAY, AWAY),
    faults.silence_midway: (AWAY, NOTHING, AWAY, AWAY, NOTHING),
    faults.swallowed: (None, AWAY, None, None, AWAY),
    faults.changed: (None, None, None, None, AWAY),
    faults.other_etag: (None, None, None, None, NOTHING),
    faults.twice: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
    faults.other_date: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
}

STORING = (
    Kind.PUT_OBJECT, Kind.PUT_MANIFEST, Kind.POST_OBJECT, Kind.POST_MANIFEST, Kind.HEAD_OBJECT, Kind.DELETE_OBJECTS,
    Kind.GET_RANGE,
)  # fmt: skip
WHEN_STORED: dict[Fault, Row] = {
    faults.internal_error: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.slow_down: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.denied_midway: (DENIED, DENIED, DENIED, DENIED, DENIED, STAYS, FORBIDDEN),
    faults.clock_skewed: (BROKEN, BROKEN, BROKEN, BROKEN, DENIED, STAYS, UNREADABLE),
    faults.request_cut: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.answer_lost: (FAILS, NOTHING, FAILS, NOTHING, FAILS, DELAYED, UNREAD),
    faults.head_cut: (FAILS, NOTHING, NOTHING, NOTHING, FAILS, DELAYED, UNREAD),
    faults.content_cut: (None, None, None, None, None, DELAYED, UNREAD),
    faults.silence: (FAILS, FAILS, FAILS, FAILS, FAILS, DELAYED, UNREAD),
    faults.silence_midway: (FAILS, NOTHING, FAILS, NOTHING, FAILS, DELAYED, UNREAD),
    faults.swallowed: (BROKEN, BROKEN, BROKEN, BROKEN, None, STAYS, None),
    faults.swallowed_unproved: (FAILS, FAILS, FAILS, FAILS, None, None, None),
    faults.changed: (FAILS, FAILS, FAILS, FAILS, None, None, DAMAGED),
    faults.other_etag: (FAILS, NOTHING, FAILS, NOTHING, DENIED, None, NOTHING),
    faults.twice: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
    faults.other_date: (NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
}


def cases(table: dict[Fault, Row], only: tuple[Kind, ...]) -> list[tuple[Fault, Kind, Outcome]]:
    """The cells of some columns that have something in them."""
    kinds = CLAIMING if table is WHEN_CLAIMED else STORING
    return [
        (fault, kind, outcome)
        for fault, row in table.items()
        for kind, outcome in zip(kinds, row, strict=True)
        if outcome is not None and kind in only
    ]


_PAGE = """\
<!-- Made by `PYTHONPATH=tests python -m support.store_faults.fault_table`. Do not edit. -->

# What comes of a store's faults

Every cell is a test: a proxy between Thrave and SeaweedFS does it on the wire to one request of that kind, then to all
from then on. Where both come to the same, it is said once; else what comes of one is said before the `/`. "Survives"
means that the bundle is complete and opens to the same bytes. Whatever fails leaves the instance running and nothing in
the bucket, at once or, where the store does not let it be removed, as soon as it does.

Waiting is bounded by the settings `s3_timeout` (a connection on which nothing moves) and `s3_retry_timeout` (a failure
that may pass), and five seconds while a caller waits. What a store carries out only after the task has failed and the
object was deleted stays in the bucket: no client of S3 can know of it.

## While BundleInstance claims the bucket

The codes are those of [the EC2 door](ec2-errors.md); an instance that is asked for has not been touched. With
`upload_credentials = policy` only the first two requests are sent; the others belong to
`upload_credentials = service`, which names a bucket's owner in an object. A bucket that the key may not list
counts as empty.

{claiming}
## While a task stores its bundle, and when it is opened

The codes are those of [bundle tasks](task-errors.md); of `GET range`, which is how `thrave open s3://…` reads, they are
[exit codes](exit-codes.md). Parts and manifest are sent by POST with
`upload_credentials = policy`, by PUT with `upload_credentials = service`.
"delete objects" is the clean-up of a task that has failed for another reason.

{storing}
## The faults

{faults}"""


def page() -> str:
    """The docs' page."""
    described = {fault: fault.__doc__ for fault in [*WHEN_STORED]}
    return _PAGE.format(
        claiming=_table(CLAIMING, WHEN_CLAIMED),
        storing=_table(STORING, WHEN_STORED),
        faults="".join(f"- **{name(fault)}**: {text}\n" for fault, text in described.items()),
    )


def name(fault: Fault) -> str:
    """A fault's name for people."""
    return fault.__name__.replace("_", " ")


def _table(kinds, table):
    lines = [["", *kinds], ["---"] * (len(kinds) + 1)]
    lines += [[name(fault), *map(_cell, row)] for fault, row in table.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(outcome):
    if outcome is None:
        return "-"
    words = [outcome.once] if outcome.once == outcome.always else [outcome.once, outcome.always]
    return " / ".join(word if word in (SURVIVES, LATER) else f"`{word}`" for word in words)


if __name__ == "__main__":
    PAGE.write_text(page())
