"""The libvirt binding for Python: types of what the driver uses, and constants. Nothing here connects to libvirt.

Constants are those of libvirt-domain.h unless another file is named. They are part of the binary interface and never
change; thus modules that use only constants can be tested without libvirt.
"""

# ruff: noqa: N802 (names of libvirt)
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from types import ModuleType
from typing import Protocol, cast

from thrave.compute.errors import LibraryNotInstalled
from thrave.debian_modules import PYTHON_VERSION, DebianModuleNotFoundError, import_debian_module

_PACKAGE = "python3-libvirt"


class LibvirtError(Protocol):
    """The exception that every call raises."""

    def get_error_code(self) -> int | None:
        """A virErrorNumber."""

    def get_error_message(self) -> str | None:
        """The message of libvirt."""


class StorageVolume(Protocol):
    """virStorageVol."""

    def path(self) -> str:
        """Path on the host."""


class StoragePool(Protocol):
    """virStoragePool."""

    def XMLDesc(self, flags: int) -> str:
        """XML of the pool."""

    def storageVolLookupByName(self, name: str) -> StorageVolume:
        """Return a volume of the pool."""


class Domain(Protocol):
    """virDomain. Every method may be called from any thread."""

    def name(self) -> str:
        """Name. Does not call libvirt."""

    def UUIDString(self) -> str:
        """UUID. Does not call libvirt."""

    def isActive(self) -> int:
        """Whether it is running."""

    def isPersistent(self) -> int:
        """Whether it still exists when it is off."""

    def state(self) -> list[int]:
        """Return virDomainState and reason."""

    def XMLDesc(self, flags: int) -> str:
        """Definition: of the running domain, or for the next start."""

    def setMetadata(self, kind: int, metadata: str | None, key: str | None, uri: str, flags: int) -> int:
        """Replace or remove the element of a namespace."""

    def create(self) -> int:
        """Start it."""

    def destroy(self) -> int:
        """Cut its power."""

    def shutdownFlags(self, flags: int) -> int:
        """Request a shutdown of the guest."""

    def suspend(self) -> int:
        """Pause the CPUs."""

    def resume(self) -> int:
        """Resume the CPUs."""

    def hasManagedSaveImage(self) -> int:
        """Whether the next start restores saved memory."""

    def listAllCheckpoints(self) -> list[object]:
        """Return the checkpoints."""

    def blockCommit(self, disk: str, base: str | None, top: str | None, bandwidth: int, flags: int) -> int:
        """Start a job that writes an image into its backing file."""

    def blockJobInfo(self, disk: str, flags: int) -> Mapping[str, int]:
        """Progress of a job, such as `cur` and `end` in bytes; empty if there is none."""

    def blockJobAbort(self, disk: str, flags: int) -> int:
        """End the job of a disk."""


LifecycleCallback = Callable[["Connection", Domain, int, int, object], object]
"""Called with connection, domain, `Lifecycle`, its detail, opaque."""


BlockJobCallback = Callable[["Connection", Domain, str, int, int, object], object]
"""Called with connection, domain, target of the disk, type of the job, `JobStatus`, opaque."""


MetadataCallback = Callable[["Connection", Domain, int, str, object], object]
"""Called with connection, domain, kind, namespace, opaque."""


class Connection(Protocol):
    """virConnect. Every method may be called from any thread."""

    def close(self) -> int:
        """Release one reference to the connection."""

    def isAlive(self) -> int:
        """Whether the socket is open. Does not call libvirt."""

    def setKeepAlive(self, interval: int, count: int) -> int:
        """Close the connection after `count` keepalive messages, `interval` seconds apart, without response."""

    def getType(self) -> str:
        """Name of the driver, such as `QEMU`."""

    def listAllDomains(self) -> list[Domain]:
        """Return all domains, running or not."""

    def lookupByUUIDString(self, uuid: str) -> Domain:
        """Return the domain with a UUID."""

    def lookupByName(self, name: str) -> Domain:
        """Return the domain with a name."""

    def defineXML(self, xml: str) -> Domain:
        """Create a domain, or change its definition for the next start."""

    def domainEventRegisterAny(
        self,
        domain: Domain | None,
        kind: int,
        callback: LifecycleCallback | BlockJobCallback | MetadataCallback,
        opaque: object,
    ) -> int:
        """Register a callback for events of a kind. The event loop calls it."""

    def domainEventDeregisterAny(self, callback: int) -> None:
        """Remove a callback. Each registered callback keeps the connection open."""

    def storagePoolLookupByName(self, name: str) -> StoragePool:
        """Return the storage pool with a name."""


class LibvirtBinding(Protocol):
    """The module ``libvirt``."""

    @property
    def libvirtError(self) -> type[Exception]:
        """A `LibvirtError`."""

    def open(self, name: str) -> Connection:
        """Connect."""

    def registerErrorHandler(self, handler: Callable[[object, object], None], context: object) -> object:
        """Call a handler for each error instead of printing the error."""

    def virEventRegisterDefaultImpl(self) -> int:
        """Use libvirt's event loop. Call this before the first connection."""

    def virEventRunDefaultImpl(self) -> int:
        """Run the event loop once. Waits for an event."""


class QemuBinding(Protocol):
    """The module ``libvirt_qemu``."""

    def qemuAgentCommand(self, domain: Domain, command: str, timeout: int, flags: int) -> str:
        """Send a command to the guest agent and return the response, both in JSON. `timeout` is in seconds."""


def load() -> LibvirtBinding:
    """Return the binding.

    Raises:
        LibraryNotInstalled: It is not installed, or was built for another version of Python.
    """
    return cast("LibvirtBinding", _import("libvirt", "libvirtmod"))


def load_qemu() -> QemuBinding:
    """Return the part of the binding that is only for QEMU. Raises as `load`."""
    load()
    return cast("QemuBinding", _import("libvirt_qemu", "libvirtmod_qemu"))


def _import(name: str, extension: str) -> ModuleType:
    try:
        return import_debian_module(name, extension)
    except DebianModuleNotFoundError:
        raise LibraryNotInstalled(f"libvirt for Python {PYTHON_VERSION}", _PACKAGE) from None


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


class EventKind(IntEnum):
    """virDomainEventID: the kinds of events that the driver receives."""

    LIFECYCLE = 0
    BLOCK_JOB_2 = 16
    METADATA_CHANGE = 23


class Affect(IntFlag):
    """virDomainModificationImpact: the running domain, the definition for the next start, or both."""

    LIVE = 1
    CONFIG = 2


class XmlFlag(IntFlag):
    """virDomainXMLFlags."""

    SECURE = 1
    INACTIVE = 2


class ShutdownFlag(IntEnum):
    """virDomainShutdownFlagValues; with 0 libvirt's driver chooses the method."""

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
