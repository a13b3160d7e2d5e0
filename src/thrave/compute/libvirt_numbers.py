"""Libvirt's numbers, as far as they are used: those of its header libvirt-domain.h if nothing else is said.

They are part of its binary interface and never change, so that what is pure can be tested where there is no libvirt.
"""

from enum import IntEnum, IntFlag


class DomainState(IntEnum):
    """virDomainState."""

    NOSTATE = 0
    RUNNING = 1
    BLOCKED = 2
    PAUSED = 3
    SHUTDOWN = 4
    SHUTOFF = 5
    CRASHED = 6
    PMSUSPENDED = 7


class ShutoffReason(IntEnum):
    """virDomainShutoffReason: why a domain is in the state `SHUTOFF`."""

    UNKNOWN = 0
    SHUTDOWN = 1
    DESTROYED = 2
    CRASHED = 3
    MIGRATED = 4
    SAVED = 5
    FAILED = 6
    FROM_SNAPSHOT = 7
    DAEMON = 8


class Lifecycle(IntEnum):
    """virDomainEventType."""

    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5
    SHUTDOWN = 6
    PMSUSPENDED = 7
    CRASHED = 8


class StoppedDetail(IntEnum):
    """virDomainEventStoppedDetailType."""

    SHUTDOWN = 0
    DESTROYED = 1
    CRASHED = 2
    MIGRATED = 3
    SAVED = 4
    FAILED = 5
    FROM_SNAPSHOT = 6


class Event(IntEnum):
    """virDomainEventID: the kinds of events that are listened to."""

    LIFECYCLE = 0
    BLOCK_JOB_2 = 16
    METADATA_CHANGE = 23


class Affect(IntFlag):
    """virDomainModificationImpact: the running domain, what it is started from the next time, or both."""

    LIVE = 1
    CONFIG = 2


class XmlFlag(IntFlag):
    """virDomainXMLFlags."""

    SECURE = 1
    INACTIVE = 2


class ShutdownFlag(IntEnum):
    """virDomainShutdownFlagValues; 0 leaves the way to the driver."""

    DEFAULT = 0
    ACPI_POWER_BTN = 1
    GUEST_AGENT = 2


class Commit(IntFlag):
    """virDomainBlockCommitFlags."""

    SHALLOW = 1
    ACTIVE = 4


class JobAbort(IntFlag):
    """virDomainBlockJobAbortFlags."""

    ASYNC = 1
    PIVOT = 2


class JobStatus(IntEnum):
    """virConnectDomainEventBlockJobStatus."""

    COMPLETED = 0
    FAILED = 1
    CANCELED = 2
    READY = 3


METADATA_ELEMENT = 2
"""VIR_DOMAIN_METADATA_ELEMENT."""
NO_DOMAIN = 42
"""VIR_ERR_NO_DOMAIN, virterror.h."""
