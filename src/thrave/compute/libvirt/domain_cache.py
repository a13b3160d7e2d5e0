"""Our element in a domain's metadata, changed while others may be changing it too: one change after the other.

It is written into the running domain and into what it is started from the next time, so that both say the same. Between
processes a lock file keeps the changes apart; a person with an editor is not kept apart.

All domains of a libvirt, as they were last seen: kept true by events, so that listing hundreds asks nothing.

A domain of which an event has told something is looked at again before anybody is told of it; after a lost connection
all of them are, and once a minute in any case, since not every change of a definition is told. Who needs to know what
is true now looks at the domain itself (`look`).
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
from thrave.compute.libvirt.domain_xml import DomainDefinition, pool_type, read_definition
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

_TRIES = 3  # a domain may go on or off between two questions


class MetadataWriter:
    """The records of a host's domains.

    Args:
        lock_folder: Where lock files stand.
    """

    def __init__(self, lock_folder: Path) -> None:
        self._lock_folder = lock_folder

    def lock(self, instance_id: str) -> AbstractContextManager[None]:
        """Change nothing for the length of the block but by whoever has this lock.

        Waits for the lock. Raises InstanceHeld if somebody has it for longer than a change takes.
        """
        return self._locked(instance_id, "change", wait=True)

    def lock_merge(self, instance_id: str) -> AbstractContextManager[None]:
        """Merge an instance's overlay for the length of the block, as the only one. Raises InstanceHeld if one does."""
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
        """Write what `change` makes of the record that is there; where there is none, nothing.

        Raises:
            InvalidDescriptionError: What is there cannot be read.
            libvirtError: libvirt refuses.
        """
        with self.lock(instance_id):
            before = read_metadata(domain, instance_id)
            after = before and change(before)
            if after != before:
                _write(domain, after)

    def replace(self, domain: Domain, instance_id: str, record: InstanceMetadata | None) -> None:
        """Write a record, or remove it, whatever stands there. Raises libvirtError."""
        with self.lock(instance_id):
            _write(domain, record)


def read_metadata(domain: Domain, instance_id: str) -> InstanceMetadata | None:
    """What a domain's metadata say now. Raises as `MetadataWriter.change`."""
    with domain_errors_translated(domain, instance_id):
        return parse_metadata(
            read_definition(domain.XMLDesc(XmlFlag.INACTIVE if domain.isPersistent() else 0)).metadata
        )


@contextmanager
def domain_errors_translated(domain: Domain, instance_id: str) -> Iterator[None]:
    """Raise InvalidDescriptionError with what cannot be understood of a domain in the block."""
    try:
        yield
    except InvalidDomainError as fault:
        raise InvalidDescriptionError(instance_id, f"the domain {domain.name()}", [str(fault)]) from None


def _write(domain: Domain, record: InstanceMetadata | None) -> None:
    text = None if record is None else format_metadata(record)
    for attempt in range(_TRIES):  # not `retry`: an attempt has no wait, and is repeated only if the state has changed
        affected = _affected(domain)
        try:
            domain.setMetadata(METADATA_ELEMENT, text, KEY, NAMESPACE, affected)
        except binding.load().libvirtError:
            if attempt == _TRIES - 1 or _affected(domain) == affected:
                raise
        else:
            return


def _affected(domain: Domain) -> Affect:
    live = Affect.LIVE if domain.isActive() else Affect(0)
    return live | (Affect.CONFIG if domain.isPersistent() else Affect(0))


FULL_REFRESH_INTERVAL = 60.0  # seconds between two looks at everything


REFRESH_TIMEOUT = 5.0  # seconds for a look at one domain


SHORT_REFRESH_TIMEOUT = 0.5  # the same, once domains that hang have cost HANGING_TIMEOUT


HANGING_TIMEOUT = 20.0  # seconds that one question may wait for domains that hang, or for another question


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DomainSnapshot:
    """A domain as it was at a moment.

    Attributes:
        name: What its operator calls it.
        uuid: In libvirt's notation.
        state: A virDomainState, and `reason` why it is in it.
        off: Why it is off; None if it is not.
        live: The definition of the running one.
        config: What it is started from the next time; a transient domain has none.
        adopted: It has our element, so it is to be an instance.
        metadata: Content of our metadata element.
        instance: The instance that it is.
        fault: What cannot be understood of it; the definitions may then be missing.
    """

    name: str
    uuid: str
    state: int
    reason: int
    off: OffReason | None = None
    live: DomainDefinition | None = None
    config: DomainDefinition | None = None
    adopted: bool = False
    metadata: InstanceMetadata | None = None
    instance: Instance | None = None
    fault: InvalidDescriptionError | None = None

    @property
    def instance_id(self) -> str:
        """Its instance's id, or what it would be."""
        return instance_id_of(self.uuid)

    @property
    def instance_state(self) -> InstanceState:
        """EC2's word for its state."""
        return instance_state(self.state, terminated=self.metadata is not None and self.metadata.terminated)

    @property
    def definition(self) -> DomainDefinition:
        """Of the running one, else what it is started from. Raises `fault` if neither can be understood."""
        if (definition := self.live or self.config) is None:
            assert self.fault is not None, "a domain that is off and transient is gone"
            raise self.fault
        return definition


class DomainCache:
    """The domains of a libvirt; any thread may ask.

    Args:
        hypervisor: The libvirt.
        events: What it has told.
        records: Where a start that was told is written down.
    """

    def __init__(self, hypervisor: LibvirtConnection, events: DomainEvents, records: MetadataWriter) -> None:
        self._hypervisor = hypervisor
        self._events = events
        self._records = records
        self._lock = new_lock()
        self._seen: dict[str, DomainSnapshot] = {}
        self._uuids: dict[str, str] = {}
        self._first_seen: dict[str, datetime] = {}
        self._hanging: dict[str, Call[DomainSnapshot | None]] = {}
        self._wait_budget = 0.0
        self._disconnects = 0
        self._next_full_refresh = 0.0

    def list(self) -> Sequence[DomainSnapshot]:
        """Every domain, by instance id; one that libvirt hangs over is as it was last seen. Raises HypervisorError."""
        with self._hypervisor.session() as connection:
            if not self._lock.acquire(timeout=HANGING_TIMEOUT):
                raise HypervisorUnavailable("", "the look at the domains does not end", waited=HANGING_TIMEOUT)
            try:
                self._wait_budget = HANGING_TIMEOUT
                if self._events.disconnects != self._disconnects or monotonic() > self._next_full_refresh:
                    self._refresh_all(connection)
                else:
                    self._refresh_changed(connection)
                return self.last_seen
            finally:
                self._lock.release()

    @property
    def last_seen(self) -> Sequence[DomainSnapshot]:
        """The same as it was the last time that libvirt answered; empty if it never has."""
        return sorted(self._seen.values(), key=lambda snapshot: snapshot.instance_id)

    def find(self, connection: Connection, instance_id: str) -> Domain:
        """The domain with an instance's id, whether it has been adopted or not.

        Raises:
            InstanceNotFound: There is none.
            libvirtError: Also if it has just vanished.
        """
        if instance_id not in self._uuids:
            self._uuids = {instance_id_of(uuid): uuid for uuid in _uuids(connection)}
        if instance_id not in self._uuids:
            raise InstanceNotFound(instance_id)
        return connection.lookupByUUIDString(self._uuids[instance_id])

    def refresh(self, domain: Domain) -> DomainSnapshot:
        """A domain as it is now. Raises libvirtError."""
        snapshot = _read_snapshot(domain)
        if snapshot.state == DomainState.SHUTOFF:
            stopped = self._events.history(snapshot.uuid).stopped
            off = off_reason(snapshot.reason, stopped, saved=bool(domain.hasManagedSaveImage()))
            snapshot = replace(snapshot, off=off)
        if not snapshot.adopted or snapshot.fault is not None:
            return snapshot
        try:
            record = _record(snapshot)
            snapshot = replace(snapshot, metadata=self._with_launch_time(domain, snapshot.uuid, record))
            return replace(snapshot, instance=self.instance_of(snapshot))
        except InvalidDomainError as fault:
            return replace(snapshot, fault=_faulty(snapshot, fault))

    def instance_of(self, snapshot: DomainSnapshot) -> Instance:
        """The instance that a domain with a record is. Raises DomainFaultError if it is none."""
        assert snapshot.metadata is not None
        launch_time = snapshot.metadata.launch_time
        assert launch_time is not None
        return to_instance(
            snapshot.definition,
            snapshot.metadata,
            snapshot.instance_state,
            launch_time,
            self._find_volume,
            off=snapshot.off,
        )

    def written_volumes(self, snapshot: DomainSnapshot) -> Iterator[VolumeFile]:
        """The disks that a domain has open for writing; none of one that is off."""
        for disk in () if snapshot.live is None else snapshot.live.disks:
            if not disk.readonly:
                with suppress(InvalidDomainError):  # the pool of a disk is gone, and nothing can be compared with it
                    if (volume := volume_of(disk, self._find_volume)) is not None:
                        yield volume

    def _refresh_all(self, connection: Connection) -> None:
        lost = self._events.disconnects
        self._events.take_changed()
        try:
            uuids = Call("domains", lambda: _uuids(connection)).result(REFRESH_TIMEOUT)
        except CallTimeoutError:
            raise HypervisorUnavailable("", "libvirt does not list its domains", waited=REFRESH_TIMEOUT) from None
        seen = [self._refresh_with_timeout(connection, uuid) for uuid in uuids]
        self._seen = {snapshot.uuid: snapshot for snapshot in seen if snapshot is not None}
        self._uuids = {snapshot.instance_id: uuid for uuid, snapshot in self._seen.items()}
        self._disconnects, self._next_full_refresh = lost, monotonic() + FULL_REFRESH_INTERVAL

    def _refresh_changed(self, connection: Connection) -> None:
        changed = self._events.take_changed()
        try:
            for uuid in changed:
                self._refresh_one(connection, uuid)
        except BaseException:  # also that no thread can be started: a change that was told is not told again
            self._events.mark_changed(changed)
            raise

    def _refresh_one(self, connection: Connection, uuid: str) -> None:
        snapshot = self._refresh_with_timeout(connection, uuid)
        if snapshot is None:
            self._seen.pop(uuid, None)
        else:
            self._seen[uuid] = snapshot
            self._uuids[snapshot.instance_id] = uuid

    def _refresh_with_timeout(self, connection: Connection, uuid: str) -> DomainSnapshot | None:
        """A domain as it is now, or as it was if libvirt will not tell; None if it has vanished.

        Each is looked at in a call of its own: one that libvirt hangs over (its QEMU, or its storage) hides no other.
        """

        def look() -> DomainSnapshot | None:
            try:
                with self._hypervisor.session(instance_id_of(uuid)):
                    return self.refresh(connection.lookupByUUIDString(uuid))
            except InstanceNotFound:
                return None

        earlier = self._hanging.pop(uuid, None)
        if earlier is not None and not earlier.is_running:
            earlier = None
        call = earlier or Call(f"look {uuid}", look)
        timeout = 0.0 if earlier else REFRESH_TIMEOUT if self._wait_budget > 0 else SHORT_REFRESH_TIMEOUT
        try:
            return call.result(timeout)
        except CallTimeoutError:
            self._hanging[uuid] = call
            self._wait_budget -= timeout
            self._events.mark_changed({uuid})
            log.warning("the domain %s cannot be looked at: libvirt does not answer", uuid)
            return self._seen.get(uuid)
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            log.warning("a domain cannot be looked at: %s", error)
            return self._seen.get(uuid)

    def _with_launch_time(self, domain: Domain, uuid: str, record: InstanceMetadata) -> InstanceMetadata:
        """The record with the time of the last start: the written one, a later one that was told, or now."""
        started = self._events.history(uuid).started
        if started is None or (record.launch_time is not None and started <= record.launch_time):
            first_seen = self._first_seen.setdefault(uuid, utc_now())
            return record if record.launch_time else replace(record, launch_time=first_seen)
        with suppress(InstanceError), self._hypervisor.session(instance_id_of(uuid)):
            self._records.change(domain, instance_id_of(uuid), lambda there: replace(there, launch_time=started))
        return replace(record, launch_time=started)

    def _find_volume(self, pool: str, volume: str) -> PoolVolume:
        try:
            with self._hypervisor.session() as connection:
                found = connection.storagePoolLookupByName(pool)
                path = found.storageVolLookupByName(volume).path()
                return PoolVolume(Path(path) if path.startswith("/") else None, pool_type(found.XMLDesc(0)))
        except HypervisorUnavailable:
            raise
        except HypervisorError as error:
            raise InvalidDomainError(f"disk source: the volume {volume} of the pool {pool}: {error}") from None


def require_instance(snapshot: DomainSnapshot) -> Instance:
    """The instance that a domain is.

    Raises:
        InstanceNotFound: It is none.
        InvalidDescriptionError: It is to be one, but cannot be understood.
    """
    if snapshot.instance is not None:
        return snapshot.instance
    if snapshot.adopted and snapshot.fault is not None:
        raise snapshot.fault
    raise InstanceNotFound(snapshot.instance_id)


def _read_snapshot(domain: Domain) -> DomainSnapshot:
    """What libvirt says of a domain. One that goes on or off meanwhile is told of, and looked at again."""
    state, reason = domain.state()
    live = None if state == DomainState.SHUTOFF else domain.XMLDesc(0)
    config = domain.XMLDesc(XmlFlag.INACTIVE) if domain.isPersistent() else None
    snapshot = DomainSnapshot(
        name=domain.name(),
        uuid=domain.UUIDString(),
        state=state,
        reason=reason,
        adopted=NAMESPACE in f"{live}{config}",
    )
    try:
        return replace(snapshot, live=_definition(live), config=_definition(config))
    except InvalidDomainError as fault:
        return replace(snapshot, fault=_faulty(snapshot, fault))


def _definition(xml: str | None) -> DomainDefinition | None:
    return None if xml is None else read_definition(xml)


def _record(snapshot: DomainSnapshot) -> InstanceMetadata:
    """What our element says, in what the domain is started from the next time, else in the running one."""
    for definition in (snapshot.config, snapshot.live):
        if definition is not None and (record := parse_metadata(definition.metadata)) is not None:
            return record
    raise InvalidDomainError(f"{NAMESPACE} stands there, and no element of it")


def _faulty(snapshot: DomainSnapshot, fault: InvalidDomainError) -> InvalidDescriptionError:
    return InvalidDescriptionError(snapshot.instance_id, f"the domain {snapshot.name}", [str(fault)])


def _uuids(connection: Connection) -> list[str]:
    return [domain.UUIDString() for domain in connection.listAllDomains()]
