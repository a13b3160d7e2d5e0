"""Merges an overlay into its root volume: a table of steps, and the class that performs them.

Each step is chosen from the state of the two definitions of the domain alone, so the merge resumes after a crash of the
driver, libvirt's daemon, QEMU or the host. libvirt's block commit writes the volume while the domain runs, qemu-img
while it is off. Both keep the overlay complete until the domain does not need it any more.
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
from thrave.compute.progress_timeout import Pause, report_progress
from thrave.compute.timeouts import check_command


class DiskLocation(StrEnum):
    """The image that the root disk of a definition uses."""

    NOWHERE = "there is no such definition"
    VOLUME = "the root volume itself"
    OVERLAY = "the overlay"
    ELSEWHERE = "another image"


class MergeStep(StrEnum):
    """The next step of a merge."""

    COMMIT_LIVE = "write the overlay into the volume and switch the running domain to the volume"
    COMMIT_OFF = "write the overlay into the volume, then define the volume as the disk"
    COMMIT_FILES = "write the overlay into the volume: the domain does not exist any more"
    REDEFINE = "define the volume as the disk: the running domain uses it already"
    CLEAN_UP = "remove the overlay and its metadata"
    REFUSE = "change nothing: another program has attached another image"


# (running definition, definition for the next start) -> next step. Complete: a test checks every pair.
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
    """The location of a definition's root disk, and the disk."""

    location: DiskLocation
    disk: Disk | None


def locate_root_disk(definition: DomainDefinition | None, volume: Path, overlay: Path) -> RootDisk:
    """Return which of `volume` and `overlay` the root disk of a definition uses. None: there is no definition."""
    if definition is None:
        return RootDisk(DiskLocation.NOWHERE, None)
    for path, location in ((overlay, DiskLocation.OVERLAY), (volume, DiskLocation.VOLUME)):
        for disk in definition.disks:
            if disk.path == path:
                return RootDisk(location, disk)
    return RootDisk(DiskLocation.ELSEWHERE, None)


def overlay_path(volume: Path, instance_id: str) -> Path:
    """Return the path of an overlay: in the folder of the volume, so that both are moved and lost together."""
    return volume.with_name(f".{volume.name}.thrave-{instance_id}.qcow2")


def obstacle_to_overlay(root: Disk) -> str | None:
    """Return why a root disk cannot have an overlay according to its definition; None if it can."""
    obstacles = (
        (root.path is None, "it is not a file of this host"),
        (root.kind != "file", "it is a block device, and the overlay has to be in the same folder"),
        (root.format not in {"raw", "qcow2"}, f"overlays cannot be merged into the format {root.format}"),
        (root.encrypted, "it is encrypted, and an overlay would hold the guest's data unencrypted"),
        (root.shareable, "it is shareable: other domains may write to it"),
        (root.readonly, "it is read-only"),
        (root.transient, "it is transient: the guest's writes are discarded"),
        (root.mirror is not None, "a block job is copying it"),
    )
    return next((reason for applies, reason in obstacles if applies), None)


_COMMIT = "active-commit"
_COMMITTED = "merged"  # suffix of an overlay that has been merged, so that no domain starts on it
_UNUSED = "left"  # suffix of an overlay that was not merged and that no definition names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LibvirtContext:
    """Objects of the libvirt driver that overlays use.

    Attributes:
        lock: Prevents a start through this service for the length of a block; raises InstanceLocked.
    """

    hypervisor: LibvirtConnection
    events: DomainEvents
    cache: DomainCache
    metadata: MetadataWriter
    lock: Callable[[str], AbstractContextManager[None]]

    def locate_disks(self, domain: Domain, volume: Path, overlay: Path) -> tuple[DomainSnapshot, RootDisk, RootDisk]:
        """Return a domain's current state, and its root disk in the running definition and in that of the next start.

        Raises:
            InvalidDescriptionError: Neither definition can be parsed.
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
        context: Objects of the driver.
        instance_id: The instance.
        overlay: As returned by `Overlays.plan`.
        pause: See `Overlays.merge`.
    """

    def __init__(self, context: LibvirtContext, instance_id: str, overlay: Overlay, pause: Pause) -> None:
        self._context = context
        self._instance_id = instance_id
        self._volume = DiskImage(overlay.volume.path, overlay.volume.format)
        self._overlay = overlay.overlay
        self._committed = overlay_files.with_suffix(overlay.overlay, _COMMITTED)
        self._pause = pause
        self._job_start_count: int | None = None
        self._min_remaining: int | None = None
        self._is_merged = False

    def step(self) -> bool:
        """Perform the next step and return whether it was the last.

        Raises:
            HypervisorError: The step failed; also if the domain was started or stopped since its state was read.
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
                raise HypervisorError(self._instance_id, self._unexpected_image(live, config))
        return False

    def _commit_live(self, domain: Domain, snapshot: DomainSnapshot, disk: Disk) -> None:
        """Start a block commit, report its progress, or switch the domain to the volume."""
        if disk.mirror is None:
            starts = self._context.events.history(snapshot.uuid).starts
            if self._job_start_count == starts:
                raise HypervisorError(
                    self._instance_id, f"the block commit of {disk.target} has failed; see libvirt's log"
                )
            check_command(self._instance_id)
            domain.blockCommit(disk.target, None, None, 0, Commit.ACTIVE | Commit.SHALLOW)
            self._job_start_count = starts
            report_progress(self._pause)
        elif disk.mirror.job != _COMMIT:
            raise HypervisorError(self._instance_id, f"{disk.target} is being copied by a block job of another program")
        elif disk.mirror.ready:
            with self._cpus_paused(domain, snapshot):
                check_command(self._instance_id)
                domain.blockJobAbort(disk.target, JobAbort.PIVOT)
                overlay_files.move(self._instance_id, self._overlay, self._committed)
            self._is_merged = True
            report_progress(self._pause)
        else:
            self._report_job_progress(domain, disk)

    def _report_job_progress(self, domain: Domain, disk: Disk) -> None:
        """Report progress if less data remains than ever before. Copying blocks that the guest rewrites is none."""
        try:
            job = domain.blockJobInfo(disk.target, 0)
        except binding.load().libvirtError:  # the guest has just died: the next step detects it
            return
        remaining = job.get("end", 0) - job.get("cur", 0)
        if self._min_remaining is None or remaining < self._min_remaining:
            self._min_remaining = remaining
            report_progress(self._pause)

    @contextmanager
    def _cpus_paused(self, domain: Domain, snapshot: DomainSnapshot) -> Iterator[None]:
        """Pause the CPUs of a running domain for the block, after recording that the driver did so.

        The pause takes a fraction of a second, until the overlay has its new name. Without it, a host that lost power
        after QEMU left the overlay, but before libvirt's record of that is on the disk, would start the guest on the
        overlay again: with older blocks than those that QEMU has confirmed to the guest as written. A domain that
        another program has paused stays paused.
        """
        frozen = None if snapshot.metadata is None else snapshot.metadata.frozen
        if frozen is None or not (snapshot.state == DomainState.RUNNING or _is_paused_by_driver(frozen, snapshot)):
            yield
            return
        if snapshot.state == DomainState.RUNNING:
            self._record_paused(domain, paused=True)
            domain.suspend()
        try:
            yield
        finally:
            domain.resume()
            self._record_paused(domain, paused=False)

    def _record_paused(self, domain: Domain, *, paused: bool) -> None:
        def with_paused(metadata: InstanceMetadata) -> InstanceMetadata:
            return replace(metadata, frozen=metadata.frozen and replace(metadata.frozen, paused=paused))

        self._context.metadata.change(domain, self._instance_id, with_paused)

    def _commit_off(self, connection: Connection, domain: Domain, disk: Disk) -> None:
        """Merge the files of a domain that is off.

        The overlay is renamed before the definition is changed. A start in between, or after a power failure that lost
        the change, then fails because the disk is missing, instead of running on an overlay that is removed later.
        """
        if domain.hasManagedSaveImage():
            raise HypervisorError(
                self._instance_id,
                f"{domain.name()} has a managed save image with the overlay as its disk: start it first",
            )
        with self._context.lock(self._instance_id):
            if self._exists(self._overlay):
                check_command(self._instance_id)
                overlay_files.commit(self._instance_id, self._overlay, self._pause)
                overlay_files.move(self._instance_id, self._overlay, self._committed)
            elif not self._exists(self._committed):
                raise HypervisorError(
                    self._instance_id,
                    f"{self._overlay} does not exist any more; the data that the guest wrote to it is lost",
                )
            if domain.isActive():  # it was started before the rename, and writes to the overlay
                overlay_files.move(self._instance_id, self._committed, self._overlay)
                return
            self._redefine(connection, domain, disk)
            self._is_merged = True

    def _commit_files(self) -> bool:
        check_command(self._instance_id)
        if self._exists(self._overlay):
            overlay_files.commit(self._instance_id, self._overlay, self._pause)
        self._remove()
        return True

    def _redefine(self, connection: Connection, domain: Domain, disk: Disk) -> None:
        """Define the volume as the disk of the next start."""
        with self._context.metadata.lock(self._instance_id), domain_errors_translated(domain, self._instance_id):
            xml = domain.XMLDesc(XmlFlag.INACTIVE | XmlFlag.SECURE)
            check_command(self._instance_id)
            connection.defineXML(without_overlay(xml, disk.target, None, volume=self._volume))
        overlay_files.sync_definitions()

    def _clean_up(self, domain: Domain, snapshot: DomainSnapshot) -> None:
        """Remove the overlay, then its metadata: as long as the file exists, the metadata names it."""
        check_command(self._instance_id)
        frozen = None if snapshot.metadata is None else snapshot.metadata.frozen
        if self._is_merged or _is(frozen, self._overlay) or not self._exists(self._overlay):
            self._remove()
        else:
            self._keep_unused_overlay()
        if frozen is not None and _is_paused_by_driver(frozen, snapshot):
            domain.resume()
        self._context.metadata.change(domain, self._instance_id, lambda metadata: replace(metadata, frozen=None))

    def _keep_unused_overlay(self) -> None:
        """Remove or rename an overlay that no definition names: attach was interrupted, or an operator detached it."""
        if overlay_files.is_empty(self._instance_id, self._overlay):
            self._remove()
            return
        kept = overlay_files.with_suffix(self._overlay, _UNUSED)
        log.warning("%s is not in the domain's metadata and was not merged; kept as %s", self._overlay, kept)
        overlay_files.move(self._instance_id, self._overlay, kept)

    def _exists(self, path: Path) -> bool:
        return overlay_files.exists(self._instance_id, path)

    def _remove(self) -> None:
        overlay_files.remove(self._instance_id, self._overlay)
        overlay_files.remove(self._instance_id, self._committed)

    def _unexpected_image(self, live: RootDisk, config: RootDisk) -> str:
        return (
            f"its root disk is on an image that is neither {self._volume.path} nor {self._overlay} (running: "
            f"{live.location}; the next time: {config.location}): merge that first"
        )


def _disk(root: RootDisk) -> Disk:
    assert root.disk is not None, "the location is VOLUME or OVERLAY"
    return root.disk


def _is(frozen: OverlayMetadata | None, overlay: Path) -> bool:
    return frozen is not None and frozen.overlay == overlay


def _is_paused_by_driver(frozen: OverlayMetadata, snapshot: DomainSnapshot) -> bool:
    """Return whether the driver paused the CPUs, perhaps before a crash."""
    return frozen.paused and snapshot.state == DomainState.PAUSED
