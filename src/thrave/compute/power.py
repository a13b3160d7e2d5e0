"""Switching an instance's power for somebody who does not wait, and for somebody who does.

`power_off` asks the guest until it is off. `PowerControl` is what a caller of EC2's can have done without waiting;
`BackgroundPower` carries out what `power_records.py` has recorded. All work with any inventory, and none ever cuts the
power.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import sqlalchemy as sa
import structlog

from thrave.compute.base import HypervisorDriver
from thrave.compute.errors import (
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceLocked,
    InstanceNotFound,
    StateChangedError,
)
from thrave.compute.instance import TERMINATING, InstanceState
from thrave.compute.power_records import PowerAction, PowerRecord, PowerRecords
from thrave.compute.timeouts import RunningTime, is_busy
from thrave.concurrency import Event, Lock, monotonic, new_event, new_lock, sleep, supervised
from thrave.write_guard import start_guard

ASK_AGAIN = 5.0  # seconds; a guest that is still booting does not hear the first request to power off
LOOK_AGAIN = 0.2  # seconds
_LONGEST_LOOK = 30.0  # seconds; this process stood still for the rest of a longer one
LONGEST = 300.0  # seconds between two attempts at what fails, or is not heard, at last
_HELD_LOOK_AGAIN = 1.0  # seconds
UP = frozenset({InstanceState.PENDING, InstanceState.RUNNING})
TO_START = frozenset({InstanceState.STOPPED, InstanceState.PENDING})
"""What is to be started if it is wanted on: a start that was cut off leaves an instance `pending`, which may be off."""

log = structlog.get_logger()

_switching: dict[str, Lock] = {}
_switching_lock = new_lock()


@contextmanager
def switching(instance_id: str) -> Iterator[None]:
    """Be the only one in this process who decides about an instance's power and acts upon it.

    Whoever starts an instance, or strikes out a request because of the state that was seen, reads within this block
    what is wanted. So no start that was decided upon an older request comes after a newer one was struck out.

    Raises:
        InstanceHeld: Somebody else does so just now, or a command that was abandoned may still be carried out.
    """
    with _switching_lock:
        lock = _switching.setdefault(instance_id, new_lock())
    if not lock.acquire(blocking=False):
        raise InstanceLocked(instance_id)
    try:
        if is_busy(instance_id):
            raise InstanceLocked(instance_id)
        yield
    finally:
        lock.release()


def power_off(
    instances: HypervisorDriver,
    instance_id: str,
    *,
    grace: float,
    ask: Callable[[str], None] | None = None,
    pause: Callable[[float], object] = sleep,
) -> InstanceState:
    """Ask the guest to power off, again and again, until it has or is gone.

    Args:
        instances: The inventory that has it.
        instance_id: The instance.
        grace: Seconds that the guest has; those in which this process ran count.
        ask: Asks it; `instances.request_stop` if none is given.
        pause: Waits some seconds between two looks; may raise, to end it all.

    Returns:
        The state that it is in then: `stopped`, `shutting-down`, `terminated`, or any other if the time was up.

    Raises:
        InstanceError: As `HypervisorDriver.state` and `HypervisorDriver.request_stop`.
    """
    ask = ask or instances.request_stop
    waiting, waited = RunningTime(_LONGEST_LOOK, monotonic), 0.0
    asked_again = 0.0
    while (state := instances.state(instance_id)) not in {InstanceState.STOPPED, *TERMINATING}:
        waited += waiting.passed()
        if waited > grace:
            break
        if monotonic() > asked_again:
            ask(instance_id)
            asked_again = monotonic() + ASK_AGAIN
        pause(LOOK_AGAIN)
    return state


class PowerControl(Protocol):
    """Has instances switched for somebody who does not wait for it. What was asked last is what is done in the end.

    When a method returns, the request is recorded: it is carried out whatever happens to any process. `by` says who
    asks. Every method raises IncorrectInstanceState if the instance is being terminated; a reboot is ignored then.
    """

    def start(self, instance_id: str, by: str | None = None) -> None:
        """Have the instance started, once nobody holds it any more."""

    def stop(self, instance_id: str, by: str | None = None) -> None:
        """Have the guest power off.

        Raises:
            IncorrectInstanceState: There is no way to stop it. Not every control can tell at once.
            InstanceCommandFailed: The hypervisor refuses at once; then nothing is recorded.
        """

    def reboot(self, instance_id: str, by: str | None = None) -> None:
        """Have the guest power off and the instance started again. A guest that does not hear it runs on."""

    def terminate(self, instance_id: str, by: str | None = None) -> None:
        """Have the guest power off for good. Raises as `stop`."""


class BackgroundPower:
    """Carries out the requests that are recorded, each instance's in a thread of its own.

    A request is struck out when the machine is seen to be as it wants it, and tried again until then, at growing
    intervals; also after a crash (`look`). Before each act the row is read again, so that nothing is done for a request
    that another one has replaced. What fails about one instance does not concern the others.

    Args:
        instances: The inventory.
        records: Where requests are recorded; in memory if none is given: then they end with the process.
        grace: Seconds that a guest has to power off for a reboot.
        check: Called before each command to a hypervisor; raises if this process may not give any.
    """

    def __init__(
        self,
        instances: HypervisorDriver,
        records: PowerRecords | None = None,
        *,
        grace: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._instances = instances
        self._records = records or PowerRecords.in_memory()
        self._grace = grace
        self._check = check
        self._busy: dict[str, Event] = {}  # an event wakes the instance's thread
        self._works: dict[str, _Work] = {}
        self._lock = new_lock()

    def start(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._records.request(instance_id, PowerAction.START, by)
        self._begin(instance_id)

    def reboot(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._records.request(instance_id, PowerAction.REBOOT, by)
        self._begin(instance_id)

    def stop(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._ask_at_once(instance_id, PowerAction.STOP, by)

    def terminate(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._ask_at_once(instance_id, PowerAction.TERMINATE, by)

    def look(self) -> None:
        """Go on with every request that is recorded: those of other processes, and of this one before it died."""
        for instance_id, version in self._records.to_do().items():
            # A request that another process has recorded does not wait until the one before it is tried again.
            self._begin(instance_id, wake=self._work(instance_id).version != version)

    def _ask_at_once(self, instance_id: str, action: PowerAction, by: str | None) -> None:
        """Record a request and try it once, so that its caller hears of a refusal."""
        before = self._records.request(instance_id, action, by)
        try:
            self._work(instance_id).step(only=before.version + 1)
        except (StateChangedError, InstanceLocked):  # somebody else acts on it just now
            self._begin(instance_id)
        except (IncorrectInstanceState, InstanceCommandFailed):
            self._records.withdraw(before)
            self._begin(instance_id)
            raise
        except Exception as error:  # noqa: BLE001 (it is recorded, and tried again)
            log.warning("power request failed, retrying", instance_id=instance_id, request=action, error=str(error))
            self._begin(instance_id)
        else:
            self._begin(instance_id)

    def _work(self, instance_id: str) -> "_Work":
        with self._lock:
            if (work := self._works.get(instance_id)) is None:
                work = _Work(self._instances, self._records, instance_id, self._grace, self._check)
                self._works[instance_id] = work
            return work

    def _begin(self, instance_id: str, *, wake: bool = True) -> None:
        with self._lock:
            if (busy := self._busy.get(instance_id)) is not None:
                if wake:
                    busy.set()
                return
            self._busy[instance_id] = wakes = new_event()
        try:
            supervised(
                f"power {instance_id}",
                lambda: self._carry_out(instance_id, wakes),
                on_failure=lambda error: self._failed(instance_id, error),
            )
        except RuntimeError as error:  # no more threads: the next look begins again
            self._failed(instance_id, error)

    def _carry_out(self, instance_id: str, wakes: Event) -> None:
        """Carry out what is recorded of an instance, until nothing is."""
        work = self._work(instance_id)
        while True:
            wakes.clear()
            pause = work.attempt()
            if pause is not None:
                wakes.wait(pause)
                continue
            with self._lock:
                if not wakes.is_set():
                    del self._busy[instance_id]
                    return

    def _failed(self, instance_id: str, error: BaseException) -> None:
        with self._lock:
            self._busy.pop(instance_id, None)
        # What is recorded stays so, and the next look begins again.
        if isinstance(error, sa.exc.DBAPIError):
            log.warning("the database does not answer", instance_id=instance_id, reason=str(error.orig))
        else:
            log.error("power request interrupted", instance_id=instance_id, exc_info=error)


class _Work:
    """What is done for one instance, step by step. Times are this process's own: after a crash they begin anew."""

    def __init__(
        self,
        instances: HypervisorDriver,
        records: PowerRecords,
        instance_id: str,
        grace: float,
        check: Callable[[], None],
    ) -> None:
        self._instances = instances
        self._records = records
        self._instance_id = instance_id
        self._grace = grace
        self._check = check
        self._failures = 0
        self._take_up(-1)

    @property
    def version(self) -> int:
        """That of the request that was worked on last."""
        return self._version

    def attempt(self) -> float | None:
        """Do the next step; give the seconds until the one after it, or None if nothing is to be done any more.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: What is recorded cannot be read or written.
        """
        try:
            pause = self.step()
        except sa.exc.SQLAlchemyError:
            raise
        except InstanceLocked:
            return _HELD_LOOK_AGAIN
        except StateChangedError:
            return LOOK_AGAIN
        except (IncorrectInstanceState, InstanceNotFound) as error:
            self._drop("power request impossible", str(error))
            return 0.0
        except Exception as error:  # noqa: BLE001 (whatever it is about one instance, it is tried again)
            # Not `retry`: a new request for the instance ends the wait, and each attempt reads the request again.
            pause = min(LOOK_AGAIN * 2**self._failures, LONGEST)
            self._failures += 1
            log.warning(
                "power request failed, retrying", instance_id=self._instance_id, attempt=self._failures,
                error=str(error) or type(error).__name__,
            )  # fmt: skip
        else:
            self._failures = 0
        return pause

    def step(self, *, only: int | None = None) -> float | None:
        """The same; what goes wrong is raised.

        Args:
            only: The version of the row for which it is to be done; None: any.
        """
        with switching(self._instance_id):
            record = self._records.get(self._instance_id)
            if record.request is None or only not in {None, record.version}:
                return None
            if record.version != self._version:
                self._take_up(record.version)
            if record.is_held and record.request is not PowerAction.TERMINATE:
                return _HELD_LOOK_AGAIN  # its bundle task switches it, and in the end does what is wanted then
            if record.is_expired:
                self._drop("power request expired", "it could not be carried out in time", strike=self._records.expire)
                return 0.0
            return self._next(record, self._instances.state(self._instance_id))

    def _take_up(self, version: int) -> None:
        self._version = version
        self._failures = 0
        self._first_look = monotonic()
        self._first_asked: float | None = None
        self._ask_again = 0.0
        self._deaf = 0

    def _next(self, record: PowerRecord, state: InstanceState) -> float | None:
        """What is to be done for a request in a state."""
        if state is InstanceState.TERMINATED or (state in TERMINATING and record.request is not PowerAction.TERMINATE):
            return self._finish(record)
        if record.request is PowerAction.TERMINATE:
            return self._ask(record, self._instances.terminate)
        if record.request is PowerAction.STOP:
            is_off = state is InstanceState.STOPPED
            return self._finish(record) if is_off else self._ask(record, self._instances.request_stop)
        if self._is_off(state):
            return self._start(record)
        return self._reboot(record, state) if record.request is PowerAction.REBOOT else self._await_start(record, state)

    def _is_off(self, state: InstanceState) -> bool:
        """Whether it is to be started. A file says `stopping` for ever if its stopCommand died with a process."""
        is_late = monotonic() - self._first_look > self._grace
        return state is InstanceState.STOPPED or (state is InstanceState.STOPPING and is_late)

    def _start(self, record: PowerRecord) -> float | None:
        # Written in any case: it proves that the instance is still this host's.
        if not self._records.note_off(record):
            return 0.0
        with start_guard.using(self._check):
            self._instances.start(self._instance_id)
        return self._finish(record)

    def _await_start(self, record: PowerRecord, state: InstanceState) -> float | None:
        """It runs. A guest that was asked to power off before may yet hear it, and is started then."""
        is_late = monotonic() - self._first_look > 2 * self._grace
        if state in UP and (is_late or not record.asked):
            return self._finish(record) if state is InstanceState.RUNNING else self._start(record)
        return self._until_next_look()

    def _reboot(self, record: PowerRecord, state: InstanceState) -> float | None:
        asked_for = 0.0 if self._first_asked is None else monotonic() - self._first_asked
        if asked_for <= self._grace:
            return self._ask(record, self._instances.request_stop)
        # It is not asked again, but may yet hear it. Then it is started.
        if state in UP and asked_for > 2 * self._grace:
            self._drop("power request failed", f"the guest did not power off within {self._grace:.0f} seconds")
            return 0.0
        return self._until_next_look()

    def _ask(self, record: PowerRecord, ask: Callable[[str], None]) -> float:
        """Ask the guest to power off, if it is time to ask again: at growing intervals once it should have heard it."""
        now = monotonic()
        if now >= self._ask_again:
            if not self._records.note_asked(record):
                return 0.0
            self._check()
            ask(self._instance_id)
            self._first_asked = now if self._first_asked is None else self._first_asked
            self._deaf += now - self._first_asked > self._grace
            self._ask_again = now + min(ASK_AGAIN * 2**self._deaf, LONGEST)
        return self._until_next_look()

    def _until_next_look(self) -> float:
        return min(LOOK_AGAIN + (monotonic() - self._first_look) / 10, ASK_AGAIN)

    def _finish(self, record: PowerRecord) -> float:
        self._records.finish(record)
        return 0.0

    def _drop(self, event: str, why: str, strike: Callable[[PowerRecord], bool] | None = None) -> None:
        """Strike out a request that cannot be carried out. Somebody may have to see to the instance."""
        strike = strike or self._records.drop
        record = self._records.get(self._instance_id)
        if record.request is not None and record.version == self._version and strike(record):
            log.error(event, instance_id=self._instance_id, request=record.request, error=why)
