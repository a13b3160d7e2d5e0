"""The contract of a hypervisor's inventory: which instances there are, how to stop and start them.

`Inventory` is as much of it as a caller of EC2's sees; `Instances` is what a host itself can do besides.

The docstrings of the Protocol are the contract, and one suite (tests/compute/test_contract.py) holds every driver to
it. An inventory knows nothing of bundles, and never reads a volume.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from thrave.compute.instance import Instance, InstanceState


class Inventory(Protocol):
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


class Instances(Inventory, Protocol):
    """All instances of a host."""

    def state(self, instance_id: str) -> InstanceState:
        """The state it has now. `stopped` means that the machine is off and nothing writes to its volumes.

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

        Raises:
            InstanceHeld: Somebody holds it.
            IncorrectInstanceState: It is terminated, or there is no way to start it.
            InstanceCommandFailed: The hypervisor refuses.
        """

    def hold(self, instance_id: str) -> AbstractContextManager[None]:
        """Keep it from being started through us, while its root volume is read.

        It stops nothing and does not look at the state: hold first, then see that it is `stopped`. Only one can hold
        an instance. The hold ends with the block, and also when this process dies, whatever way.

        Raises:
            InstanceHeld: On entering, if somebody else holds it or is just starting it.
        """
