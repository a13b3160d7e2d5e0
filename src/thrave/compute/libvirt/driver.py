"""Driver for libvirt domains. An instance is a domain with our element in its metadata.

The driver writes only that element and, while an overlay is attached (`overlays.py`), the root disk. It asks a guest to
power off through its agent if that responds, else by the power button: libvirt's own choice of the two waits a minute
for a missing agent. Events keep the listed states current; before a command the driver reads the domain itself.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from thrave.compute.base import Overlays, VolumeHold
from thrave.compute.description_files import find_file_fault
from thrave.compute.errors import (
    HoldLostError,
    HypervisorError,
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    InvalidDescriptionError,
    InvalidDomainError,
    RootVolumeInUse,
)
from thrave.compute.instance import INSTANCE_ID_PATTERN, TERMINATING, Instance, InstanceState, VolumeFile
from thrave.compute.libvirt import binding, guest_agent
from thrave.compute.libvirt.binding import Connection, Domain, DomainState, ShutdownFlag
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection
from thrave.compute.libvirt.domain_cache import DomainCache, DomainSnapshot, MetadataWriter, require_instance
from thrave.compute.libvirt.domain_metadata import InstanceMetadata, check_metadata
from thrave.compute.libvirt.guest_agent import GuestAgents
from thrave.compute.libvirt.instance_mapping import instance_id_of
from thrave.compute.libvirt.overlay_merge import LibvirtContext
from thrave.compute.libvirt.overlays import LibvirtOverlays
from thrave.compute.timeouts import call_with_timeout, check_command, command_with_timeout, with_timeout
from thrave.concurrency import utc_now
from thrave.files import file_lock
from thrave.retry import poll_until

_INSTANCE_ID = re.compile(INSTANCE_ID_PATTERN)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_STOPPING_TIMEOUT = 60.0  # seconds from the power-off of a guest to the end of its process
_POLL_INTERVAL = 0.1  # seconds
_STOP_ATTEMPTS = 3  # another client may start the domain between the error and the check of its state
_START_EVENT_TIMEOUT = 1.0  # seconds

# States in which the CPUs do not run, so the guest cannot react, with the command that resumes them.
_UNRESPONSIVE_STATES: dict[int, str] = {
    DomainState.PAUSED: "paused, so its guest cannot power off: virsh resume",
    DomainState.PMSUSPENDED: "suspended, so its guest cannot power off: virsh dompmwakeup",
}

log = logging.getLogger(__name__)


class LibvirtDriver:
    """The adopted domains of a libvirt. See `HypervisorDriver` for the contract.

    A launch time is that of the last start that the driver made or received an event for. A start that it missed keeps
    the earlier launch time, or the time of adoption.

    Args:
        uri: libvirt's connection URI. The first call connects.
        lock_folder: For the lock files of instances; created when needed.
    """

    def __init__(self, uri: str, *, lock_folder: Path) -> None:
        self._lock_folder = lock_folder
        self._events = DomainEvents()
        self._hypervisor = LibvirtConnection(uri, self._events)
        self._metadata = MetadataWriter(lock_folder)
        self._cache = DomainCache(self._hypervisor, self._events, self._metadata)
        self._agents = GuestAgents()
        context = LibvirtContext(self._hypervisor, self._events, self._cache, self._metadata, self._lock)
        self._overlays = LibvirtOverlays(context)

    def close(self) -> None:
        """Close the connection. The next call connects again."""
        self._hypervisor.close()

    @property
    def overlays(self) -> Overlays:
        """Overlays by libvirt's block commit."""
        return self._overlays

    def adopt(
        self,
        domain: str,
        *,
        account_id: str,
        platform: Literal["windows"] | None = None,
        root_device: str | None = None,
        root_device_type: Literal["instance-store", "ebs"] | None = None,
        secret_file: Path | None = None,
        tags: Mapping[str, str] = {},
    ) -> Instance:
        """Make a domain an account's instance, or change its metadata. A terminated instance can be started again then.

        Args:
            domain: Name or UUID of the domain.
            account_id: The owner.
            platform: For a domain without libosinfo metadata.
            root_device: Target of the disk that is bundled; by default the one that the domain boots from.
            root_device_type: By default from the source of that disk.
            secret_file: Contains the passphrase of that disk if it is encrypted.
            tags: Key to value.

        Raises:
            InvalidDescriptionError: The domain cannot be an instance, or its root volume cannot be read.
            IncorrectInstanceState: The domain has an overlay over another disk than `root_device`.
            HypervisorError: There is no such domain, or libvirt refuses.
        """
        with self._hypervisor.session() as connection:
            found = _by_name(connection, domain)
            instance_id = instance_id_of(found.UUIDString())
            metadata = InstanceMetadata(
                account_id=account_id,
                platform=platform,
                root_device=root_device,
                root_device_type=root_device_type,
                secret_file=secret_file,
                tags=dict(tags),
                launch_time=utc_now(),
            )
            before = self._cache.refresh(found)
            if before.metadata is not None:
                metadata = _merge_metadata(instance_id, before.metadata, metadata)
            self._check_adoptable(replace(before, metadata=metadata))
            self._metadata.replace(found, instance_id, metadata)
            self._events.mark_changed({before.uuid})
            return require_instance(self._cache.refresh(found))

    def disown(self, instance_id: str) -> None:
        """Remove our metadata from a domain, so that it is no instance. The domain and its disks are not changed.

        Raises:
            InstanceNotFound: The domain is not adopted.
            InstanceLocked: The root volume is being read.
            IncorrectInstanceState: It runs on an overlay, which must be merged first.
        """
        with self._lock(instance_id), self._change_domain(instance_id) as domain:
            snapshot = self._cache.refresh(domain)
            if not snapshot.is_adopted:
                raise InstanceNotFound(instance_id)
            if snapshot.metadata is not None and snapshot.metadata.frozen is not None:
                raise IncorrectInstanceState(
                    instance_id,
                    f"{instance_id} has an overlay over its root volume. Wait until its task has merged the overlay.",
                )
            self._metadata.replace(domain, instance_id, None)

    def list(
        self, account_id: str | None = None, *, include: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """See `HypervisorDriver`. While libvirt is unavailable, returns the last known instances, if there are any."""
        return [
            snapshot.instance
            for snapshot in self._adopted()
            if snapshot.instance is not None
            and account_id in {None, snapshot.instance.account_id}
            and (include is None or include(snapshot.instance))
        ]

    def list_errors(self) -> Sequence[InstanceError]:
        """Return an error for each domain that has our element but is not in `list`."""
        return [snapshot.fault for snapshot in self._cache.list() if snapshot.is_adopted and snapshot.fault is not None]

    @with_timeout
    def get(self, instance_id: str) -> Instance:
        """Return one instance with its current state."""
        with self._lookup(instance_id) as domain:
            return require_instance(self._cache.refresh(domain))

    def get_owner(self, instance_id: str) -> str:
        """Return the account id in our element, from the cache of domains."""
        for snapshot in self._adopted():
            if snapshot.instance_id == instance_id and snapshot.metadata is not None:
                return snapshot.metadata.account_id
        raise InstanceNotFound(instance_id)

    def state(self, instance_id: str) -> InstanceState:
        """Return the state of the instance's domain."""
        return self.get(instance_id).state

    @command_with_timeout
    def request_stop(self, instance_id: str) -> None:
        """Request a shutdown by the guest's agent if it responds, else by the power button."""
        with self._change_domain(instance_id) as domain:
            snapshot = self._cache.refresh(domain)
            _check_not_terminating(require_instance(snapshot))
            self._request_guest_stop(domain, snapshot)

    @command_with_timeout
    def force_stop(self, instance_id: str) -> None:
        """Destroy the domain, in libvirt's term: end its process. The disks are not changed."""
        with self._change_domain(instance_id) as domain:
            instance = require_instance(self._cache.refresh(domain))
            _check_not_terminating(instance)
            if instance.state is not InstanceState.STOPPED:
                check_command(instance_id)
                run_unless_done(domain.destroy, unless=lambda: not domain.isActive(), attempts=_STOP_ATTEMPTS)

    @command_with_timeout
    def terminate(self, instance_id: str) -> None:
        """Record in the metadata that the instance is terminated, and ask the guest to power off."""
        with self._change_domain(instance_id) as domain:
            snapshot = self._cache.refresh(domain)
            was_terminated = require_instance(snapshot).state in TERMINATING
            check_command(instance_id)
            self._mark_terminated(domain, instance_id, terminated=True)
            try:
                self._request_guest_stop(domain, snapshot)
            except Exception:
                self._mark_terminated(domain, instance_id, terminated=was_terminated)
                raise

    @command_with_timeout
    def start(self, instance_id: str) -> None:
        """Start the domain. If its guest has just powered off, first wait for the end of its process."""
        with self._lock(instance_id), self._change_domain(instance_id) as domain:
            _check_not_terminating(require_instance(self._cache.refresh(domain)))
            if self._wait_while_stopping(domain).state is InstanceState.STOPPED:
                starts = self._events.history(domain.UUIDString()).starts
                check_command(instance_id)
                run_unless_done(domain.create, unless=domain.isActive)
                self._record_launch_time(domain, instance_id, starts)

    def find_users(self, is_same: Callable[[VolumeFile], bool], *, except_instance: str) -> Sequence[str]:
        """See `HypervisorDriver`. Covers all active domains, adopted or not."""
        return [
            f"the domain {snapshot.name}"
            for snapshot in self._cache.list()
            if snapshot.instance_id != except_instance
            and any(is_same(volume) for volume in self._cache.written_volumes(snapshot))
        ]

    @command_with_timeout
    def request_sysprep(self, instance_id: str, command: Sequence[str]) -> None:
        """Run the command through the guest's agent."""
        with self._lookup(instance_id) as domain:
            snapshot = self._cache.refresh(domain)
            _check_not_terminating(require_instance(snapshot))
            if snapshot.live is None or not snapshot.live.has_agent:
                raise InstanceCommandFailed(instance_id, command[0], "cannot be run: there is no agent in the guest")
            check_command(instance_id)
            guest_agent.run_command(domain, instance_id, command)

    @contextmanager
    def hold_stopped(self, instance_id: str) -> Iterator[VolumeHold]:
        """Hold the instance with a lock file; the kernel releases the lock when this process ends."""
        with self._lock(instance_id):
            yield DomainHold(
                self, self._events, instance_id, call_with_timeout(instance_id, lambda: self._uuid_of(instance_id))
            )

    def _uuid_of(self, instance_id: str) -> str:
        with self._lookup(instance_id) as domain:
            snapshot = self._cache.refresh(domain)
            require_instance(snapshot)
            return snapshot.uuid

    def _adopted(self) -> Sequence[DomainSnapshot]:
        try:
            snapshots = self._cache.list()
        except HypervisorError as error:
            if not self._cache.snapshots:
                raise
            log.warning("last known instances used: %s", error)
            snapshots = self._cache.snapshots
        for snapshot in snapshots:
            if snapshot.is_adopted and snapshot.fault is not None:
                log.warning("instance skipped: %s", snapshot.fault)
        return snapshots

    @contextmanager
    def _lookup(self, instance_id: str) -> Iterator[Domain]:
        """Yield the domain of an instance, also if it is not a valid instance."""
        if not _INSTANCE_ID.fullmatch(instance_id):
            raise InstanceNotFound(instance_id)
        with self._hypervisor.session(instance_id) as connection:
            yield self._cache.find(connection, instance_id)

    @contextmanager
    def _change_domain(self, instance_id: str) -> Iterator[Domain]:
        """As `_lookup`, for a change of the domain: the next `list` reads the domain again, even before an event."""
        with self._lookup(instance_id) as domain:
            try:
                yield domain
            finally:
                self._events.mark_changed({domain.UUIDString()})

    def _find(self, instance_id: str) -> None:
        with self._lookup(instance_id):
            pass

    @contextmanager
    def _lock(self, instance_id: str) -> Iterator[None]:
        """Lock the instance with a lock file. Raises InstanceNotFound if there is no such domain."""
        call_with_timeout(instance_id, lambda: self._find(instance_id))
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._lock_folder / f"{instance_id}.held", wait=False))
            except BlockingIOError:
                raise InstanceLocked(instance_id) from None
            yield

    def _check_adoptable(self, snapshot: DomainSnapshot) -> None:
        fault = self._find_adoption_fault(snapshot)
        if fault is not None:
            raise InvalidDescriptionError(snapshot.instance_id, f"the domain {snapshot.name}", [fault])

    def _find_adoption_fault(self, snapshot: DomainSnapshot) -> str | None:
        """Return why a domain with these metadata cannot be an instance; None if it can."""
        assert snapshot.metadata is not None
        try:
            check_metadata(snapshot.metadata)
            instance = self._cache.instance_of(snapshot)
        except InvalidDomainError as fault:
            return str(fault)
        return find_file_fault(instance.root_volume.path) if instance.root_device_type == "instance-store" else None

    def _request_guest_stop(self, domain: Domain, snapshot: DomainSnapshot) -> None:
        if snapshot.state in {DomainState.SHUTOFF, DomainState.SHUTDOWN}:
            return
        if (reason := _UNRESPONSIVE_STATES.get(snapshot.state)) is not None:
            raise IncorrectInstanceState(snapshot.instance_id, f"{snapshot.instance_id} is {reason} {snapshot.name}")
        check_command(snapshot.instance_id)
        starts = self._events.history(snapshot.uuid).starts
        if snapshot.live is not None and snapshot.live.has_agent and self._agents.request_stop(domain, starts):
            return
        with self._hypervisor.session(snapshot.instance_id) as connection:
            button = ShutdownFlag.ACPI_POWER_BTN if connection.getType() == "QEMU" else ShutdownFlag.DEFAULT
            run_unless_done(
                lambda: domain.shutdownFlags(button),
                unless=lambda: not domain.isActive(),
                attempts=_STOP_ATTEMPTS,
            )

    def _mark_terminated(self, domain: Domain, instance_id: str, *, terminated: bool) -> None:
        self._metadata.change(domain, instance_id, lambda recorded: replace(recorded, terminated=terminated))

    def _wait_while_stopping(self, domain: Domain) -> Instance:
        """Return the instance. First wait while it is stopping: it cannot be started before."""
        return poll_until(
            lambda: require_instance(self._cache.refresh(domain)),
            lambda instance: instance.state is not InstanceState.STOPPING,
            timeout=_STOPPING_TIMEOUT,
            interval=_POLL_INTERVAL,
        )

    def _record_launch_time(self, domain: Domain, instance_id: str, starts: int) -> None:
        """Record the launch time: that of the event if one arrives, so that the cache has the same time."""
        event_time = self._events.wait_for_start(domain.UUIDString(), starts, _START_EVENT_TIMEOUT)
        started = event_time or utc_now()
        try:
            with self._hypervisor.session(instance_id):
                self._metadata.change(domain, instance_id, lambda recorded: replace(recorded, launch_time=started))
        except InstanceError as error:  # the instance runs nevertheless
            log.warning("launch time not recorded: %s", error)


class DomainHold:
    """The `VolumeHold` of a locked instance. Events from libvirt report a start outside this service.

    Events are lost while there is no connection: an instance that is off again may have run. Then its volume has to be
    read again.
    """

    def __init__(self, driver: LibvirtDriver, events: DomainEvents, instance_id: str, uuid: str) -> None:
        self._driver = driver
        self._events = events
        self._instance_id = instance_id
        self._uuid = uuid
        self._starts, self._disconnects = events.history(uuid).starts, events.disconnects

    def check(self) -> None:
        """Check the state, and that the number of starts has not changed."""
        state = self._driver.state(self._instance_id)
        if state is not InstanceState.STOPPED:
            raise RootVolumeInUse(self._instance_id, f"{self._instance_id} is {state} while its root volume is read")
        if self._events.history(self._uuid).starts != self._starts:
            raise RootVolumeInUse(
                self._instance_id, f"{self._instance_id} was started and stopped while its root volume was read"
            )
        if (
            self._events.disconnects != self._disconnects
        ):  # checked last: a start that is known is the more precise reason
            raise HoldLostError(
                self._instance_id,
                f"the connection to libvirt was lost: {self._instance_id} may have been started and stopped since",
            )


def _by_name(connection: Connection, domain: str) -> Domain:
    return connection.lookupByUUIDString(domain) if _UUID.fullmatch(domain) else connection.lookupByName(domain)


def _merge_metadata(instance_id: str, before: InstanceMetadata, after: InstanceMetadata) -> InstanceMetadata:
    """Return the new metadata with what the driver itself has recorded before: launch time and overlay."""
    if before.frozen is not None and before.root_device != after.root_device:
        raise IncorrectInstanceState(
            instance_id, f"{instance_id} has an overlay over its root volume, so the root device cannot change now"
        )
    return replace(after, launch_time=before.launch_time, frozen=before.frozen)


def _check_not_terminating(instance: Instance) -> None:
    if instance.state in TERMINATING:
        raise IncorrectInstanceState(
            instance.instance_id, f"{instance.instance_id} is {instance.state} and cannot be used any more"
        )


def run_unless_done(command: Callable[[], object], *, unless: Callable[[], object], attempts: int = 1) -> None:
    """Give a command to libvirt; ignore its error if the wanted state is reached already.

    Args:
        command: The command.
        unless: Returns whether the wanted state is reached.
        attempts: With more than one, a failed command is repeated: the state may have been reached when the command
            failed, and have changed since.
    """
    for attempts_left in reversed(range(attempts)):
        try:
            command()
        except binding.load().libvirtError:
            if unless():
                return
            if not attempts_left:
                raise
        else:
            return
