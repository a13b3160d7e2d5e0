"""The steps of a bundle task, in their order: forward, and undo. The task's row names the one that comes next.

A failure or a cancellation is recorded before anything is undone: in one transaction the row gets its error and the
first step of undoing. From then on no forward step can run, whatever is restarted. Each step may be repeated.

`bundling.py` does the steps; `records.py` moves the row from one to the next.
"""

from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple


class Step(StrEnum):
    """A step of a bundle task, as the database names it."""

    STOP = "stop"
    FREE = "free"
    SEAL = "seal"
    START = "start"
    STORE = "store"
    MERGE = "merge"
    REMOVE_EARLIER = "remove-earlier"
    COMPLETE = "complete"
    UNDO_START = "undo-start"
    UNDO_MERGE = "undo-merge"
    UNDO_REMOVE = "undo-remove"
    FAIL = "fail"


class Row(NamedTuple):
    """A row of the table: what a step does, and what becomes of the task if the step fails."""

    does: str
    fails: str


_UNDO = "The failure is recorded, and undoing begins."
_GO_ON = "It is recorded as a warning, a background job of the agent repeats it, and the next step follows."
_APPEND = "It is added to the task's message, a background job of the agent repeats it, and the next step follows."

FORWARD: dict[Step, Row] = {
    Step.STOP: Row("Records the instance's power state; asks the guest to power off, until it has.", _UNDO),
    Step.FREE: Row("Starts the instance on an overlay, if `capture_mode` is `overlay`.", _UNDO),
    Step.SEAL: Row("Reads the root volume; seals it, part by part, into the bucket.", _UNDO),
    Step.START: Row("Starts the instance, if it is to run.", _GO_ON),
    Step.STORE: Row(
        "Proves that the bucket has every part; stores the side file, and the manifest last.",
        "If the manifest is in the bucket, the next step follows. If not, the failure is recorded, and undoing begins.",
    ),
    Step.MERGE: Row("Merges the overlay, if there is one.", _GO_ON),
    Step.REMOVE_EARLIER: Row("Removes what is left of a bundle that was replaced.", _GO_ON),
    Step.COMPLETE: Row("Ends the task as `complete`.", "It is repeated."),
}

UNDO: dict[Step, Row] = {
    Step.UNDO_START: Row("Starts the instance, if it is to run.", _APPEND),
    Step.UNDO_MERGE: Row("Merges the overlay, if there is one.", _APPEND),
    Step.UNDO_REMOVE: Row("Removes every object that the task has sent.", _APPEND),
    Step.FAIL: Row("Ends the task as `failed`, with the recorded error.", "It is repeated."),
}

FIRST, FIRST_OF_UNDO = next(iter(FORWARD)), next(iter(UNDO))
BEFORE_READ = frozenset({Step.STOP, Step.FREE, Step.SEAL})
"""Steps that fail if the instance had to be started meanwhile: its volume is not what it was."""
MAY_FAIL = BEFORE_READ | {Step.START, Step.STORE}
"""Steps before which the bundle is not complete in the bucket: until then a failure undoes the task."""
AFTER_STORED = frozenset(FORWARD) - MAY_FAIL
"""Steps before which the bundle is complete in the bucket: no failure can undo it."""
BORROWED = BEFORE_READ | {Step.START, Step.UNDO_START}
"""Steps before which the instance may be off because of the task."""
_FOLLOWS = {step: after for steps in ([*FORWARD], [*UNDO]) for step, after in pairwise(steps)}


def following(step: Step) -> Step | None:
    """Return the step that comes after one that has ended; None after the last, with which the task has ended."""
    return _FOLLOWS.get(step)
