"""What can go wrong with an instance.

::

    InstanceError
    ├── InstanceNotFound            there is none with this id
    ├── InstanceAlreadyExists       the id is taken
    ├── InstanceHeld                its root volume is being read, or it is being started by somebody else
    ├── IncorrectInstanceState      not possible in the state it is in
    │   └── StateChangedError       its recorded state has changed since it was read
    ├── RootVolumeInUse             its root volume may have been written to while it was to be read
    ├── HoldLostError               it cannot be told any more whether that has happened: read the volume again
    ├── OverlayImpossible           its root volume cannot have a copy-on-write overlay
    ├── HypervisorError             the hypervisor does not answer, or refuses
    │   ├── HypervisorGoneError     there is no connection to it, for now
    │   ├── ImageInUseError         an image is being written by another program, for now
    │   └── ComponentMissingError   what is needed to talk to it is not installed
    ├── InvalidDescriptionError     its file or the arguments do not describe an instance
    └── InstanceCommandFailed       one of its commands failed, or said nothing that can be understood

Names without "Error" are EC2's own codes or read as they do. No message holds more of a command's output than one line.
"""

from collections.abc import Sequence


class InvalidDomainError(ValueError):
    """What is wrong with a domain's XML; the text names the element."""


_LINE_LIMIT = 300  # characters of a command's words that go into a message


class InstanceError(Exception):
    """Something about an instance, or about asking its hypervisor.

    Attributes:
        instance_id: The instance; as it was asked for, so perhaps no id at all.
        waited: Seconds that passed in waiting for what was not had in the end. Whoever repeats a call subtracts them:
            they are no sign that the call made progress.
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
    """Its root volume is being read, or it is just being started: try again later."""

    def __init__(self, instance_id: str, *, waited: float = 0.0) -> None:
        super().__init__(instance_id, f"{instance_id} is held: its root volume is being read, or it is being started")
        self.waited = waited


class IncorrectInstanceState(InstanceError):
    """The state it is in does not allow this."""


class StateChangedError(IncorrectInstanceState):
    """The recorded state is another one than that which a change was decided upon. Nothing was changed."""

    def __init__(self, instance_id: str, state: str) -> None:
        super().__init__(instance_id, f"{instance_id} has become {state} meanwhile")
        self.state = state


class RootVolumeInUse(InstanceError):
    """Somebody may have written to its root volume while it was to be read."""


class HoldLostError(InstanceError):
    """Events of the hypervisor were lost: hold the instance anew, and read its root volume from the beginning."""


class OverlayNotSupported(InstanceError):
    """Its root volume cannot have a copy-on-write overlay; the message says why."""


class HypervisorError(InstanceError):
    """The hypervisor does not answer, or refuses; the message has its own words."""


class HypervisorUnavailable(HypervisorError):
    """There is no connection to the hypervisor: what was asked may be asked again once there is."""

    def __init__(self, instance_id: str, message: str, *, waited: float = 0.0) -> None:
        super().__init__(instance_id, message)
        self.waited = waited


class ImageInUseError(HypervisorError):
    """Another program has an image open that was to be written: it may be tried again."""


class LibraryNotInstalled(HypervisorError):
    """A library that is needed to talk to the hypervisor is not installed."""

    def __init__(self, component: str, package: str) -> None:
        super().__init__("", f"{component} is not installed: apt-get install {package}")
        self.component = component
        self.package = package


class InvalidDescriptionError(InstanceError):
    """What is to describe an instance does not.

    Attributes:
        faults: Each with the name of the field, in the words of the file.
    """

    def __init__(self, instance_id: str, source: str, faults: Sequence[str]) -> None:
        super().__init__(instance_id, f"{source} does not describe an instance: {'; '.join(faults)}")
        self.faults = tuple(faults)


class InstanceCommandFailed(InstanceError):
    """One of the instance's own commands did not do its work.

    Attributes:
        command: `stopCommand`, `forceStopCommand`, `startCommand` or `stateCommand`.
        status: Its exit status; negative for a signal; None if it could not be run or took too long.
    """

    def __init__(self, instance_id: str, command: str, reason: str, *, status: int | None = None) -> None:
        super().__init__(instance_id, f"the {command} of {instance_id} {reason[:_LINE_LIMIT]}")
        self.command = command
        self.status = status
