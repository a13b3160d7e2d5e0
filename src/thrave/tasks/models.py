"""Data of bundle tasks and hosts: states, steps, transitions, tasks and requests. Nothing here uses the database.

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
    """The state of a host; `HOST_STATES` describes each."""

    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"
    FENCED = "fenced"


class HostEvent(StrEnum):
    """What changes the state of a host."""

    AGENT_STARTS = "its agent starts"
    DRAIN = "`thrave host drain`"
    AGENT_HAS_DRAINED = "its agent has finished its started tasks"
    ACTIVATE = "`thrave host activate`"
    FENCE = "`thrave host adopt` or `retire`"


HOST_STATES: dict[HostState, str] = {
    HostState.ACTIVE: "The host starts tasks.",
    HostState.DRAINING: "The host finishes the tasks that it has started, and starts no others, even if its agent "
    "restarts. Then its agent ends.",
    HostState.DRAINED: "The agent has ended after a drain. Tasks that have not started wait for its next start.",
    HostState.FENCED: "Another host has adopted its tasks, so its agent has lost the lease and can write nothing. The "
    "next start of an agent makes the host active again.",
}
"""What each state means."""


HOST_TRANSITIONS: dict[HostEvent, dict[HostState, HostState]] = {
    HostEvent.AGENT_STARTS: {
        HostState.ACTIVE: HostState.ACTIVE,
        HostState.DRAINING: HostState.DRAINING,
        HostState.DRAINED: HostState.DRAINING,
        HostState.FENCED: HostState.ACTIVE,
    },
    HostEvent.DRAIN: {
        HostState.ACTIVE: HostState.DRAINING,
        HostState.DRAINING: HostState.DRAINING,
        HostState.DRAINED: HostState.DRAINED,
    },
    HostEvent.AGENT_HAS_DRAINED: {
        HostState.DRAINING: HostState.DRAINED,
        HostState.DRAINED: HostState.DRAINED,
    },
    HostEvent.ACTIVATE: {
        HostState.ACTIVE: HostState.ACTIVE,
        HostState.DRAINING: HostState.ACTIVE,
        HostState.DRAINED: HostState.ACTIVE,
    },
    HostEvent.FENCE: dict.fromkeys(HostState, HostState.FENCED),
}
"""For each event the next state, by the current state. An event that has no entry for the current state is refused."""


HEARTBEAT_STATES = frozenset({HostState.ACTIVE, HostState.DRAINING})
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


TASK_TRANSITIONS: dict[BundleTaskState, frozenset[BundleTaskState]] = {
    _S.PENDING: frozenset({_S.WAITING_FOR_SHUTDOWN, _S.CANCELLING, _S.FAILED}),
    _S.WAITING_FOR_SHUTDOWN: frozenset({_S.BUNDLING, _S.CANCELLING, _S.FAILED}),
    _S.BUNDLING: frozenset({_S.STORING, _S.CANCELLING, _S.FAILED}),
    _S.STORING: frozenset({_S.COMPLETE, _S.CANCELLING, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.FAILED}),
    _S.COMPLETE: frozenset(),
    _S.FAILED: frozenset(),
}
"""For each state the possible next states."""


ALLOWED_FROM: dict[BundleTaskState, frozenset[BundleTaskState]] = {
    state: frozenset(earlier for earlier, later in TASK_TRANSITIONS.items() if state in later)
    for state in BundleTaskState
}
"""For each state the states from which a task can change to it."""


FINISHED: frozenset[BundleTaskState] = frozenset(state for state, later in TASK_TRANSITIONS.items() if not later)


UNFINISHED: frozenset[BundleTaskState] = frozenset(BundleTaskState) - FINISHED


CANCELLABLE: frozenset[BundleTaskState] = ALLOWED_FROM[_S.CANCELLING]


WITH_PROGRESS: frozenset[BundleTaskState] = frozenset({_S.BUNDLING, _S.STORING})
"""The states in which `progress` counts from 0 to 100."""


class Step(StrEnum):
    """A step of a bundle task, as the database names it.

    A failure or a cancellation is recorded before anything is undone: one transaction writes the error and makes the
    first undo step the next one. From then on no forward step can run. Each step may be repeated.
    """

    STOP = "stop"
    RUN_ON_OVERLAY = "run-on-overlay"
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


class StepDescription(NamedTuple):
    """What a step does, and what happens if it fails."""

    action: str
    on_failure: str


_UNDO = "The failure is recorded, and the undo begins."


_WARN = "The failure is recorded as a warning, and the next step follows. A background job retries."


_APPEND = "The failure is added to the task's message, and the next step follows. A background job retries."


FORWARD_STEPS: dict[Step, StepDescription] = {
    Step.STOP: StepDescription(
        "Records the power state of the instance; repeats a shutdown request until the guest has powered off.", _UNDO
    ),
    Step.RUN_ON_OVERLAY: StepDescription("Starts the instance on an overlay, if `capture_mode` is `overlay`.", _UNDO),
    Step.SEAL: StepDescription("Reads and seals the root volume, and uploads the parts.", _UNDO),
    Step.START: StepDescription("Starts the instance, if its owner wants it to run.", _WARN),
    Step.STORE: StepDescription(
        "Verifies that the bucket has every part; uploads the side file, and the manifest last.",
        "If the bucket has the manifest, the next step follows. Otherwise " + _UNDO.lower(),
    ),
    Step.MERGE: StepDescription("Merges the overlay, if there is one.", _WARN),
    Step.REMOVE_EARLIER: StepDescription("Deletes the remaining objects of the bundle that was replaced.", _WARN),
    Step.COMPLETE: StepDescription("Ends the task as `complete`.", "The step is repeated."),
}
"""The steps of a task without a failure, in their order."""


UNDO_STEPS: dict[Step, StepDescription] = {
    Step.UNDO_START: StepDescription("Starts the instance, if its owner wants it to run.", _APPEND),
    Step.UNDO_MERGE: StepDescription("Merges the overlay, if there is one.", _APPEND),
    Step.UNDO_REMOVE: StepDescription("Deletes every object that the task has sent.", _APPEND),
    Step.FAIL: StepDescription("Ends the task as `failed`, with the recorded error.", "The step is repeated."),
}
"""The steps after a failure or a cancellation, in their order."""


FIRST_STEP, FIRST_UNDO_STEP = next(iter(FORWARD_STEPS)), next(iter(UNDO_STEPS))


STEPS_UNTIL_READ = frozenset({Step.STOP, Step.RUN_ON_OVERLAY, Step.SEAL})
"""Steps that fail if the instance had to be started in the meantime: its volume has changed then."""


STEPS_UNTIL_STORED = STEPS_UNTIL_READ | {Step.START, Step.STORE}
"""While one of these is the next step, the bundle is not complete in the bucket, and a failure undoes the task."""


STEPS_AFTER_STORED = frozenset(FORWARD_STEPS) - STEPS_UNTIL_STORED
"""While one of these is the next step, the bundle is complete in the bucket, and no failure can undo it."""


STEPS_WITH_BORROWED_INSTANCE = STEPS_UNTIL_READ | {Step.START, Step.UNDO_START}
"""While one of these is the next step, the instance may be off because of the task."""


STEP_TRANSITIONS: dict[Step, Step] = {
    step: following for steps in ([*FORWARD_STEPS], [*UNDO_STEPS]) for step, following in pairwise(steps)
}
"""For each step the following one; the last forward step and the last undo step have none and end the task."""


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
    created_bucket: bool = False
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
    created_bucket: bool | None
    """True if the request created the bucket, and the bucket must be deleted if the task fails."""
    run_after_task: bool | None
    """Whether the instance is to run after the task, if its owner requests nothing else: as it ran before the task
    changed its power, or as its owner had requested then. None until this is recorded."""
    power_recovery_until: datetime | None
    """Until when power recovery checks the instance (`housekeeping.py`); None: no longer."""
    error_code: str | None
    """Why the task fails or has failed: recorded before the undo, so it is also set before the task has ended."""
    error_message: str | None
    warning: str | None
    """Warnings for the owner of a task that continued."""
    volume_size: int | None
    """Bytes of the root volume; None until it has been opened."""
    runs: int
    """Number of runs: one, and one more after each crash. Also the number of the last run."""


class TaskEvent(NamedTuple):
    """An entry of a task's history."""

    time: datetime
    """Aware, in UTC."""
    state: BundleTaskState
    """The state of the task then."""
    message: str | None
    """What happened in that state; None: the task changed to this state."""
