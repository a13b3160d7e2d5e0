"""Plain data of bundle tasks and hosts: states, steps, transitions, tasks and requests. Nothing here uses the database.

`repository.py` and `hosts.py` apply the tables of transitions to the database, with conditional updates.

The states of a task; EC2 has no `cancelled` (botocore's model of EC2 2016-11-15, and what AWS answered):

    pending ──> waiting-for-shutdown ──> bundling ──> storing ──> complete
       │                 │                  │            │
       └────────┬────────┴────────┬─────────┴─────┬──────┘
                v                 v               │
            cancelling ───────> failed <──────────┘
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple


class HostState(StrEnum):
    """The state of a host.

    An operator drains a host: it finishes what it has started, and takes no more tasks, even if its agent restarts,
    until an operator activates it. A host whose tasks another host has adopted is `fenced`: its agent has lost its
    lease. The next start of an agent makes it active again.
    """

    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"
    FENCED = "fenced"


class HostEvent(StrEnum):
    """What changes the state of a host."""

    AGENT_STARTS = "its agent starts"
    DRAIN = "`thrave host drain`"
    AGENT_HAS_DRAINED = "its agent has finished what was begun"
    ACTIVATE = "`thrave host activate`"
    TAKE_AWAY = "`thrave host adopt` or `retire`"


_HOST = HostState


MEANING: dict[HostState, str] = {
    _HOST.ACTIVE: "It takes tasks.",
    _HOST.DRAINING: "It finishes what it has begun, and takes no more. Its agent ends then.",
    _HOST.DRAINED: "Its agent has ended, as it was asked to. What it had not begun waits for it.",
    _HOST.FENCED: "Another host has adopted its tasks. Its agent may do nothing more until it is started anew.",
}


MOVES: dict[HostEvent, dict[HostState, HostState]] = {
    HostEvent.AGENT_STARTS: {
        _HOST.ACTIVE: _HOST.ACTIVE,
        _HOST.DRAINING: _HOST.DRAINING,
        _HOST.DRAINED: _HOST.DRAINING,
        _HOST.FENCED: _HOST.ACTIVE,
    },
    HostEvent.DRAIN: {_HOST.ACTIVE: _HOST.DRAINING, _HOST.DRAINING: _HOST.DRAINING, _HOST.DRAINED: _HOST.DRAINED},
    HostEvent.AGENT_HAS_DRAINED: {_HOST.DRAINING: _HOST.DRAINED, _HOST.DRAINED: _HOST.DRAINED},
    HostEvent.ACTIVATE: {_HOST.ACTIVE: _HOST.ACTIVE, _HOST.DRAINING: _HOST.ACTIVE, _HOST.DRAINED: _HOST.ACTIVE},
    HostEvent.TAKE_AWAY: dict.fromkeys(_HOST, _HOST.FENCED),
}
"""For each event the state after it, by the state before it. An event that has no such entry is refused."""


WITH_AN_AGENT = frozenset({_HOST.ACTIVE, _HOST.DRAINING})
"""The states in which a host should send heartbeats."""


class BundleTaskState(StrEnum):
    """The state of a bundle task, with EC2's names.

    `pending` until its host starts it; `waiting-for-shutdown` while the guest shuts down; `bundling` while the root
    volume is read, sealed and uploaded; `storing` while the stored parts are verified and the manifest is uploaded. A
    cancelled task is `cancelling`, then `failed` with `Client.Cancelled`.
    """

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
    """Return the states from which a task can change to `state`."""
    return frozenset(earlier for earlier, after in FOLLOWS.items() if state in after)


class Step(StrEnum):
    """A step of a bundle task, as the database names it.

    A failure or a cancellation is recorded before anything is undone: one transaction writes the error and makes the
    first undo step the next one. From then on no forward step can run. Each step may be repeated.
    """

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
    """What a step does, and what happens if it fails."""

    does: str
    fails: str


_UNDO = "The failure is recorded, and undoing begins."


_WARN = "It is recorded as a warning, a background job of the agent repeats it, and the next step follows."


_APPEND = "It is added to the task's message, a background job of the agent repeats it, and the next step follows."


FORWARD: dict[Step, Row] = {
    Step.STOP: Row("Records the instance's power state; asks the guest to power off, until it has.", _UNDO),
    Step.FREE: Row("Starts the instance on an overlay, if `capture_mode` is `overlay`.", _UNDO),
    Step.SEAL: Row("Reads the root volume; seals it, part by part, into the bucket.", _UNDO),
    Step.START: Row("Starts the instance, if it is to run.", _WARN),
    Step.STORE: Row(
        "Proves that the bucket has every part; stores the side file, and the manifest last.",
        "If the manifest is in the bucket, the next step follows. If not, the failure is recorded, and undoing begins.",
    ),
    Step.MERGE: Row("Merges the overlay, if there is one.", _WARN),
    Step.REMOVE_EARLIER: Row("Removes what is left of a bundle that was replaced.", _WARN),
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
"""Steps that fail if the instance had to be started meanwhile: its volume has changed then."""


MAY_FAIL = BEFORE_READ | {Step.START, Step.STORE}
"""Steps before which the bundle is not complete in the bucket: until then a failure undoes the task."""


AFTER_STORED = frozenset(FORWARD) - MAY_FAIL
"""Steps before which the bundle is complete in the bucket: no failure can undo it."""


BORROWED = BEFORE_READ | {Step.START, Step.UNDO_START}
"""Steps before which the instance may be off because of the task."""


_FOLLOWS = {step: after for steps in ([*FORWARD], [*UNDO]) for step, after in pairwise(steps)}


def following(step: Step) -> Step | None:
    """Return the step after `step`; None after the last step, which ends the task."""
    return _FOLLOWS.get(step)


@dataclass(frozen=True, kw_only=True)
class BundleRequest:
    """The parameters of BundleInstance, after every check that can be made at request time has passed."""

    account_id: str
    """The caller's account."""
    owner_id: str
    """The account of `access_key_id`: the owner of the bucket, whose key signed the upload policy."""
    instance_id: str
    bucket: str
    prefix: str
    access_key_id: str
    upload_policy: str = field(repr=False)
    """The base64 text that was signed. Of a policy that was encoded twice, the layer that the signature covers."""
    upload_policy_signature: str = field(repr=False)
    made_bucket: bool = False
    """Whether the request created the bucket."""


@dataclass(frozen=True, kw_only=True)
class BundleTask:
    """One bundle task, as DescribeBundleTasks shows it. Times are aware and in UTC."""

    bundle_id: str
    account_id: str
    owner_id: str
    instance_id: str
    host: str
    state: BundleTaskState
    next_step: Step
    """The next step of its host; an undo step once the task has failed or was cancelled."""
    progress: int | None
    """Percent within `bundling`, and again within `storing`; None before."""
    start_time: datetime
    update_time: datetime
    bucket: str
    prefix: str
    access_key_id: str
    made_bucket: bool | None
    """Whether the request created the bucket, and the bucket is to be removed if the task fails."""
    was_running: bool | None
    """Whether the instance ran before the task touched it; None until that is known."""
    power_recovery_until: datetime | None
    """Until when the guest may still power off because of this task; None if it will not."""
    error_code: str | None
    """Why the task fails or has failed: recorded before the undo, so it is also set before the task has ended."""
    error_message: str | None
    warning: str | None
    """Warnings for the owner of a task that continued."""
    volume_size: int | None
    """Bytes of the root volume; None until it has been opened."""
    attempts: int
    """How often a host has started it: once, and again after each crash. The number of its last run."""


class TaskEvent(NamedTuple):
    """Something that happened to a task."""

    time: datetime
    """Aware, in UTC."""
    state: BundleTaskState
    """The state of the task then."""
    message: str | None
    """What happened in that state; None: the task changed to it."""
