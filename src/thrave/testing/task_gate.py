"""Stops bundle tasks in their states until a test lets them continue, and makes them fail as the faults say."""

from thrave.concurrency import monotonic, new_condition
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.models import FINISHED, BundleTaskState
from thrave.testing.faults import FaultList

_S = BundleTaskState
ORDER = (_S.PENDING, _S.WAITING_FOR_SHUTDOWN, _S.BUNDLING, _S.STORING, _S.COMPLETE)
"""The states of a task without a failure."""

ADVANCE_TIMEOUT = 60.0  # seconds for a task to reach a state that a test waits for


class TaskGate:
    """The states that tasks have reached, and how far each may go. Thread-safe.

    Args:
        faults: The faults of the service.
    """

    def __init__(self, faults: FaultList) -> None:
        self._faults = faults
        self._changed = new_condition()
        self._holds = False
        self._reached: dict[str, BundleTaskState] = {}
        self._allowed: dict[str, int] = {}  # index in ORDER of the state that a task may reach
        self._cancelled: set[str] = set()
        self._generation = 0  # of tests: raised at the end of each

    def on_state(self, bundle_id: str, state: BundleTaskState) -> None:
        """Record a state, and wait while the task may not continue. See `tasks.workflow.OnState`.

        Raises:
            TaskCancelled: The task was cancelled meanwhile.
            TaskFailure: A fault says so.
        """
        with self._changed:
            self._reached[bundle_id] = state
            self._changed.notify_all()
            if state in FINISHED:
                return
            generation, waits = self._generation, self._faults.take_wait(state) is not None
            while (
                generation == self._generation
                and bundle_id not in self._cancelled
                and (waits or (self._holds and self._allowed.get(bundle_id, 0) <= ORDER.index(state)))
            ):
                self._changed.wait()
            if bundle_id in self._cancelled:
                self._cancelled.remove(bundle_id)
                if state is not _S.PENDING:  # a pending task that is cancelled has ended
                    raise TaskCancelled
        if (fault := self._faults.take_failure(state)) is not None:
            raise TaskFailure(str(fault.options["code"]), str(fault.options["message"]))

    def hold(self) -> None:
        """From now on each task stops in each state, until `advance`."""
        with self._changed:
            self._holds = True

    def release(self) -> None:
        """Let every task continue."""
        with self._changed:
            self._holds = False
            self._generation += 1
            self._allowed.clear()
            self._changed.notify_all()

    def cancel(self, bundle_id: str) -> None:
        """Let a task that was cancelled continue: it finds out."""
        with self._changed:
            self._cancelled.add(bundle_id)
            self._changed.notify_all()

    def advance(self, bundle_id: str, until: BundleTaskState | None = None) -> BundleTaskState:
        """Let a task continue until it is in a state, or has ended; return its state.

        Args:
            bundle_id: The task.
            until: A state of ORDER; None: the next state.

        Raises:
            TimeoutError: The task does not reach the state.
        """
        with self._changed:
            if until is None:
                reached = self._reached.get(bundle_id, _S.PENDING)
                until = ORDER[min(ORDER.index(reached) + 1, len(ORDER) - 1)] if reached in ORDER else reached
            if until in ORDER:
                self._allowed[bundle_id] = max(self._allowed.get(bundle_id, 0), ORDER.index(until))
                self._changed.notify_all()
            return self._wait_until(bundle_id, until)

    def wait_for_end(self, bundle_id: str) -> BundleTaskState:
        """Wait until a task has ended. Raises TimeoutError."""
        with self._changed:
            return self._wait_until(bundle_id, _S.COMPLETE)

    def _wait_until(self, bundle_id: str, until: BundleTaskState) -> BundleTaskState:
        def has_reached() -> bool:
            state = self._reached.get(bundle_id)
            return state in FINISHED or (state is not None and until in ORDER and state in ORDER[ORDER.index(until) :])

        deadline = monotonic() + ADVANCE_TIMEOUT
        while not has_reached():
            if not self._changed.wait(max(0.0, deadline - monotonic())) and not has_reached():
                raise TimeoutError(
                    f"{bundle_id} is not {until} after {ADVANCE_TIMEOUT:g} seconds; it is "
                    f"{self._reached.get(bundle_id, 'not started')}."
                )
        return self._reached[bundle_id]
