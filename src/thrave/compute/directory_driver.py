"""Instances described by files: one JSON file each, and optionally commands that tie it to a hypervisor.

Without commands, stopping and starting change the state in the file: the machine is whatever somebody else says it is.
Files may be edited, added and removed by hand at any time; each call reads them anew. Files are replaced whole. Locks
stand in a folder beside them, one to change a file and one that holds the instance off.
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from thrave.compute.base import VolumeHold
from thrave.compute.commands import PATIENCE, BackgroundStops, Command, StopCommand, read_state
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
from thrave.programs import ProgramNotStartedError
from thrave.retry import poll_until
from thrave.write_guard import start_guard

_STATE_SECONDS = 10.0  # for a stateCommand
_LOOK_AGAIN = 0.2  # seconds

log = logging.getLogger(__name__)


def new_instance_id() -> str:
    """An id that EC2 could have given."""
    return f"i-{secrets.token_hex(9)[:17]}"


class DirectoryDriver:
    """The instances in a folder; see `HypervisorDriver` for the contract.

    Args:
        root: The folder. It need not exist; `add` makes it.
        command_seconds: How long a command that stops or starts an instance may take.
    """

    def __init__(self, root: Path, *, command_seconds: float = 300.0) -> None:
        self._folder = DescriptionFiles(root)
        self._command_seconds = command_seconds
        self._stops = BackgroundStops(command_seconds)

    def list(
        self, account_id: str | None = None, *, include: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """Every instance whose file can be read, or some; the others are logged, and `broken` has them."""
        readable, broken = self._folder.read_all()
        for error in broken:
            log.warning("an instance is left out: %s", error)
        mine = [one for one in readable if account_id in {None, one.account_id} and (include is None or include(one))]
        return [self._shown(description) for description in mine]

    def list_errors(self) -> Sequence[InstanceError]:
        """Why some files in the folder are not in `list`."""
        return self._folder.read_all()[1]

    def get(self, instance_id: str) -> Instance:
        """One instance, with the state it has now."""
        return self._look(instance_id)

    def get_owner(self, instance_id: str) -> str:
        """The account id in its file."""
        return self._folder.get_owner(instance_id)

    def state(self, instance_id: str) -> InstanceState:
        """What its stateCommand says, else what its file says."""
        return self._look(instance_id).state

    def add(self, description: InstanceDescription) -> None:
        """Write the file of a new instance.

        Raises:
            InvalidDescriptionError: Something about it is not valid, or a volume cannot be read.
            InstanceAlreadyExists: The id is taken.
        """
        check_volumes(description)
        self._folder.create(description)

    def remove(self, instance_id: str) -> None:
        """Forget an instance. The machine and its volumes are left as they are.

        Raises:
            InstanceHeld: Its root volume is being read.
        """
        with self.hold_stopped(instance_id):
            self._folder.remove(instance_id)

    def request_stop(self, instance_id: str) -> None:
        """Run its stopCommand in the background, or note in its file that it is stopped."""
        _until_unchanged(lambda: self._request_stop(instance_id))

    def _request_stop(self, instance_id: str) -> None:
        recorded, description = self._look_at_both(instance_id)
        _refuse_if_gone(description)
        if description.state is InstanceState.STOPPED:
            return
        if description.stop_command or description.state_command:
            self._run_stop(recorded, InstanceState.STOPPING)
        else:
            self._folder.change(instance_id, InstanceState.STOPPED, seen=recorded)

    def force_stop(self, instance_id: str) -> None:
        """Run its forceStopCommand to its end, or note in its file that it is stopped."""
        description = self._look(instance_id)
        _refuse_if_gone(description)
        if description.state is not InstanceState.STOPPED:
            self._run_force_stop(description)
            _until_unchanged(lambda: self._record_off(self._folder.read(instance_id)))

    def terminate(self, instance_id: str) -> None:
        """Run its stopCommand in the background, unless it is off; its file says what is to become of it."""
        _until_unchanged(lambda: self._terminate(instance_id))

    def _terminate(self, instance_id: str) -> None:
        recorded, description = self._look_at_both(instance_id)
        if description.state is InstanceState.TERMINATED:
            return
        if description.state is InstanceState.STOPPED or not (description.stop_command or description.state_command):
            self._folder.change(instance_id, InstanceState.TERMINATED, seen=recorded)
        else:
            self._run_stop(recorded, InstanceState.SHUTTING_DOWN)

    def start(self, instance_id: str) -> None:
        """Run its startCommand to its end, or note in its file that it runs.

        If this was cut off, the file says `pending`, and the startCommand is run again.
        """
        with self.hold_stopped(instance_id):
            _refuse_if_gone(self._look(instance_id))
            self._stops.abandon(instance_id)
            description = self._wait_while_stopping(instance_id)
            if not _is_up(description):
                with self._starting(description):
                    self._run_start(description)
                try:
                    self._folder.change(instance_id, InstanceState.RUNNING, launch_time=datetime.now(UTC))
                except StateChangedError:  # it was terminated while it was being started
                    if description.stop_command:
                        self._stops.ask(self._folder.read(instance_id))
                    raise

    @property
    def overlays(self) -> None:
        """None: what stands in files cannot put an overlay over a disk."""
        return None

    def find_users(self, is_same: Callable[[VolumeFile], bool], *, except_instance: str) -> Sequence[str]:
        """Of the described instances; only those that have the disk are asked for their state."""
        return [
            f"the instance {one.instance_id}"
            for one in self._folder.read_all()[0]
            if one.instance_id != except_instance
            and any(is_same(volume) for volume in (one.root_volume, *one.volumes))
            and not self._is_off(one.instance_id)
        ]

    def request_sysprep(self, instance_id: str, command: Sequence[str]) -> None:
        """Refuse: no command reaches into the guest."""
        self._folder.read(instance_id)
        raise InstanceCommandFailed(instance_id, command[0], "cannot be run: there is no way into the guest")

    @contextmanager
    def hold_stopped(self, instance_id: str) -> Iterator[VolumeHold]:
        """Hold the instance by a lock file; the kernel lets go of it when this process ends."""
        self._folder.read(instance_id)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._folder.lock(instance_id))
            except BlockingIOError:
                raise InstanceLocked(instance_id) from None
            yield DirectoryHold(self, instance_id)

    def _is_off(self, instance_id: str) -> bool:
        """Whether it is known to be off."""
        try:
            return self._look(instance_id).state in {InstanceState.STOPPED, InstanceState.TERMINATED}
        except InstanceError as error:
            log.warning("an instance is taken to be running: %s", error)
            return False

    def _look(self, instance_id: str) -> InstanceDescription:
        """The instance with the state it has now."""
        return self._look_at_both(instance_id)[1]

    def _look_at_both(self, instance_id: str) -> tuple[InstanceDescription, InstanceDescription]:
        """The instance as its file says, and with the state it has now."""
        self._settle(instance_id)
        recorded = self._folder.read(instance_id)
        if not recorded.state_command or recorded.state is InstanceState.TERMINATED:
            return recorded, recorded
        state, off = read_state(instance_id, recorded.state_command, seconds=_STATE_SECONDS)
        return recorded, replace(recorded, state=self._on_its_way(recorded, state), off_reason=off)

    def _on_its_way(self, recorded: InstanceDescription, state: InstanceState) -> InstanceState:
        """The state its stateCommand has printed, as it is called on the way to being terminated."""
        if recorded.state is not InstanceState.SHUTTING_DOWN:
            return state
        if state is not InstanceState.STOPPED:
            return InstanceState.SHUTTING_DOWN
        self._record_off(recorded)
        return InstanceState.TERMINATED

    def _record_off(self, recorded: InstanceDescription) -> None:
        """Note in its file that it is off, if that says what was read. Raises StateChangedError."""
        off = InstanceState.TERMINATED if recorded.state in TERMINATING else InstanceState.STOPPED
        self._folder.change(recorded.instance_id, off, seen=recorded)

    def _wait_while_stopping(self, instance_id: str) -> InstanceDescription:
        """The same, after waiting for a machine that is just going down: it cannot be started before."""
        return poll_until(
            lambda: self._look(instance_id),
            lambda description: not description.state_command or description.state is not InstanceState.STOPPING,
            timeout=self._command_seconds,
            interval=_LOOK_AGAIN,
        )

    def _settle(self, instance_id: str, patience: float = 0.0) -> None:
        """Note what has become of its stopCommand, if one was running.

        Only the state that was noted for this command is changed. If the instance was started meanwhile, its file says
        something else, and the end of the command says nothing about it.
        """
        stop = self._stops.of(instance_id)
        if stop is None:
            return
        with self._running_if_it_fails(stop):
            ended = self._stops.has_ended(stop, patience)
        if ended and not stop.asked.state_command:
            with suppress(StateChangedError):
                self._record_off(stop.asked)

    def _run_stop(self, recorded: InstanceDescription, meanwhile: InstanceState) -> None:
        instance_id = recorded.instance_id
        if not recorded.stop_command:
            raise IncorrectInstanceState(instance_id, f"{instance_id} has no stopCommand: stop it on its hypervisor")
        self._folder.change(instance_id, meanwhile, seen=recorded)
        asked = replace(recorded, state=meanwhile)
        try:
            self._stops.ask(asked)
        except InstanceCommandFailed:
            self._record_running(asked)
            raise
        self._settle(instance_id, PATIENCE)

    @contextmanager
    def _running_if_it_fails(self, stop: StopCommand) -> Iterator[None]:
        """A stopCommand that fails has stopped nothing."""
        try:
            yield
        except InstanceCommandFailed:
            self._record_running(stop.asked)
            raise

    def _record_running(self, asked: InstanceDescription) -> None:
        with suppress(StateChangedError):
            self._folder.change(asked.instance_id, InstanceState.RUNNING, seen=asked)

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
        """Check that it may be started; have the file say `pending` while the startCommand may have done so.

        Without a stateCommand the file alone tells whether the volume may be read. If it went on to say `stopped`, and
        this process died after the machine had started, a running machine's volume would be read.
        """
        if before.state_command or not before.start_command:
            start_guard.check()
            yield
            return
        self._folder.change(before.instance_id, InstanceState.PENDING)
        try:
            start_guard.check()
        except BaseException:
            self._undo_pending(before)
            raise
        try:
            yield
        except InstanceCommandFailed as error:
            if _has_done_nothing(error):
                self._undo_pending(before)
            raise

    def _undo_pending(self, before: InstanceDescription) -> None:
        pending = replace(before, state=InstanceState.PENDING)
        with suppress(StateChangedError):
            self._folder.change(before.instance_id, before.state, seen=pending, off_reason=before.off_reason)

    def _run_start(self, description: InstanceDescription) -> None:
        instance_id = description.instance_id
        if description.start_command:
            self._finish("startCommand", instance_id, description.start_command)
        elif description.state_command:
            raise IncorrectInstanceState(instance_id, f"{instance_id} has no startCommand: start it on its hypervisor")

    def _finish(self, name: str, instance_id: str, argv: Sequence[str]) -> None:
        Command(instance_id, name, argv, seconds=self._command_seconds).finish()

    def _shown(self, description: InstanceDescription) -> InstanceDescription:
        """The instance with its state now, or the one in its file if its hypervisor does not tell."""
        try:
            return self._look(description.instance_id)
        except InstanceError as error:
            log.warning("the state in the file is shown: %s", error)
            return description


class DirectoryHold:
    """An instance that cannot be started through us; whether somebody else did, its state tells."""

    def __init__(self, instances: DirectoryDriver, instance_id: str) -> None:
        self._instances = instances
        self._instance_id = instance_id

    def check(self) -> None:
        """Look at its state."""
        state = self._instances.state(self._instance_id)
        if state is not InstanceState.STOPPED:
            raise RootVolumeInUse(self._instance_id, f"{self._instance_id} is {state} while its root volume is read")


def _until_unchanged(act: Callable[[], None]) -> None:
    """Do something, and again as long as the recorded state changes between its decision and its act."""
    while True:
        with suppress(StateChangedError):
            act()
            return


def _is_up(description: InstanceDescription) -> bool:
    """Whether it needs no start. `pending` in a file says only that a start was begun."""
    up = {InstanceState.RUNNING, InstanceState.PENDING} if description.state_command else {InstanceState.RUNNING}
    return description.state in up


def _has_done_nothing(error: InstanceCommandFailed) -> bool:
    """Whether a command was refused, or never ran. One that was killed because it took too long may have done it."""
    return error.status is not None or isinstance(error.__cause__, ProgramNotStartedError)


def _refuse_if_gone(description: InstanceDescription) -> None:
    if description.state in TERMINATING:
        raise IncorrectInstanceState(
            description.instance_id, f"{description.instance_id} is {description.state} and cannot be used any more"
        )
