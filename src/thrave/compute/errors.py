"""Errors of instances, drivers and hypervisors. No message contains more than one line of a command's output.

::

    InstanceError
    ├── InstanceNotFound            no instance has this id
    ├── InstanceAlreadyExists       the id is taken
    ├── InstanceLocked              its root volume is being read, or it is being started
    ├── IncorrectInstanceState      not allowed in the instance's state
    │   └── StateChangedError       the recorded state has changed since it was read
    ├── RootVolumeInUse             the root volume may have been written to while it was read
    ├── HoldLostError               events were lost, so a write is possible: read the volume again
    ├── OverlayNotSupported         the root volume cannot have a copy-on-write overlay
    ├── HypervisorError             the hypervisor does not respond, or refuses
    │   ├── HypervisorUnavailable   no connection to the hypervisor; may be retried
    │   ├── ImageInUseError         another program has the image open; may be retried
    │   └── LibraryNotInstalled     a library for the hypervisor is not installed
    ├── InvalidDescriptionError     the instance's file or the arguments are not valid
    └── InstanceCommandFailed       one of the instance's commands failed, or printed nothing valid

Names without "Error" are EC2 codes or follow their form.
"""

from collections.abc import Sequence


class InvalidDomainError(ValueError):
    """A domain's XML is not valid; the text names the element."""


_LINE_LIMIT = 300  # characters of a command's output in a message


class InstanceError(Exception):
    """An error of one instance, or of a call to its hypervisor.

    Attributes:
        instance_id: The instance as the caller named it, so possibly not a valid id.
        waited: Seconds that the call waited without result. A retry loop does not count them as progress.
    """

    waited: float = 0.0

    def __init__(self, instance_id: str, message: str) -> None:
        super().__init__(message)
        self.instance_id = instance_id


class InstanceNotFound(InstanceError):
    """No instance has this id."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(instance_id, f"there is no instance {instance_id!r}")


class InstanceAlreadyExists(InstanceError):
    """The id is taken."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(instance_id, f"there is already an instance {instance_id}")


class InstanceLocked(InstanceError):
    """The root volume is being read, or the instance is being started: try again later."""

    def __init__(self, instance_id: str, *, waited: float = 0.0) -> None:
        super().__init__(
            instance_id,
            f"Instance {instance_id} is locked: its volume is being read or it is being started. Try again later.",
        )
        self.waited = waited


class IncorrectInstanceState(InstanceError):
    """The instance's state does not allow the operation."""


class StateChangedError(IncorrectInstanceState):
    """The recorded state has changed since the change was decided. Nothing was changed."""

    def __init__(self, instance_id: str, state: str) -> None:
        super().__init__(instance_id, f"{instance_id} has become {state} meanwhile")
        self.state = state


class RootVolumeInUse(InstanceError):
    """The root volume may have been written to while it was read."""


class HoldLostError(InstanceError):
    """Events of the hypervisor were lost: hold the instance again, and read its root volume from the beginning."""


class OverlayNotSupported(InstanceError):
    """The root volume cannot have a copy-on-write overlay; the message has the reason."""


class HypervisorError(InstanceError):
    """The hypervisor does not respond, or refuses; the message contains its error."""


class HypervisorUnavailable(HypervisorError):
    """No connection to the hypervisor. The call may be retried."""

    def __init__(self, instance_id: str, message: str, *, waited: float = 0.0) -> None:
        super().__init__(instance_id, message)
        self.waited = waited


class ImageInUseError(HypervisorError):
    """Another program has an image open that has to be written. The call may be retried."""


class LibraryNotInstalled(HypervisorError):
    """A library that the hypervisor driver needs is not installed."""

    def __init__(self, component: str, package: str) -> None:
        super().__init__("", f"{component} is not installed: apt-get install {package}")
        self.component = component
        self.package = package


class InvalidDescriptionError(InstanceError):
    """The description of an instance is not valid.

    Attributes:
        faults: Each begins with the name of the field as in the file.
    """

    def __init__(self, instance_id: str, source: str, faults: Sequence[str]) -> None:
        super().__init__(instance_id, f"{source} does not describe an instance: {'; '.join(faults)}")
        self.faults = tuple(faults)


class InstanceCommandFailed(InstanceError):
    """One of the instance's own commands failed.

    Attributes:
        command: `stopCommand`, `forceStopCommand`, `startCommand` or `stateCommand`.
        status: Exit status; negative for a signal; None if the command could not be run or took too long.
    """

    def __init__(self, instance_id: str, command: str, reason: str, *, status: int | None = None) -> None:
        super().__init__(instance_id, f"the {command} of {instance_id} {reason[:_LINE_LIMIT]}")
        self.command = command
        self.status = status
