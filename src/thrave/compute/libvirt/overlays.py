"""Overlays over the root disks of libvirt domains: attached while a domain is off, merged while it runs.

`attach` changes the domain's definition once: the change names the overlay as the disk and records it in our metadata.
From then on the disks of the two definitions show how far the work is, and `overlay_merge.py` resumes from there after
any crash. While an overlay is attached nothing writes to the volume below it; libvirt is asked whether that holds.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from thrave.compute.base import Overlay, VolumeHold
from thrave.compute.errors import (
    HoldLostError,
    HypervisorError,
    HypervisorUnavailable,
    ImageInUseError,
    IncorrectInstanceState,
    OverlayNotSupported,
    RootVolumeInUse,
)
from thrave.compute.libvirt import overlay_files
from thrave.compute.libvirt.binding import Connection, Domain, XmlFlag
from thrave.compute.libvirt.domain_cache import (
    DomainSnapshot,
    domain_errors_translated,
    read_metadata,
    require_instance,
)
from thrave.compute.libvirt.domain_metadata import OverlayMetadata
from thrave.compute.libvirt.domain_xml import Disk, DiskImage, with_overlay, without_overlay
from thrave.compute.libvirt.instance_mapping import is_power_loss, root_disk
from thrave.compute.libvirt.overlay_merge import (
    DiskLocation,
    LibvirtContext,
    OverlayMerge,
    obstacle_to_overlay,
    overlay_path,
)
from thrave.compute.timeouts import call_with_timeout, check_command, command_with_timeout, with_timeout
from thrave.concurrency import monotonic

POLL_INTERVAL = 0.2  # seconds
MERGE_RETRY_TIMEOUT = 60.0  # seconds to wait for a daemon that restarts, or for another program to close an image
_MAX_NAME_BYTES = 255  # bytes of a file's name, NAME_MAX

# Locations of the running and the defined root disk while the volume below may be read.
_ON_OVERLAY = frozenset(
    {
        (DiskLocation.OVERLAY, DiskLocation.OVERLAY),
        (DiskLocation.OVERLAY, DiskLocation.NOWHERE),
        (DiskLocation.NOWHERE, DiskLocation.OVERLAY),
    }
)


class LibvirtOverlays:
    """See `Overlays` for the contract."""

    def __init__(self, context: LibvirtContext) -> None:
        """Use the libvirt objects of the driver."""
        self._context = context

    @with_timeout
    def plan(self, instance_id: str) -> Overlay:
        """See `Overlays`. The overlay is in the folder of the volume."""
        with self._context.hypervisor.session(instance_id) as connection:
            domain = self._context.cache.find(connection, instance_id)
            snapshot = self._context.cache.refresh(domain)
            volume = require_instance(snapshot).root_volume
            if snapshot.metadata is not None and snapshot.metadata.frozen is not None:
                return Overlay(volume, snapshot.metadata.frozen.overlay)
            root = root_disk(snapshot.definition, snapshot.metadata)
            overlay = overlay_path(volume.path, instance_id)
            reason = obstacle_to_overlay(root) or _obstacle(connection, domain, snapshot, volume.path, overlay)
            if reason is not None:
                raise OverlayNotSupported(instance_id, f"its root disk {root.target} cannot have an overlay: {reason}")
            return Overlay(volume, overlay)

    @command_with_timeout
    def attach(self, instance_id: str, overlay: Overlay) -> None:
        """Create the overlay, then change the definition. A domain that is on its overlay is not changed."""
        with self._context.lock(instance_id), self._context.hypervisor.session(instance_id) as connection:
            domain = self._context.cache.find(connection, instance_id)
            _, live, config = self._context.locate_disks(domain, overlay.volume.path, overlay.overlay)
            if (live.location, config.location) in _ON_OVERLAY:
                return
            if live.location is not DiskLocation.NOWHERE:
                raise IncorrectInstanceState(
                    instance_id, f"{instance_id} is running: an overlay can be attached only while it is off"
                )
            if config.disk is None or config.location is not DiskLocation.VOLUME:
                raise HypervisorError(
                    instance_id, f"its root disk is on {config.location}, not on {overlay.volume.path}"
                )
            self._check_overlay_is_unused(instance_id, overlay)
            check_command(instance_id)
            overlay_files.create(instance_id, overlay.overlay, _volume(overlay))
            self._define_with_overlay(connection, domain, instance_id, config.disk, overlay)
            _, live, _ = self._context.locate_disks(domain, overlay.volume.path, overlay.overlay)
            if live.location is DiskLocation.VOLUME:
                self._undo_attach(connection, domain, instance_id, config.disk, overlay)
                raise IncorrectInstanceState(instance_id, f"{instance_id} was started while its overlay was attached")

    @contextmanager
    def hold_attached(self, instance_id: str, overlay: Overlay) -> Iterator[VolumeHold]:
        """See `Overlays`. Takes no lock: the instance may be stopped and started on its overlay."""
        hold = OverlayHold(self._context, instance_id, overlay)
        hold.check()
        yield hold

    @with_timeout
    def has_lost_power(self, instance_id: str) -> bool:
        """See `Overlays`. Uses the reason that libvirt returns, or that came with the last event."""
        with self._context.hypervisor.session(instance_id) as connection:
            snapshot = self._context.cache.refresh(self._context.cache.find(connection, instance_id))
            history = self._context.events.history(snapshot.uuid)
            return snapshot.live is None and is_power_loss(snapshot.reason, history.stopped)

    def merge(self, instance_id: str, overlay: Overlay, pause: Callable[[float], object]) -> None:
        """See `Overlays`. Retries for a minute while the daemon restarts or another program has an image open."""
        merge = OverlayMerge(self._context, instance_id, overlay, pause)
        with self._context.metadata.lock_merge(instance_id):
            last_step, failed = monotonic(), False
            # Not `retry`: this loop also waits after each successful step, and accepts one error of any kind.
            while True:
                try:
                    if merge.step():
                        return
                    last_step, failed = monotonic(), False
                except (HypervisorUnavailable, ImageInUseError) as error:
                    if monotonic() - last_step > MERGE_RETRY_TIMEOUT:
                        error.waited = monotonic() - last_step
                        raise
                except HypervisorError:
                    if failed:  # libvirt may still list a guest that has just died: poll once more
                        raise
                    failed = True
                pause(POLL_INTERVAL)

    def _check_overlay_is_unused(self, instance_id: str, overlay: Overlay) -> None:
        """Refuse if the overlay's file contains data. An empty one, of an interrupted call, is created again."""
        path = overlay.overlay
        if overlay_files.exists(instance_id, path) and not overlay_files.is_empty(instance_id, path):
            raise HypervisorError(instance_id, f"{path} already exists and contains data: merge it or move it away")

    def _define_with_overlay(
        self, connection: Connection, domain: Domain, instance_id: str, disk: Disk, overlay: Overlay
    ) -> None:
        volume = overlay.volume
        added = OverlayMetadata(
            path=volume.path, format=volume.format, overlay=overlay.overlay, secret_file=volume.secret_file
        )
        with self._context.metadata.lock(instance_id), domain_errors_translated(domain, instance_id):
            metadata = read_metadata(domain, instance_id)
            changed = with_overlay(
                domain.XMLDesc(XmlFlag.INACTIVE | XmlFlag.SECURE),
                disk.target,
                metadata and replace(metadata, frozen=added),
                volume=_volume(overlay),
                overlay=DiskImage(overlay.overlay, "qcow2"),
            )
            check_command(instance_id)
            connection.defineXML(changed)
        overlay_files.sync_definitions()

    def _undo_attach(
        self, connection: Connection, domain: Domain, instance_id: str, disk: Disk, overlay: Overlay
    ) -> None:
        with self._context.metadata.lock(instance_id), domain_errors_translated(domain, instance_id):
            metadata = read_metadata(domain, instance_id)
            xml = domain.XMLDesc(XmlFlag.INACTIVE | XmlFlag.SECURE)
            without_overlay_metadata = metadata and replace(metadata, frozen=None)
            check_command(instance_id)
            connection.defineXML(without_overlay(xml, disk.target, without_overlay_metadata, volume=_volume(overlay)))
        overlay_files.remove(instance_id, overlay.overlay)


class OverlayHold:
    """The `VolumeHold` of an instance that runs on its overlay, or will from its next start."""

    def __init__(self, context: LibvirtContext, instance_id: str, overlay: Overlay) -> None:
        self._context = context
        self._instance_id = instance_id
        self._overlay = overlay
        self._jobs: int | None = None
        self._disconnects = context.events.disconnects

    def check(self) -> None:
        """Check the location of the root disk, and that no block job writes to the volume."""
        call_with_timeout(self._instance_id, self._check)

    def _check(self) -> None:
        with self._context.hypervisor.session(self._instance_id) as connection:
            domain = self._context.cache.find(connection, self._instance_id)
            snapshot, live, config = self._context.locate_disks(
                domain, self._overlay.volume.path, self._overlay.overlay
            )
        if (live.location, config.location) not in _ON_OVERLAY:
            raise self._in_use(f"runs on {live.location} and will be started on {config.location}")
        if live.disk is not None and live.disk.mirror is not None:
            raise self._in_use(f"has a block job on {live.disk.target}")
        disk = live.disk or config.disk
        self._count_jobs(snapshot.uuid, "" if disk is None else disk.target)

    def _count_jobs(self, uuid: str, target: str) -> None:
        jobs = self._context.events.history(uuid).jobs.get(target, 0)
        disconnects = self._context.events.disconnects
        if self._jobs is None:  # the first check; it may have opened the connection
            self._disconnects = disconnects
        elif jobs != self._jobs:
            raise self._in_use(f"had a block job on {target}")
        elif disconnects != self._disconnects:
            raise HoldLostError(
                self._instance_id,
                f"the connection to libvirt was lost: {self._instance_id} may have had a block job in the meantime",
            )
        self._jobs = jobs

    def _in_use(self, what: str) -> RootVolumeInUse:
        return RootVolumeInUse(self._instance_id, f"{self._instance_id} {what} while its root volume is read")


def _obstacle(
    connection: Connection, domain: Domain, snapshot: DomainSnapshot, volume: Path, overlay: Path
) -> str | None:
    """Return why libvirt or the disk does not allow an overlay over a root disk; None if both allow it."""
    if connection.getType() != "QEMU":
        return f"the hypervisor is {connection.getType()}"
    if snapshot.config is None:
        return "the domain is transient"
    if domain.hasManagedSaveImage():
        return "the domain has a managed save image, which names its disk (virsh managedsave)"
    if domain.listAllCheckpoints():
        return "the domain has checkpoints; libvirt does not merge overlays of such domains"
    return _obstacle_in_folder(volume, overlay)


def _obstacle_in_folder(volume: Path, overlay: Path) -> str | None:
    if len(os.fsencode(overlay.name)) > _MAX_NAME_BYTES:
        return "the file name is too long for an overlay in the same folder"
    try:
        regular = stat.S_ISREG(volume.stat().st_mode)
    except OSError as error:
        return f"{volume}: {os.strerror(error.errno or 0)}"
    return None if regular else f"{volume} is not a regular file"


def _volume(overlay: Overlay) -> DiskImage:
    return DiskImage(overlay.volume.path, overlay.volume.format)
