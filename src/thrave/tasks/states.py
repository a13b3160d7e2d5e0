"""The states of a bundle task. Everything that decides which state may follow which stands in this file.

A task is `pending` until its host begins; `waiting-for-shutdown` while the guest is asked to power off; `bundling`
while the root volume is read, sealed and sent part by part; `storing` while the stored parts are checked and the
manifest is written; then `complete`. From any of these it may fail, or be cancelled, which EC2 shows as `cancelling`
and then `failed` with `Client.Cancelled`: there is no `cancelled` (botocore's model of EC2 2016-11-15, and what AWS
answered).

    pending ──> waiting-for-shutdown ──> bundling ──> storing ──> complete
       │                 │                  │            │
       └────────┬────────┴────────┬─────────┴─────┬──────┘
                v                 v               │
            cancelling ───────> failed <──────────┘

This module changes nothing by itself: `records.py` applies the table to the database.
"""

from enum import StrEnum


class BundleTaskState(StrEnum):
    """A bundle task's state, in EC2's own words."""

    PENDING = "pending"
    WAITING_FOR_SHUTDOWN = "waiting-for-shutdown"
    BUNDLING = "bundling"
    STORING = "storing"
    CANCELLING = "cancelling"
    COMPLETE = "complete"
    FAILED = "failed"


_S = BundleTaskState

FOLLOWS: dict[BundleTaskState, frozenset[BundleTaskState]] = {
    _S.PENDING: frozenset({_S.WAITING_FOR_SHUTDOWN, _S.CANCELLING, _S.FAILED}),
    _S.WAITING_FOR_SHUTDOWN: frozenset({_S.BUNDLING, _S.CANCELLING, _S.FAILED}),
    _S.BUNDLING: frozenset({_S.STORING, _S.CANCELLING, _S.FAILED}),
    _S.STORING: frozenset({_S.COMPLETE, _S.CANCELLING, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.FAILED}),
    _S.COMPLETE: frozenset(),
    _S.FAILED: frozenset(),
}

FINISHED: frozenset[BundleTaskState] = frozenset(state for state, after in FOLLOWS.items() if not after)
UNFINISHED: frozenset[BundleTaskState] = frozenset(BundleTaskState) - FINISHED
CANCELLABLE: frozenset[BundleTaskState] = frozenset(s for s, after in FOLLOWS.items() if _S.CANCELLING in after)
WITH_PROGRESS: frozenset[BundleTaskState] = frozenset({_S.BUNDLING, _S.STORING})


def before(state: BundleTaskState) -> frozenset[BundleTaskState]:
    """The states from which `state` can be reached in one step."""
    return frozenset(earlier for earlier, after in FOLLOWS.items() if state in after)
