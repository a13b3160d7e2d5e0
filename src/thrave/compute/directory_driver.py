"""Driver for instances that JSON files describe, with optional commands that connect them to any hypervisor.

Without commands, stopping and starting only change the state in the file. Files may be edited, added and removed by
hand at any time: each call reads them again, and writes replace the whole file. Lock files are in a subfolder: one per
instance for changes to its file, and one that prevents a start.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from thrave.compute.base import VolumeHold
from thrave.compute.commands import FIRST_WAIT, BackgroundStops, Command, StopCommand, read_state
from thrave.compute.description_files import DescriptionFiles, InstanceDescription, check_volumes
from thrave.compute.errors import (
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceError,
    InstanceLocked,
    RootVolumeInUse,
    StateChangedError,
)
from thrave.compute.instance import TERMINATING, Instance, InstanceState, VolumeFile
from thrave.concurrency import random_hex, utc_now
from thrave.programs import ProgramNotStartedError
from thrave.retry import poll_until
from thrave.write_guard import command_guard

_STATE_TIMEOUT = 10.0  # seconds for a stateCommand
_POLL_INTERVAL = 0.2  # seconds

log = logging.getLogger(__name__)


def new_instance_id() -> str:
    """Return a random id in EC2's form."""
    return f"i-{random_hex(9)[:17]}"


class DirectoryDriver:
    """The instances in a folder. See `HypervisorDriver` for the contract.

    Args:
        root: The folder; `add` creates it.
        command_timeout: Seconds for a command that stops or starts an instance.
    """

    def __init__(self, root: Path, *, command_timeout: float = 300.0) -> None:
        self._files = DescriptionFiles(root)
        self._command_timeout = command_timeout
        self._stops = BackgroundStops(command_timeout)

    def list(
        self, account_id: str | None = None, *, include: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """See `HypervisorDriver`. Files that cannot be read are logged; `list_errors` returns the reasons."""
        descriptions, errors = self._files.read_all()
        for error in errors:
            log.warning("instance skipped: %s", error)
        return [
            self._with_current_state(description)
            for description in descriptions
            if account_id in {None, description.account_id} and (include is None or include(description))
        ]

    def list_errors(self) -> Sequence[InstanceError]:
        """Return an error for each file that `list` skips."""
        return self._files.read_all()[1]

    def get(self, instance_id: str) -> Instance:
        """Return one instance with its current state."""
        return self._read_current(instance_id)

    def get_owner(self, instance_id: str) -> str:
        """Return the account id in the instance's file."""
        return self._files.get_owner(instance_id)

    def state(self, instance_id: str) -> InstanceState:
        """Return what the stateCommand prints, or else the state in the file."""
        return self._read_current(instance_id).state

    def add(self, description: InstanceDescription) -> None:
        """Write the file of a new instance.

        Raises:
            InvalidDescriptionError: The description is not valid, or a volume cannot be read.
            InstanceAlreadyExists: The id is taken.
        """
        check_volumes(description)
        self._files.create(description)

    def remove(self, instance_id: str) -> None:
        """Delete an instance's file. The machine and its volumes are not changed.

        Raises:
            InstanceLocked: The root volume is being read.
        """
        with self.hold_stopped(instance_id):
            self._files.remove(instance_id)

    def request_stop(self, instance_id: str) -> None:
        """Run the stopCommand in the background, or record `stopped` in the file."""
        _retry_on_change(lambda: self._request_stop(instance_id))

    def _request_stop(self, instance_id: str) -> None:
        recorded, description = self._read_recorded_and_current(instance_id)
        _check_not_terminating(description)
        if description.state is InstanceState.STOPPED:
            return
        command_guard.check()
        if description.stop_command or description.state_command:
            self._run_stop(recorded, InstanceState.STOPPING)
        else:
            self._files.change_state(instance_id, InstanceState.STOPPED, seen=recorded)

    def force_stop(self, instance_id: str) -> None:
        """Run the forceStopCommand to its end, or record `stopped` in the file."""
        description = self._read_current(instance_id)
        _check_not_terminating(description)
        if description.state is not InstanceState.STOPPED:
            command_guard.check()
            self._run_force_stop(description)
            _retry_on_change(lambda: self._record_off(self._files.read(instance_id)))

    def terminate(self, instance_id: str) -> None:
        """Run the stopCommand in the background unless the instance is off, and record the state in the file."""
        _retry_on_change(lambda: self._terminate(instance_id))

    def _terminate(self, instance_id: str) -> None:
        recorded, description = self._read_recorded_and_current(instance_id)
        if description.state is InstanceState.TERMINATED:
            return
        command_guard.check()
        if description.state is InstanceState.STOPPED or not (description.stop_command or description.state_command):
            self._files.change_state(instance_id, InstanceState.TERMINATED, seen=recorded)
        else:
            self._run_stop(recorded, InstanceState.SHUTTING_DOWN)

    def start(self, instance_id: str) -> None:
        """Run the startCommand to its end, or record `running` in the file.

        After an interrupted start the file contains `pending`, and the startCommand runs again.
        """
        with self.hold_stopped(instance_id):
            _check_not_terminating(self._read_current(instance_id))
            self._stops.abandon(instance_id)
            description = self._wait_while_stopping(instance_id)
            if not _is_up(description):
                with self._starting(description):
                    self._run_start(description)
                try:
                    self._files.change_state(instance_id, InstanceState.RUNNING, launch_time=utc_now())
                except StateChangedError:  # terminated during the start
                    if description.stop_command:
                        self._stops.start(self._files.read(instance_id))
                    raise

    @property
    def overlays(self) -> None:
        """None: this driver has no overlays."""
        return None

    def find_users(self, is_same: Callable[[VolumeFile], bool], *, except_instance: str) -> Sequence[str]:
        """See `HypervisorDriver`. Covers described instances; reads the state only of those that have the disk."""
        return [
            f"the instance {one.instance_id}"
            for one in self._files.read_all()[0]
            if one.instance_id != except_instance
            and any(is_same(volume) for volume in (one.root_volume, *one.volumes))
            and not self._is_off(one.instance_id)
        ]

    def request_sysprep(self, instance_id: str, command: Sequence[str]) -> None:
        """Raise InstanceCommandFailed: this driver cannot run commands in a guest."""
        self._files.read(instance_id)
        raise InstanceCommandFailed(instance_id, command[0], "cannot be run: there is no way into the guest")

    @contextmanager
    def hold_stopped(self, instance_id: str) -> Iterator[VolumeHold]:
        """Hold the instance with a lock file; the kernel releases the lock when this process ends."""
        self._files.read(instance_id)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._files.lock(instance_id))
            except BlockingIOError:
                raise InstanceLocked(instance_id) from None
            yield DirectoryHold(self, instance_id)

    def _is_off(self, instance_id: str) -> bool:
        """Return whether the instance is known to be off."""
        try:
            return self._read_current(instance_id).state in {InstanceState.STOPPED, InstanceState.TERMINATED}
        except InstanceError as error:
            log.warning("instance counted as running: %s", error)
            return False

    def _read_current(self, instance_id: str) -> InstanceDescription:
        """Return the instance with its current state."""
        return self._read_recorded_and_current(instance_id)[1]

    def _read_recorded_and_current(self, instance_id: str) -> tuple[InstanceDescription, InstanceDescription]:
        """Return the instance as recorded in its file, and with its current state."""
        self._record_finished_stop(instance_id)
        recorded = self._files.read(instance_id)
        if not recorded.state_command or recorded.state is InstanceState.TERMINATED:
            return recorded, recorded
        state, off = read_state(instance_id, recorded.state_command, timeout=_STATE_TIMEOUT)
        return recorded, replace(recorded, state=self._effective_state(recorded, state), off_reason=off)

    def _effective_state(self, recorded: InstanceDescription, state: InstanceState) -> InstanceState:
        """Return the state that the stateCommand printed, or its counterpart while the instance is terminating."""
        if recorded.state is not InstanceState.SHUTTING_DOWN:
            return state
        if state is not InstanceState.STOPPED:
            return InstanceState.SHUTTING_DOWN
        self._record_off(recorded)
        return InstanceState.TERMINATED

    def _record_off(self, recorded: InstanceDescription) -> None:
        """Record in the file that the instance is off, unless the file has changed. Raises StateChangedError."""
        off = InstanceState.TERMINATED if recorded.state in TERMINATING else InstanceState.STOPPED
        self._files.change_state(recorded.instance_id, off, seen=recorded)

    def _wait_while_stopping(self, instance_id: str) -> InstanceDescription:
        """Return the instance with its current state. First wait while it is stopping: it cannot be started before."""
        return poll_until(
            lambda: self._read_current(instance_id),
            lambda description: not description.state_command or description.state is not InstanceState.STOPPING,
            timeout=self._command_timeout,
            interval=_POLL_INTERVAL,
        )

    def _record_finished_stop(self, instance_id: str, timeout: float = 0.0) -> None:
        """Record the end of the instance's stopCommand, if it has ended. Waits for it at most `timeout` seconds.

        The file is changed only if it has the content that was recorded for this command. If the instance was started
        in the meantime, the end of the command has no meaning.
        """
        stop = self._stops.find(instance_id)
        if stop is None:
            return
        with self._record_running_on_failure(stop):
            ended = self._stops.has_ended(stop, timeout)
        if ended and not stop.recorded.state_command:
            with suppress(StateChangedError):
                self._record_off(stop.recorded)

    def _run_stop(self, recorded: InstanceDescription, meanwhile: InstanceState) -> None:
        instance_id = recorded.instance_id
        if not recorded.stop_command:
            raise IncorrectInstanceState(instance_id, f"{instance_id} has no stopCommand: stop it on its hypervisor")
        self._files.change_state(instance_id, meanwhile, seen=recorded)
        stopping = replace(recorded, state=meanwhile)
        try:
            self._stops.start(stopping)
        except InstanceCommandFailed:
            self._record_running(stopping)
            raise
        self._record_finished_stop(instance_id, FIRST_WAIT)

    @contextmanager
    def _record_running_on_failure(self, stop: StopCommand) -> Iterator[None]:
        """Record `running` again if the stopCommand fails: the instance was not stopped."""
        try:
            yield
        except InstanceCommandFailed:
            self._record_running(stop.recorded)
            raise

    def _record_running(self, seen: InstanceDescription) -> None:
        with suppress(StateChangedError):
            self._files.change_state(seen.instance_id, InstanceState.RUNNING, seen=seen)

    def _run_force_stop(self, description: InstanceDescription) -> None:
        instance_id = description.instance_id
        if description.force_stop_command:
            self._stops.abandon(instance_id)
            self._finish("forceStopCommand", instance_id, description.force_stop_command)
        elif description.stop_command or description.state_command:
            raise IncorrectInstanceState(
                instance_id, f"{instance_id} has no forceStopCommand: power it off on its hypervisor"
            )

    @contextmanager
    def _starting(self, before: InstanceDescription) -> Iterator[None]:
        """Check that the instance may be started, and record `pending` while the startCommand runs.

        Without a stateCommand only the file shows whether the volume may be read. If the file still had `stopped` after
        a crash of this process, the volume of a machine that has started would be read.
        """
        if before.state_command or not before.start_command:
            command_guard.check()
            yield
            return
        self._files.change_state(before.instance_id, InstanceState.PENDING)
        try:
            command_guard.check()
        except BaseException:
            self._undo_pending(before)
            raise
        try:
            yield
        except InstanceCommandFailed as error:
            if _had_no_effect(error):
                self._undo_pending(before)
            raise

    def _undo_pending(self, before: InstanceDescription) -> None:
        pending = replace(before, state=InstanceState.PENDING)
        with suppress(StateChangedError):
            self._files.change_state(before.instance_id, before.state, seen=pending, off_reason=before.off_reason)

    def _run_start(self, description: InstanceDescription) -> None:
        instance_id = description.instance_id
        if description.start_command:
            self._finish("startCommand", instance_id, description.start_command)
        elif description.state_command:
            raise IncorrectInstanceState(instance_id, f"{instance_id} has no startCommand: start it on its hypervisor")

    def _finish(self, name: str, instance_id: str, argv: Sequence[str]) -> None:
        Command(instance_id, name, argv, timeout=self._command_timeout).finish()

    def _with_current_state(self, description: InstanceDescription) -> InstanceDescription:
        """Return the instance with its current state, or with the recorded one if the current state cannot be read."""
        try:
            return self._read_current(description.instance_id)
        except InstanceError as error:
            log.warning("recorded state used: %s", error)
            return description


class DirectoryHold:
    """The `VolumeHold` of a locked instance. A start outside this service is detected by its state."""

    def __init__(self, driver: DirectoryDriver, instance_id: str) -> None:
        self._driver = driver
        self._instance_id = instance_id

    def check(self) -> None:
        """Check that the instance is stopped."""
        state = self._driver.state(self._instance_id)
        if state is not InstanceState.STOPPED:
            raise RootVolumeInUse(self._instance_id, f"{self._instance_id} is {state} while its root volume is read")


def _retry_on_change(operation: Callable[[], None]) -> None:
    """Call `operation`, again if the recorded state has changed between its read and its write."""
    while True:
        with suppress(StateChangedError):
            operation()
            return


def _is_up(description: InstanceDescription) -> bool:
    """Return whether the instance needs no start. `pending` in a file only means that a start has begun."""
    up = {InstanceState.RUNNING, InstanceState.PENDING} if description.state_command else {InstanceState.RUNNING}
    return description.state in up


def _had_no_effect(error: InstanceCommandFailed) -> bool:
    """Return whether a command exited with an error or never ran. One killed at its timeout may have had an effect."""
    return error.status is not None or isinstance(error.__cause__, ProgramNotStartedError)


def _check_not_terminating(description: InstanceDescription) -> None:
    if description.state in TERMINATING:
        raise IncorrectInstanceState(
            description.instance_id, f"{description.instance_id} is {description.state} and cannot be used any more"
        )
