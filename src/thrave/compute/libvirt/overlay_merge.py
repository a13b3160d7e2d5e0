"""Where an overlay's merging stands, told by what is there, and what the next step is. Pure: one table.

A domain has up to two definitions: of the one that runs, and what it is started from the next time. Each has its root
disk on the volume, on the overlay over it, or on something else. From that alone every step follows, whoever began and
was cut off before: the driver, libvirt's daemon, QEMU or the host. The table is complete; a test walks all of it.

The merging of one overlay: step after step by the table in `overlay_steps.py`, until nothing is left of it.

A step looks at what is there and does the next thing, or nothing if that only takes its time. None of them relies on
what this process remembers, so that any may be the first after a crash. The volume is written to by libvirt's block
commit while the domain runs, and by qemu-img while it is off; both leave the overlay whole until the domain does not
need it any more.

For the moment in which a running domain leaves its overlay its CPUs stand still, a fraction of a second, until the
overlay has another name. Otherwise a host that lost its power just then, when QEMU has left it and what libvirt
has written down of that is not on the disk yet, would start the guest on the overlay again, and with it on blocks that
are older than what the guest had been told was on the disk.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from thrave.compute.base import Overlay
from thrave.compute.errors import HypervisorError, InstanceNotFound
from thrave.compute.libvirt import binding, overlay_files
from thrave.compute.libvirt.binding import Commit, Connection, Domain, DomainState, JobAbort, XmlFlag
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection
from thrave.compute.libvirt.domain_cache import DomainCache, DomainSnapshot, MetadataWriter, domain_errors_translated
from thrave.compute.libvirt.domain_metadata import InstanceMetadata, OverlayMetadata
from thrave.compute.libvirt.domain_xml import Disk, DiskImage, DomainDefinition, without_overlay
from thrave.compute.timeouts import Pause, check_command, report_progress


class DiskLocation(StrEnum):
    """What a definition's root disk is on."""

    NOWHERE = "there is no such definition"
    VOLUME = "the root volume itself"
    OVERLAY = "the overlay"
    ELSEWHERE = "another image"


class MergeStep(StrEnum):
    """What is to be done next."""

    COMMIT_LIVE = "have the running domain write the overlay into the volume and leave it"
    COMMIT_OFF = "write the overlay into the volume, then have the domain start from that"
    COMMIT_FILES = "write the overlay into the volume: there is no domain any more"
    REDEFINE = "have the domain start from the volume, which the running one is on already"
    CLEAN_UP = "remove the overlay and forget it"
    REFUSE = "leave everything as it is: somebody else has put another image there"


# (running domain, what it is started from the next time) -> what to do
MERGING: dict[tuple[DiskLocation, DiskLocation], MergeStep] = {
    (DiskLocation.NOWHERE, DiskLocation.NOWHERE): MergeStep.COMMIT_FILES,
    (DiskLocation.NOWHERE, DiskLocation.VOLUME): MergeStep.CLEAN_UP,
    (DiskLocation.NOWHERE, DiskLocation.OVERLAY): MergeStep.COMMIT_OFF,
    (DiskLocation.NOWHERE, DiskLocation.ELSEWHERE): MergeStep.REFUSE,
    (DiskLocation.VOLUME, DiskLocation.NOWHERE): MergeStep.CLEAN_UP,
    (DiskLocation.VOLUME, DiskLocation.VOLUME): MergeStep.CLEAN_UP,
    (DiskLocation.VOLUME, DiskLocation.OVERLAY): MergeStep.REDEFINE,
    (DiskLocation.VOLUME, DiskLocation.ELSEWHERE): MergeStep.REFUSE,
    (DiskLocation.OVERLAY, DiskLocation.NOWHERE): MergeStep.COMMIT_LIVE,
    (DiskLocation.OVERLAY, DiskLocation.VOLUME): MergeStep.COMMIT_LIVE,
    (DiskLocation.OVERLAY, DiskLocation.OVERLAY): MergeStep.COMMIT_LIVE,
    (DiskLocation.OVERLAY, DiskLocation.ELSEWHERE): MergeStep.COMMIT_LIVE,
    (DiskLocation.ELSEWHERE, DiskLocation.NOWHERE): MergeStep.REFUSE,
    (DiskLocation.ELSEWHERE, DiskLocation.VOLUME): MergeStep.REFUSE,
    (DiskLocation.ELSEWHERE, DiskLocation.OVERLAY): MergeStep.REFUSE,
    (DiskLocation.ELSEWHERE, DiskLocation.ELSEWHERE): MergeStep.REFUSE,
}


class RootDisk(NamedTuple):
    """What a definition's root disk is on, and which disk that is."""

    location: DiskLocation
    disk: Disk | None


def locate_root_disk(definition: DomainDefinition | None, volume: Path, overlay: Path) -> RootDisk:
    """What the root disk is on, for which there was the `volume` and an `overlay` over it; None is no definition."""
    if definition is None:
        return RootDisk(DiskLocation.NOWHERE, None)
    for path, stand in ((overlay, DiskLocation.OVERLAY), (volume, DiskLocation.VOLUME)):
        for disk in definition.disks:
            if disk.path == path:
                return RootDisk(stand, disk)
    return RootDisk(DiskLocation.ELSEWHERE, None)


def overlay_path(volume: Path, instance_id: str) -> Path:
    """Where the overlay over an instance's root volume goes: beside it, so that both are moved and lost together."""
    return volume.with_name(f".{volume.name}.thrave-{instance_id}.qcow2")


def obstacle_to_overlay(root: Disk) -> str | None:
    """Why a root disk cannot have an overlay, by its definition; None if that does not forbid it."""
    obstacles = (
        (root.path is None, "it is no file of this host"),
        (root.kind != "file", "it is a block device, beside which no file can be put"),
        (root.format not in {"raw", "qcow2"}, f"an overlay is not merged into the format {root.format}"),
        (root.encrypted, "it is encrypted, and what the guest writes would stand in an overlay in the clear"),
        (root.shareable, "it is shareable: other domains may write to it"),
        (root.readonly, "it is read-only"),
        (root.transient, "it is transient: what the guest writes is not to be kept"),
        (root.mirror is not None, "a block job is copying it"),
    )
    return next((reason for applies, reason in obstacles if applies), None)


_COMMIT = "active-commit"


_COMMITTED = "merged"  # what an overlay is called when it is in the volume, so that nothing is started on it any more


_LEFT = "left"


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LibvirtContext:
    """What is needed of a host that has libvirt.

    Attributes:
        lock: Keeps an instance from being started through us, for the length of a block; raises InstanceHeld.
    """

    hypervisor: LibvirtConnection
    events: DomainEvents
    cache: DomainCache
    metadata: MetadataWriter
    lock: Callable[[str], AbstractContextManager[None]]

    def locate_disks(self, domain: Domain, volume: Path, overlay: Path) -> tuple[DomainSnapshot, RootDisk, RootDisk]:
        """A domain as it is now, and where its disks stand: as it runs, and as it is started the next time.

        Raises:
            InvalidDescriptionError: That cannot be understood.
        """
        snapshot = self.cache.refresh(domain)
        if snapshot.fault is not None and snapshot.live is None and snapshot.config is None:
            raise snapshot.fault
        return (
            snapshot,
            locate_root_disk(snapshot.live, volume, overlay),
            locate_root_disk(snapshot.config, volume, overlay),
        )


class OverlayMerge:
    """One call of `Overlays.merge`.

    Args:
        host: Where it is.
        instance_id: The instance.
        frozen: Its volume, and the overlay over it.
        pause: See `Overlays.merge`.
    """

    def __init__(self, context: LibvirtContext, instance_id: str, frozen: Overlay, pause: Pause) -> None:
        self._context = context
        self._instance_id = instance_id
        self._volume = DiskImage(frozen.volume.path, frozen.volume.format)
        self._overlay = frozen.overlay
        self._committed = overlay_files.with_suffix(frozen.overlay, _COMMITTED)
        self._pause = pause
        self._job_of_start: int | None = None
        self._least_left: int | None = None
        self._is_merged = False

    def step(self) -> bool:
        """Take the next step; whether it was the last.

        Raises:
            HypervisorError: It cannot be taken; also if the domain has gone on or off since it was looked at.
        """
        check_command(self._instance_id)
        try:
            with self._context.hypervisor.session(self._instance_id) as connection:
                return self._step(connection, self._context.cache.find(connection, self._instance_id))
        except InstanceNotFound:
            return self._commit_files()

    def _step(self, connection: Connection, domain: Domain) -> bool:
        snapshot, live, config = self._context.locate_disks(domain, self._volume.path, self._overlay)
        match MERGING[live.location, config.location]:
            case MergeStep.COMMIT_FILES:
                return self._commit_files()
            case MergeStep.COMMIT_LIVE:
                self._commit_live(domain, snapshot, _disk(live))
            case MergeStep.COMMIT_OFF:
                self._commit_off(connection, domain, _disk(config))
            case MergeStep.REDEFINE:
                self._redefine(connection, domain, _disk(config))
            case MergeStep.CLEAN_UP:
                self._clean_up(domain, snapshot)
                return True
            case MergeStep.REFUSE:
                raise HypervisorError(self._instance_id, self._strange(live, config))
        return False

    def _commit_live(self, domain: Domain, snapshot: DomainSnapshot, disk: Disk) -> None:
        """Begin a block commit, wait for one, or have the domain leave the overlay."""
        if disk.mirror is None:
            starts = self._context.events.history(snapshot.uuid).starts
            if self._job_of_start == starts:
                raise HypervisorError(
                    self._instance_id, f"the block commit of {disk.target} has failed: libvirt's log says why"
                )
            check_command(self._instance_id)
            domain.blockCommit(disk.target, None, None, 0, Commit.ACTIVE | Commit.SHALLOW)
            self._job_of_start = starts
            report_progress(self._pause)
        elif disk.mirror.job != _COMMIT:
            raise HypervisorError(self._instance_id, f"{disk.target} is being copied by somebody else's block job")
        elif disk.mirror.ready:
            with self._standing_still(domain, snapshot):
                check_command(self._instance_id)
                domain.blockJobAbort(disk.target, JobAbort.PIVOT)
                overlay_files.move(self._instance_id, self._overlay, self._committed)
            self._is_merged = True
            report_progress(self._pause)
        else:
            self._see_progress(domain, disk)

    def _see_progress(self, domain: Domain, disk: Disk) -> None:
        """A job gets on if less is left than ever before: one that copies what the guest writes anew does not."""
        try:
            job = domain.blockJobInfo(disk.target, 0)
        except binding.load().libvirtError:  # the guest has just died: the next step sees that
            return
        left = job.get("end", 0) - job.get("cur", 0)
        if self._least_left is None or left < self._least_left:
            self._least_left = left
            report_progress(self._pause)

    @contextmanager
    def _standing_still(self, domain: Domain, snapshot: DomainSnapshot) -> Iterator[None]:
        """Stop the CPUs of a running domain, having written down that it was us; one that stands still stays so."""
        frozen = None if snapshot.metadata is None else snapshot.metadata.frozen
        if frozen is None or not (snapshot.state == DomainState.RUNNING or _stands_still_for_us(frozen, snapshot)):
            yield
            return
        if snapshot.state == DomainState.RUNNING:
            self._note_paused(domain, paused=True)
            domain.suspend()
        try:
            yield
        finally:
            domain.resume()
            self._note_paused(domain, paused=False)

    def _note_paused(self, domain: Domain, *, paused: bool) -> None:
        def noted(record: InstanceMetadata) -> InstanceMetadata:
            return replace(record, frozen=record.frozen and replace(record.frozen, paused=paused))

        self._context.metadata.change(domain, self._instance_id, noted)

    def _commit_off(self, connection: Connection, domain: Domain, disk: Disk) -> None:
        """Merge the files of a domain that is off, so that it can be started on no more than it was merged from.

        The overlay gets another name before the definition is changed: whoever starts the domain in between, or after
        the host has lost its power and with it that change, finds no disk, rather than one that is thrown away.
        """
        if domain.hasManagedSaveImage():
            raise HypervisorError(
                self._instance_id,
                f"the memory of {domain.name()} is saved, with the overlay as its disk: start it first",
            )
        with self._context.lock(self._instance_id):
            if self._is_there(self._overlay):
                check_command(self._instance_id)
                overlay_files.commit(self._instance_id, self._overlay, self._pause)
                overlay_files.move(self._instance_id, self._overlay, self._committed)
            elif not self._is_there(self._committed):
                raise HypervisorError(
                    self._instance_id, f"{self._overlay} is gone, and with it what the guest has written there"
                )
            if domain.isActive():  # it was started before the name was changed, and goes on writing there
                overlay_files.move(self._instance_id, self._committed, self._overlay)
                return
            self._redefine(connection, domain, disk)
            self._is_merged = True

    def _commit_files(self) -> bool:
        check_command(self._instance_id)
        if self._is_there(self._overlay):
            overlay_files.commit(self._instance_id, self._overlay, self._pause)
        self._remove()
        return True

    def _redefine(self, connection: Connection, domain: Domain, disk: Disk) -> None:
        """Have the domain start from the volume the next time."""
        with self._context.metadata.lock(self._instance_id), domain_errors_translated(domain, self._instance_id):
            xml = domain.XMLDesc(XmlFlag.INACTIVE | XmlFlag.SECURE)
            check_command(self._instance_id)
            connection.defineXML(without_overlay(xml, disk.target, None, volume=self._volume))
        overlay_files.sync_definitions()

    def _clean_up(self, domain: Domain, snapshot: DomainSnapshot) -> None:
        """Remove the overlay, then what is said of it: so nothing is left of it when nothing says so any more."""
        check_command(self._instance_id)
        frozen = None if snapshot.metadata is None else snapshot.metadata.frozen
        if self._is_merged or _is(frozen, self._overlay) or not self._is_there(self._overlay):
            self._remove()
        else:
            self._put_away()
        if frozen is not None and _stands_still_for_us(frozen, snapshot):
            domain.resume()
        self._context.metadata.change(domain, self._instance_id, lambda record: replace(record, frozen=None))

    def _put_away(self) -> None:
        """An overlay that no definition speaks of: made for one that never was, or taken out of it by hand."""
        if overlay_files.is_empty(self._instance_id, self._overlay):
            self._remove()
            return
        left = overlay_files.with_suffix(self._overlay, _LEFT)
        log.warning("%s was not merged, since nothing says that it should be: it is kept as %s", self._overlay, left)
        overlay_files.move(self._instance_id, self._overlay, left)

    def _is_there(self, path: Path) -> bool:
        return overlay_files.exists(self._instance_id, path)

    def _remove(self) -> None:
        overlay_files.remove(self._instance_id, self._overlay)
        overlay_files.remove(self._instance_id, self._committed)

    def _strange(self, live: RootDisk, config: RootDisk) -> str:
        return (
            f"its root disk is on an image that is neither {self._volume.path} nor {self._overlay} (running: "
            f"{live.location}; the next time: {config.location}): merge that first"
        )


def _disk(standing: RootDisk) -> Disk:
    assert standing.disk is not None, "a disk that stands somewhere"
    return standing.disk


def _is(frozen: OverlayMetadata | None, overlay: Path) -> bool:
    return frozen is not None and frozen.overlay == overlay


def _stands_still_for_us(frozen: OverlayMetadata, snapshot: DomainSnapshot) -> bool:
    """Whether it was the driver that has stopped the CPUs, perhaps before a crash."""
    return frozen.paused and snapshot.state == DomainState.PAUSED
