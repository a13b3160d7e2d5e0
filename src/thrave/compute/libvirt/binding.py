"""Debian's libvirt binding, found also from a virtual environment, with types for the little that is used of it.

No package index has it ready made, since it must be of the same version as the library; Debian's python3-libvirt puts
it where only the system's Python looks. It is loaded from there by its full path: that folder holds much else and is
never put on ``sys.path``. Nothing here connects to anything.

Libvirt's numbers, as far as they are used: those of its header libvirt-domain.h if nothing else is said.

They are part of its binary interface and never change, so that what is pure can be tested where there is no libvirt.
"""

# ruff: noqa: N802 (every name in it that is no word of ours is libvirt's)
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Protocol, cast

from thrave.compute.errors import LibraryNotInstalled
from thrave.concurrency import new_lock

_DEBIAN_MODULES = "/usr/lib/python3/dist-packages"


_PACKAGE = "python3-libvirt"


_loading = new_lock()


class LibvirtError(Protocol):
    """What every call raises."""

    def get_error_code(self) -> int | None:
        """A virErrorNumber."""

    def get_error_message(self) -> str | None:
        """Libvirt's words."""


class StorageVolume(Protocol):
    """virStorageVol."""

    def path(self) -> str:
        """Where the host has it."""


class StoragePool(Protocol):
    """virStoragePool."""

    def XMLDesc(self, flags: int) -> str:
        """The pool's description."""

    def storageVolLookupByName(self, name: str) -> StorageVolume:
        """One of its volumes."""


class Domain(Protocol):
    """virDomain. Every method may be called from any thread."""

    def name(self) -> str:
        """Its name; no question to libvirt."""

    def UUIDString(self) -> str:
        """Its UUID; no question to libvirt."""

    def isActive(self) -> int:
        """Whether a process runs it."""

    def isPersistent(self) -> int:
        """Whether it is there also when it is off."""

    def state(self) -> list[int]:
        """Its virDomainState, and the reason."""

    def XMLDesc(self, flags: int) -> str:
        """Its definition: of the running one, or what it is started from."""

    def setMetadata(self, kind: int, metadata: str | None, key: str | None, uri: str, flags: int) -> int:
        """Replace or remove the element of a namespace."""

    def create(self) -> int:
        """Start it."""

    def destroy(self) -> int:
        """Cut its power."""

    def shutdownFlags(self, flags: int) -> int:
        """Ask the guest to power off."""

    def suspend(self) -> int:
        """Stop its CPUs."""

    def resume(self) -> int:
        """Have them go on."""

    def hasManagedSaveImage(self) -> int:
        """Whether its memory was saved, to be started from."""

    def listAllCheckpoints(self) -> list[object]:
        """Its checkpoints."""

    def blockCommit(self, disk: str, base: str | None, top: str | None, bandwidth: int, flags: int) -> int:
        """Begin to write an image into one below it."""

    def blockJobInfo(self, disk: str, flags: int) -> Mapping[str, int]:
        """`cur` and `end` of a job in bytes, for example; empty if there is none."""

    def blockJobAbort(self, disk: str, flags: int) -> int:
        """End the job on a disk."""


LifecycleCallback = Callable[["Connection", Domain, int, int, object], object]
"""Called with connection, domain, `Lifecycle`, its detail, opaque."""


BlockJobCallback = Callable[["Connection", Domain, str, int, int, object], object]
"""Called with connection, domain, target of the disk, type of the job, `JobStatus`, opaque."""


MetadataCallback = Callable[["Connection", Domain, int, str, object], object]
"""Called with connection, domain, kind, namespace, opaque."""


class Connection(Protocol):
    """virConnect. Every method may be called from any thread."""

    def close(self) -> int:
        """Give up one reference to it."""

    def isAlive(self) -> int:
        """Whether the socket is open; no question to libvirt."""

    def setKeepAlive(self, interval: int, count: int) -> int:
        """Close the connection when so many questions, so many seconds apart, were not answered."""

    def getType(self) -> str:
        """The driver, `QEMU` for instance."""

    def listAllDomains(self) -> list[Domain]:
        """All domains, running or not."""

    def lookupByUUIDString(self, uuid: str) -> Domain:
        """The domain with a UUID."""

    def lookupByName(self, name: str) -> Domain:
        """The domain with a name."""

    def defineXML(self, xml: str) -> Domain:
        """Make a domain, or change what it is started from the next time."""

    def domainEventRegisterAny(
        self,
        domain: Domain | None,
        kind: int,
        callback: LifecycleCallback | BlockJobCallback | MetadataCallback,
        opaque: object,
    ) -> int:
        """Have events of a kind told; the event loop calls."""

    def domainEventDeregisterAny(self, callback: int) -> None:
        """Have them told no more; each registration keeps the connection open."""

    def storagePoolLookupByName(self, name: str) -> StoragePool:
        """The storage pool with a name."""


class LibvirtBinding(Protocol):
    """The module ``libvirt``."""

    @property
    def libvirtError(self) -> type[Exception]:
        """A `LibvirtError`."""

    def open(self, name: str) -> Connection:
        """Connect."""

    def registerErrorHandler(self, handler: Callable[[object, object], None], context: object) -> object:
        """Have errors told to somebody instead of printed."""

    def virEventRegisterDefaultImpl(self) -> int:
        """Use libvirt's own event loop; before the first connection."""

    def virEventRunDefaultImpl(self) -> int:
        """One turn of it; waits until there is something to do."""


class QemuBinding(Protocol):
    """The module ``libvirt_qemu``."""

    def qemuAgentCommand(self, domain: Domain, command: str, timeout: int, flags: int) -> str:
        """Send a command to the guest agent, and give its answer; both are JSON. `timeout` is in seconds."""


def load() -> LibvirtBinding:
    """The binding, wherever it is installed.

    Raises:
        ComponentMissingError: It is not, or it was built for another Python.
    """
    return cast("LibvirtBinding", _load("libvirt", "libvirtmod"))


def load_qemu() -> QemuBinding:
    """What is only for QEMU. Raises as `load`."""
    load()
    return cast("QemuBinding", _load("libvirt_qemu", "libvirtmod_qemu"))


def _load(name: str, library: str) -> ModuleType:
    with _loading:  # a module is known before it has been executed
        try:
            return import_module(name)
        except ImportError:
            _load_from_debian(library)
            return _load_from_debian(name)


def _load_from_debian(name: str) -> ModuleType:
    spec = PathFinder.find_spec(name, [_DEBIAN_MODULES])
    if spec is None or spec.loader is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise LibraryNotInstalled(f"libvirt for Python {version}", _PACKAGE)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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
