"""A cache of all domains, updated by libvirt's events: listing hundreds of instances makes no call to libvirt.

A domain is read again after an event, all domains after a lost connection and once a minute, since libvirt has no event
for some changes of a definition. Use `refresh` where the current state is required. `MetadataWriter` changes
Thrave's metadata element of a domain, in the running definition and in that for the next start. A lock file serializes
changes by several processes of this service, but not by other clients such as an editor.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from thrave.compute.errors import (
    HypervisorError,
    HypervisorUnavailable,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    InvalidDescriptionError,
    InvalidDomainError,
)
from thrave.compute.instance import Instance, InstanceState, OffReason, VolumeFile
from thrave.compute.libvirt import binding
from thrave.compute.libvirt.binding import METADATA_ELEMENT, Affect, Connection, Domain, DomainState, XmlFlag
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection
from thrave.compute.libvirt.domain_metadata import KEY, NAMESPACE, InstanceMetadata, format_metadata, parse_metadata
from thrave.compute.libvirt.domain_xml import DomainDefinition, read_definition, read_pool_type
from thrave.compute.libvirt.instance_mapping import (
    PoolVolume,
    instance_id_of,
    instance_state,
    off_reason,
    to_instance,
    volume_of,
)
from thrave.concurrency import Call, CallTimeoutError, monotonic, new_lock, utc_now
from thrave.files import LOCK_TIMEOUT, file_lock

if TYPE_CHECKING:
    from datetime import datetime

_WRITE_ATTEMPTS = 3  # a domain may be started or stopped between two calls


class MetadataWriter:
    """Writes Thrave's metadata element of domains.

    Args:
        lock_folder: For the lock files.
    """

    def __init__(self, lock_folder: Path) -> None:
        self._lock_folder = lock_folder

    def lock(self, instance_id: str) -> AbstractContextManager[None]:
        """Lock the metadata and the definition of a domain against changes by this service, for a block.

        Waits for the lock. Raises InstanceLocked if it stays locked for longer than a change takes.
        """
        return self._locked(instance_id, "change", wait=True)

    def lock_merge(self, instance_id: str) -> AbstractContextManager[None]:
        """Lock an instance against other merges, for a block. Raises InstanceLocked if a merge is in progress."""
        return self._locked(instance_id, "merge", wait=False)

    @contextmanager
    def _locked(self, instance_id: str, purpose: str, *, wait: bool) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._lock_folder / f"{instance_id}.{purpose}", wait=wait))
            except BlockingIOError:
                raise InstanceLocked(instance_id, waited=LOCK_TIMEOUT if wait else 0.0) from None
            yield

    def change(self, domain: Domain, instance_id: str, change: Callable[[InstanceMetadata], InstanceMetadata]) -> None:
        """Replace the metadata by the result of `change`. Does nothing if the domain has none.

        Raises:
            InvalidDescriptionError: The metadata are not valid.
            libvirtError: libvirt refuses.
        """
        with self.lock(instance_id):
            before = read_metadata(domain, instance_id)
            after = before and change(before)
            if after != before:
                _write(domain, after)

    def replace(self, domain: Domain, instance_id: str, metadata: InstanceMetadata | None) -> None:
        """Write metadata, or remove them (None), without reading the old ones. Raises libvirtError."""
        with self.lock(instance_id):
            _write(domain, metadata)


def read_metadata(domain: Domain, instance_id: str) -> InstanceMetadata | None:
    """Return Thrave's metadata of a domain; None if it has none. Raises as `MetadataWriter.change`."""
    with domain_errors_translated(domain, instance_id):
        return parse_metadata(
            read_definition(domain.XMLDesc(XmlFlag.INACTIVE if domain.isPersistent() else 0)).metadata
        )


@contextmanager
def domain_errors_translated(domain: Domain, instance_id: str) -> Iterator[None]:
    """Translate InvalidDomainError in the block to InvalidDescriptionError with the name of the domain."""
    try:
        yield
    except InvalidDomainError as fault:
        raise InvalidDescriptionError(instance_id, f"the domain {domain.name()}", [str(fault)]) from None


def _write(domain: Domain, metadata: InstanceMetadata | None) -> None:
    text = None if metadata is None else format_metadata(metadata)
    for attempt in range(
        _WRITE_ATTEMPTS
    ):  # not `retry`: an attempt has no wait, and is repeated only if the state has changed
        affected = _affected_definitions(domain)
        try:
            domain.setMetadata(METADATA_ELEMENT, text, KEY, NAMESPACE, affected)
        except binding.load().libvirtError:
            if attempt == _WRITE_ATTEMPTS - 1 or _affected_definitions(domain) == affected:
                raise
        else:
            return


def _affected_definitions(domain: Domain) -> Affect:
    live = Affect.LIVE if domain.isActive() else Affect(0)
    return live | (Affect.CONFIG if domain.isPersistent() else Affect(0))


FULL_REFRESH_INTERVAL = 60.0  # seconds
REFRESH_TIMEOUT = 5.0  # seconds to read one domain
SHORT_REFRESH_TIMEOUT = 0.5  # the same, once one call has waited LIST_TIMEOUT for domains that hang
LIST_TIMEOUT = 20.0  # seconds that `list` waits for domains that hang, or for another thread in `list`

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DomainSnapshot:
    """A domain at the time when it was read.

    Attributes:
        name: Name in libvirt.
        uuid: In libvirt's form.
        state: A virDomainState.
        reason: libvirt's reason for the state.
        off_reason: Why it is off; None if it is not.
        live: Definition of the running domain; None if it is off.
        config: Definition for the next start; None if the domain is transient.
        is_adopted: Whether it has Thrave's metadata element.
        metadata: Content of Thrave's metadata element.
        instance: The instance of the domain.
        fault: Why an adopted domain is no valid instance; the definitions may then be missing.
    """

    name: str
    uuid: str
    state: int
    reason: int
    off_reason: OffReason | None = None
    live: DomainDefinition | None = None
    config: DomainDefinition | None = None
    is_adopted: bool = False
    metadata: InstanceMetadata | None = None
    instance: Instance | None = None
    fault: InvalidDescriptionError | None = None

    @property
    def instance_id(self) -> str:
        """Id of the instance, also if the domain is not adopted."""
        return instance_id_of(self.uuid)

    @property
    def instance_state(self) -> InstanceState:
        """State as EC2 names it."""
        return instance_state(self.state, terminated=self.metadata is not None and self.metadata.terminated)

    @property
    def definition(self) -> DomainDefinition:
        """Definition of the running domain, else for the next start. Raises `fault` if neither is valid."""
        if (definition := self.live or self.config) is None:
            assert self.fault is not None, "a transient domain that is off does not exist"
            raise self.fault
        return definition


class DomainCache:
    """All domains of a libvirt daemon. Safe to use from several threads.

    Args:
        hypervisor: The connection.
        events: Events of the domains.
        metadata_writer: Records the time of a start for which there was an event.
    """

    def __init__(self, hypervisor: LibvirtConnection, events: DomainEvents, metadata_writer: MetadataWriter) -> None:
        self._hypervisor = hypervisor
        self._events = events
        self._metadata_writer = metadata_writer
        self._lock = new_lock()
        self._snapshots: dict[str, DomainSnapshot] = {}
        self._uuids: dict[str, str] = {}
        self._first_seen: dict[str, datetime] = {}
        self._hanging: dict[str, Call[DomainSnapshot | None]] = {}
        self._wait_budget = 0.0
        self._disconnects = 0
        self._next_full_refresh = 0.0

    def list(self) -> Sequence[DomainSnapshot]:
        """Return all domains by instance id; the last snapshot of one that hangs. Raises HypervisorError."""
        with self._hypervisor.session() as connection:
            if not self._lock.acquire(timeout=LIST_TIMEOUT):
                raise HypervisorUnavailable(
                    "", "another thread is reading the domains, and libvirt does not respond", waited=LIST_TIMEOUT
                )
            try:
                self._wait_budget = LIST_TIMEOUT
                if self._events.disconnects != self._disconnects or monotonic() > self._next_full_refresh:
                    self._refresh_all(connection)
                else:
                    self._refresh_changed(connection)
                return self.snapshots
            finally:
                self._lock.release()

    @property
    def snapshots(self) -> Sequence[DomainSnapshot]:
        """The result of the last `list` that succeeded, possibly changed since; empty if there was none."""
        return sorted(self._snapshots.values(), key=lambda snapshot: snapshot.instance_id)

    def find(self, connection: Connection, instance_id: str) -> Domain:
        """Return the domain with an instance id, adopted or not.

        Raises:
            InstanceNotFound: There is none.
            libvirtError: Also if it was removed just now.
        """
        if instance_id not in self._uuids:
            self._uuids = {instance_id_of(uuid): uuid for uuid in _uuids(connection)}
        if instance_id not in self._uuids:
            raise InstanceNotFound(instance_id)
        return connection.lookupByUUIDString(self._uuids[instance_id])

    def refresh(self, domain: Domain) -> DomainSnapshot:
        """Read a domain. Raises libvirtError."""
        snapshot = _read_snapshot(domain)
        if snapshot.state == DomainState.SHUTOFF:
            stopped = self._events.history(snapshot.uuid).stopped
            reason = off_reason(snapshot.reason, stopped, saved=bool(domain.hasManagedSaveImage()))
            snapshot = replace(snapshot, off_reason=reason)
        if not snapshot.is_adopted or snapshot.fault is not None:
            return snapshot
        try:
            metadata = _find_metadata(snapshot)
            snapshot = replace(snapshot, metadata=self._with_launch_time(domain, snapshot.uuid, metadata))
            return replace(snapshot, instance=self.instance_of(snapshot))
        except InvalidDomainError as fault:
            return replace(snapshot, fault=_faulty(snapshot, fault))

    def instance_of(self, snapshot: DomainSnapshot) -> Instance:
        """Return the instance of a domain with metadata. Raises InvalidDomainError if it is not valid."""
        assert snapshot.metadata is not None
        launch_time = snapshot.metadata.launch_time
        assert launch_time is not None
        return to_instance(
            snapshot.definition,
            snapshot.metadata,
            snapshot.instance_state,
            launch_time,
            self._find_volume,
            off_reason=snapshot.off_reason,
        )

    def written_volumes(self, snapshot: DomainSnapshot) -> Iterator[VolumeFile]:
        """Yield the disks that a domain has open for writing; none if it is off."""
        for disk in () if snapshot.live is None else snapshot.live.disks:
            if not disk.readonly:
                with suppress(InvalidDomainError):  # without the pool of the disk, its path is unknown
                    if (volume := volume_of(disk, self._find_volume)) is not None:
                        yield volume

    def _refresh_all(self, connection: Connection) -> None:
        disconnects = self._events.disconnects
        self._events.take_changed()
        try:
            uuids = Call("domains", lambda: _uuids(connection)).result(REFRESH_TIMEOUT)
        except CallTimeoutError:
            raise HypervisorUnavailable("", "libvirt does not list its domains", waited=REFRESH_TIMEOUT) from None
        snapshots = [self._refresh_with_timeout(connection, uuid) for uuid in uuids]
        self._snapshots = {snapshot.uuid: snapshot for snapshot in snapshots if snapshot is not None}
        self._uuids = {snapshot.instance_id: uuid for uuid, snapshot in self._snapshots.items()}
        self._disconnects, self._next_full_refresh = disconnects, monotonic() + FULL_REFRESH_INTERVAL

    def _refresh_changed(self, connection: Connection) -> None:
        changed = self._events.take_changed()
        try:
            for uuid in changed:
                self._refresh_one(connection, uuid)
        except BaseException:  # also if no thread can be started: there is no second event for a change
            self._events.mark_changed(changed)
            raise

    def _refresh_one(self, connection: Connection, uuid: str) -> None:
        snapshot = self._refresh_with_timeout(connection, uuid)
        if snapshot is None:
            self._snapshots.pop(uuid, None)
        else:
            self._snapshots[uuid] = snapshot
            self._uuids[snapshot.instance_id] = uuid

    def _refresh_with_timeout(self, connection: Connection, uuid: str) -> DomainSnapshot | None:
        """Read a domain; return its last snapshot if libvirt does not respond, or None if it does not exist.

        Each domain is read in its own call, so that one whose QEMU or storage hangs does not affect the others.
        """

        def read() -> DomainSnapshot | None:
            try:
                with self._hypervisor.session(instance_id_of(uuid)):
                    return self.refresh(connection.lookupByUUIDString(uuid))
            except InstanceNotFound:
                return None

        earlier = self._hanging.pop(uuid, None)
        if earlier is not None and not earlier.is_running:
            earlier = None
        call = earlier or Call(f"read domain {uuid}", read)
        timeout = 0.0 if earlier else REFRESH_TIMEOUT if self._wait_budget > 0 else SHORT_REFRESH_TIMEOUT
        try:
            return call.result(timeout)
        except CallTimeoutError:
            self._hanging[uuid] = call
            self._wait_budget -= timeout
            self._events.mark_changed({uuid})
            log.warning("domain %s not read: libvirt does not respond", uuid)
            return self._snapshots.get(uuid)
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            log.warning("domain not read: %s", error)
            return self._snapshots.get(uuid)

    def _with_launch_time(self, domain: Domain, uuid: str, metadata: InstanceMetadata) -> InstanceMetadata:
        """Return metadata with the time of the last start: the recorded one, a later one of an event, or now."""
        started = self._events.history(uuid).started
        if started is None or (metadata.launch_time is not None and started <= metadata.launch_time):
            first_seen = self._first_seen.setdefault(uuid, utc_now())
            return metadata if metadata.launch_time else replace(metadata, launch_time=first_seen)
        with suppress(InstanceError), self._hypervisor.session(instance_id_of(uuid)):
            self._metadata_writer.change(
                domain, instance_id_of(uuid), lambda recorded: replace(recorded, launch_time=started)
            )
        return replace(metadata, launch_time=started)

    def _find_volume(self, pool: str, volume: str) -> PoolVolume:
        try:
            with self._hypervisor.session() as connection:
                found = connection.storagePoolLookupByName(pool)
                path = found.storageVolLookupByName(volume).path()
                return PoolVolume(Path(path) if path.startswith("/") else None, read_pool_type(found.XMLDesc(0)))
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            raise InvalidDomainError(f"disk source: the volume {volume} of the pool {pool}: {error}") from None


def require_instance(snapshot: DomainSnapshot) -> Instance:
    """Return the instance of a domain.

    Raises:
        InstanceNotFound: The domain is not adopted.
        InvalidDescriptionError: It is adopted but not a valid instance.
    """
    if snapshot.instance is not None:
        return snapshot.instance
    if snapshot.is_adopted and snapshot.fault is not None:
        raise snapshot.fault
    raise InstanceNotFound(snapshot.instance_id)


def _read_snapshot(domain: Domain) -> DomainSnapshot:
    """Read a domain. If it is started or stopped between the calls, there is an event, and it is read again."""
    state, reason = domain.state()
    live = None if state == DomainState.SHUTOFF else domain.XMLDesc(0)
    config = domain.XMLDesc(XmlFlag.INACTIVE) if domain.isPersistent() else None
    snapshot = DomainSnapshot(
        name=domain.name(),
        uuid=domain.UUIDString(),
        state=state,
        reason=reason,
        is_adopted=NAMESPACE in f"{live}{config}",
    )
    try:
        return replace(snapshot, live=_definition(live), config=_definition(config))
    except InvalidDomainError as fault:
        return replace(snapshot, fault=_faulty(snapshot, fault))


def _definition(xml: str | None) -> DomainDefinition | None:
    return None if xml is None else read_definition(xml)


def _find_metadata(snapshot: DomainSnapshot) -> InstanceMetadata:
    """Return Thrave's metadata in the definition for the next start, else in that of the running domain."""
    for definition in (snapshot.config, snapshot.live):
        if definition is not None and (metadata := parse_metadata(definition.metadata)) is not None:
            return metadata
    raise InvalidDomainError(f"it mentions {NAMESPACE}, but has no element of this namespace")


def _faulty(snapshot: DomainSnapshot, fault: InvalidDomainError) -> InvalidDescriptionError:
    return InvalidDescriptionError(snapshot.instance_id, f"the domain {snapshot.name}", [str(fault)])


def _uuids(connection: Connection) -> list[str]:
    return [domain.UUIDString() for domain in connection.listAllDomains()]
