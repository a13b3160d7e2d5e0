"""The contract of a hypervisor's inventory: which instances there are, how to stop and start them.

`InstanceInventory` is as much of it as a caller of EC2's sees; `HypervisorDriver` is what a host itself can do
besides. `Overlays` is
what a hypervisor can do that lets an instance run on a copy-on-write overlay while its root volume is read.

The docstrings of the Protocol are the contract, and one suite (tests/compute/test_contract.py) holds every driver to
it. An inventory knows nothing of bundles, and never reads a volume.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thrave.compute.instance import Instance, InstanceState, VolumeFile
from thrave.compute.timeouts import Pause


class InstanceInventory(Protocol):
    """Instances as callers know them. May be used from several threads, and by several processes at once.

    Every method that takes an id raises InstanceNotFound if no instance has it, whatever stands in it.
    """

    def list(self, account_id: str | None = None) -> Sequence[Instance]:
        """Every instance, or an owner's, by id. One that cannot be read is logged and does not hide the others."""

    def get(self, instance_id: str) -> Instance:
        """One instance, with the state it has now.

        Raises:
            InstanceError: There is none, or it cannot be read.
        """

    def get_owner(self, instance_id: str) -> str:
        """The account id of an instance's owner, from our record of it alone.

        No command of the instance is run, and its hypervisor is asked for nothing of this instance. The record of an
        instance that is not valid otherwise still names its owner.

        Raises:
            InstanceNotFound: There is none, or its record names no owner.
        """

    def request_stop(self, instance_id: str) -> None:
        """Ask the guest to power off, as its power button does, and return at once: `state` tells when it has.

        May be said again, since a guest that is still booting does not hear it; a stopped instance is left alone. It
        never cuts the power.

        Raises:
            IncorrectInstanceState: It is terminated, or there is no way to stop it.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def terminate(self, instance_id: str) -> None:
        """Ask the guest to power off for good, and return at once: it is `shutting-down`, then `terminated`.

        Nothing leads out of `terminated`, and terminating again changes nothing. It never cuts the power, may be said
        again as `request_stop`, leaves every volume as it is, and does not wait for whoever holds the instance: they
        find it gone when they look.

        Raises:
            IncorrectInstanceState: There is no way to stop it.
            InstanceCommandFailed: The hypervisor refuses; nothing has changed.
        """


class VolumeHold(Protocol):
    """The proof that nobody writes to an instance's root volume, for as long as it is held."""

    def check(self) -> None:
        """See that it has held until now. Cheap: may be asked several times a second, from any thread.

        Raises:
            RootVolumeInUse: The instance is not off (or not on its overlay), or was not at some moment since.
            InstanceError: It cannot be told, or the instance is gone.
        """


@dataclass(frozen=True)
class Overlay:
    """A root volume that nothing writes to, and what the instance writes to instead.

    Attributes:
        volume: The root volume as it was when the instance was stopped.
        overlay: A qcow2 image that stands on it. It is not there before it is needed nor after it was merged.
    """

    volume: VolumeFile
    overlay: Path


class Overlays(Protocol):
    """Copy-on-write overlays over root volumes.

    Every method may be repeated, also after a crash of this process, of the hypervisor's daemon or of the whole host at
    any moment: it goes on with what is there. At every moment overlay and volume together are what the guest has
    written, so that the instance can be started.
    """

    def plan(self, instance_id: str) -> Overlay:
        """Say what `freeze` would do to the instance, so that it can be written down. Changes nothing.

        Raises:
            OverlayImpossible: Its root volume cannot have one, with the reason.
        """

    def attach(self, instance_id: str, frozen: Overlay) -> None:
        """Have an instance that is off run on an empty overlay when it is started next.

        Raises:
            IncorrectInstanceState: It is not off.
            InstanceError: The hypervisor refuses; nothing has changed.
        """

    def hold_attached(self, instance_id: str, frozen: Overlay) -> AbstractContextManager[VolumeHold]:
        """Prove, for the length of the block, that the instance, running or not, is on its overlay.

        Raises:
            RootVolumeInUse: On entering, if it is not.
        """

    def has_lost_power(self, instance_id: str) -> bool:
        """Whether the instance is off although nobody has stopped it: its host or its process has died."""

    def merge(self, instance_id: str, frozen: Overlay, pause: Pause) -> None:
        """Write what is in the overlay into the volume, have the instance go on with that, and remove the overlay.

        The instance may run, be off, or be gone (then the files are merged, since its volumes are left as they are).

        Args:
            instance_id: The instance.
            frozen: What `plan` said.
            pause: Waits some seconds between two looks; may raise, which leaves the merging to the next call. It is
                told of progress (`report_progress`).

        Raises:
            InstanceError: The hypervisor refuses. The instance runs on, on its overlay.
        """


class HypervisorDriver(InstanceInventory, Protocol):
    """All instances of a host."""

    def list(
        self, account_id: str | None = None, *, include: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """As `InstanceInventory.list`; only those for which `include` is true. No command of another one is run."""

    @property
    def overlays(self) -> Overlays | None:
        """What can put overlays over root volumes; None if this hypervisor cannot."""

    def find_users(self, is_same: Callable[[VolumeFile], bool], *, except_instance: str) -> Sequence[str]:
        """Which machines have a disk and are not off, whether they are instances or not, in the operator's words.

        A machine whose state cannot be told is not known to be off.

        Args:
            is_same: Whether a volume is the disk that is meant.
            except_instance: The instance that is not asked for.

        Raises:
            InstanceError: It cannot be told.
        """

    def request_sysprep(self, instance_id: str, command: Sequence[str]) -> None:
        """Have the guest prepare itself for being copied, and power off, by a command run inside it.

        It returns when the command has begun. It is asked once only: what asks for a power-off meanwhile would cut it
        short.

        Args:
            instance_id: The instance.
            command: The guest's program, with its path, and its arguments.

        Raises:
            InstanceCommandFailed: There is no way to run a command in the guest, or it cannot be run.
        """

    def state(self, instance_id: str) -> InstanceState:
        """The state it has now. `stopped` means that the machine is off and nothing writes to its volumes.

        Why it is off is in `get`: an instance that is off was not always shut down (`Instance.off_reason`).

        Raises:
            InstanceCommandFailed: The hypervisor does not tell, or it has refused the last request to stop.
        """

    def force_stop(self, instance_id: str) -> None:
        """Cut its power, as EC2's StopInstances with `Force`, and return when it is off. One that is off is left alone.

        The guest loses what it had not written: it is for one that does not hear `request_stop`.

        Raises:
            IncorrectInstanceState: It is terminated, or there is no way to cut its power.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def start(self, instance_id: str) -> None:
        """Start it, and return when the hypervisor has done so. One that runs is left alone.

        It may be `pending` after a start that was cut off, since it may run then. It is started again.
        `write_guard.start_guard.check` is called right before the hypervisor is told to start it.

        Raises:
            InstanceHeld: Somebody holds it.
            IncorrectInstanceState: It is terminated, or there is no way to start it.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def hold_stopped(self, instance_id: str) -> AbstractContextManager[VolumeHold]:
        """Keep it from being started through us, while its root volume is read.

        It stops nothing and does not look at the state: hold first, then `check` that it is off. Only one can hold
        an instance. The hold ends with the block, and also when this process dies, whatever way.

        Raises:
            InstanceHeld: On entering, if somebody else holds it or is just starting it.
        """
