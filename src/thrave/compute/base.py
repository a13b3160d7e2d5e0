"""Contracts of the instance inventory, the hypervisor drivers and copy-on-write overlays.

`InstanceInventory` is what the EC2 actions use. `HypervisorDriver` adds what a host does with its instances. `Overlays`
lets an instance run on a copy-on-write overlay while its root volume is read. The docstrings of the Protocols are the
contract; tests/compute/test_contract.py checks every driver against it. Nothing here bundles or reads a volume.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thrave.compute.instance import Instance, InstanceState, VolumeFile
from thrave.compute.progress_timeout import Pause


class InstanceInventory(Protocol):
    """Instances as the EC2 API shows them. Safe to use from several threads and processes at once.

    Every method that takes an id raises InstanceNotFound if no instance has this id, whatever text the id is.
    """

    def list(self, account_id: str | None = None) -> Sequence[Instance]:
        """Return all instances, or those of one account, by id. One that cannot be read is logged and skipped."""

    def get(self, instance_id: str) -> Instance:
        """Return one instance with its current state.

        Raises:
            InstanceError: The instance does not exist or cannot be read.
        """

    def get_owner(self, instance_id: str) -> str:
        """Return the account id of an instance's owner from our own record alone.

        No command of the instance runs, and the hypervisor is not called for this instance. The owner is also found if
        the rest of the record is not valid.

        Raises:
            InstanceNotFound: The instance does not exist, or its record names no owner.
        """

    def request_stop(self, instance_id: str) -> None:
        """Ask the guest to power off, as the power button does, and return at once; poll `state` for the result.

        The call may be repeated, since a guest that is booting ignores the request. A stopped instance is not changed.
        The power is never cut.

        Raises:
            IncorrectInstanceState: The instance is terminated, or there is no way to stop it.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def terminate(self, instance_id: str) -> None:
        """Ask the guest to power off for good and return at once: `shutting-down` now, `terminated` when it is off.

        `terminated` is final, and terminating again changes nothing. The power is never cut and no volume is changed.
        The call may be repeated, as `request_stop`. It does not wait for a hold: the holder detects the new state in
        its next check.

        Raises:
            IncorrectInstanceState: There is no way to stop it.
            InstanceCommandFailed: The hypervisor refuses; nothing has changed.
        """


class VolumeHold(Protocol):
    """Shows that nothing has written to an instance's root volume since the hold began."""

    def check(self) -> None:
        """Check that the hold was not broken. Cheap: may be called several times a second, from any thread.

        Raises:
            RootVolumeInUse: The instance is or was running (or was not on its overlay) since the hold began.
            InstanceError: The state cannot be read, or the instance does not exist any more.
        """


@dataclass(frozen=True)
class Overlay:
    """A root volume that nothing writes to, and the image that the instance writes to instead.

    Attributes:
        volume: The root volume as it was when the instance was stopped.
        overlay: A qcow2 image with the volume as its backing file. It exists only from `attach` until it is merged.
    """

    volume: VolumeFile
    overlay: Path


class Overlays(Protocol):
    """Copy-on-write overlays over root volumes.

    Every method may be repeated, also after a crash of this process, of the hypervisor's daemon or of the whole host at
    any moment: it resumes from what exists. Overlay and volume together always hold what the guest has written, so the
    instance can be started at any moment.
    """

    def plan(self, instance_id: str) -> Overlay:
        """Return the overlay that `attach` would create, so that it can be recorded first. Changes nothing.

        Raises:
            OverlayNotSupported: The root volume cannot have an overlay; the message has the reason.
        """

    def attach(self, instance_id: str, overlay: Overlay) -> None:
        """Make a stopped instance run on an empty overlay from its next start.

        Raises:
            IncorrectInstanceState: The instance is not off.
            InstanceError: The hypervisor refuses; nothing has changed.
        """

    def hold_attached(self, instance_id: str, overlay: Overlay) -> AbstractContextManager[VolumeHold]:
        """Check for the length of the block that the instance, running or not, is on its overlay.

        Raises:
            RootVolumeInUse: On entering, if it is not.
        """

    def has_lost_power(self, instance_id: str) -> bool:
        """Return whether the instance is off although it was not stopped: its host or its process has failed."""

    def merge(self, instance_id: str, overlay: Overlay, pause: Pause) -> None:
        """Write the overlay's content into the volume, switch the instance to the volume, and remove the overlay.

        The instance may run, be off, or no longer exist. In the last case only the files are merged.

        Args:
            instance_id: The instance.
            overlay: As returned by `plan`.
            pause: Waits some seconds between two polls; may raise, and the next call resumes the merge. Progress is
                reported to it (`report_progress`).

        Raises:
            InstanceError: The hypervisor refuses. The instance continues on its overlay.
        """


class HypervisorDriver(InstanceInventory, Protocol):
    """All instances of a host.

    Each method that starts, stops or changes an instance calls `write_guard.command_guard.check` right before the
    command to the hypervisor: another host may have the instance since the caller decided.
    """

    def list(
        self, account_id: str | None = None, *, include: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """As `InstanceInventory.list`, limited to what `include` accepts. No other instance's command runs."""

    @property
    def overlays(self) -> Overlays | None:
        """Overlays over root volumes; None if this hypervisor does not support them."""

    def find_users(self, is_same: Callable[[VolumeFile], bool], *, except_instance: str) -> Sequence[str]:
        """Return a description of each machine that has a disk and is not off, whether it is an instance or not.

        A machine whose state cannot be read counts as running.

        Args:
            is_same: Whether a volume is the disk in question.
            except_instance: Id of the instance to leave out.

        Raises:
            InstanceError: The machines cannot be listed.
        """

    def request_sysprep(self, instance_id: str, command: Sequence[str]) -> None:
        """Run a command in the guest that prepares the guest for copying and then powers it off.

        Returns when the command has started. Call it once only: a power-off request in the meantime would interrupt
        the command.

        Args:
            instance_id: The instance.
            command: The guest's program, with its path, and its arguments.

        Raises:
            InstanceCommandFailed: There is no way to run a command in the guest, or the command cannot be run.
        """

    def state(self, instance_id: str) -> InstanceState:
        """Return the current state. `stopped` means that the machine is off and nothing writes to its volumes.

        `Instance.off_reason` from `get` says why: an instance that is off was not always shut down.

        Raises:
            InstanceCommandFailed: The hypervisor does not return a state, or has refused the last request to stop.
        """

    def force_stop(self, instance_id: str) -> None:
        """Cut the power, as EC2's StopInstances with `Force`, and return when the instance is off.

        An instance that is off is not changed. The guest loses unwritten data: use this only if the guest does not
        react to `request_stop`.

        Raises:
            IncorrectInstanceState: The instance is terminated, or there is no way to cut its power.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def start(self, instance_id: str) -> None:
        """Start the instance and return when the hypervisor has done so. A running instance is not changed.

        After an interrupted start the instance may be `pending`, and it may run; it is started again.

        Raises:
            InstanceLocked: Another thread or process holds the instance.
            IncorrectInstanceState: The instance is terminated, or there is no way to start it.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def hold_stopped(self, instance_id: str) -> AbstractContextManager[VolumeHold]:
        """Lock the instance against a start through this service while its root volume is read.

        Neither stops the instance nor reads its state: hold first, then `check` that it is off. An instance has at most
        one holder. The hold ends with the block, and also when this process dies in any way.

        Raises:
            InstanceLocked: On entering, if the instance is held or is being started.
        """
