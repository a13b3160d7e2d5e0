"""Overlays over the root disks of libvirt's domains: put on while a domain is off, merged while it runs.

An overlay is put on by one change of the domain's definition, which names it as the disk and notes it in our
metadata. From then on where the domain's disks stand says how far everything is, and `merging.py` goes on from there,
whatever has died. While an overlay is on, the volume below is written to by nobody, and libvirt and QEMU are asked
whether that is so.
"""

import os
import stat
import time
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
from thrave.compute.timeouts import call_with_deadline, check_command, command_with_timeout, with_timeout

LOOK_AGAIN = 0.2  # seconds
PATIENCE = 60.0  # seconds for which a daemon that is being started anew, or the end of a program, is waited for
_LONGEST_NAME = 255  # bytes of a file's name, NAME_MAX

# What a running and a defined root disk may be on while the volume below is read.
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
        """Put overlays over the root disks of a host's domains."""
        self._context = context

    @with_timeout
    def plan(self, instance_id: str) -> Overlay:
        """The overlay stands beside the volume."""
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
                raise OverlayNotSupported(instance_id, f"its root disk {root.target} can have no overlay: {reason}")
            return Overlay(volume, overlay)

    @command_with_timeout
    def attach(self, instance_id: str, frozen: Overlay) -> None:
        """Make the overlay, then change the definition. One that is on its overlay already is left alone."""
        with self._context.lock(instance_id), self._context.hypervisor.session(instance_id) as connection:
            domain = self._context.cache.find(connection, instance_id)
            _, live, config = self._context.locate_disks(domain, frozen.volume.path, frozen.overlay)
            if (live.location, config.location) in _ON_OVERLAY:
                return
            if live.location is not DiskLocation.NOWHERE:
                raise IncorrectInstanceState(instance_id, f"{instance_id} runs: it can be frozen when it is off")
            if config.disk is None or config.location is not DiskLocation.VOLUME:
                raise HypervisorError(
                    instance_id, f"its root disk is on {config.location}, not on {frozen.volume.path}"
                )
            self._make_way_for(instance_id, frozen)
            check_command(instance_id)
            overlay_files.create(instance_id, frozen.overlay, _volume(frozen))
            self._put_on(connection, domain, instance_id, config.disk, frozen)
            _, live, _ = self._context.locate_disks(domain, frozen.volume.path, frozen.overlay)
            if live.location is DiskLocation.VOLUME:
                self._take_off(connection, domain, instance_id, config.disk, frozen)
                raise IncorrectInstanceState(instance_id, f"{instance_id} was started while it was to be frozen")

    @contextmanager
    def hold_attached(self, instance_id: str, frozen: Overlay) -> Iterator[VolumeHold]:
        """Hold nothing, but look: the instance may be stopped and started on its overlay."""
        hold = OverlayHold(self._context, instance_id, frozen)
        hold.check()
        yield hold

    @with_timeout
    def has_lost_power(self, instance_id: str) -> bool:
        """By the reason that libvirt has, or has told."""
        with self._context.hypervisor.session(instance_id) as connection:
            snapshot = self._context.cache.refresh(self._context.cache.find(connection, instance_id))
            told = self._context.events.history(snapshot.uuid)
            return snapshot.live is None and is_power_loss(snapshot.reason, told.stopped)

    def merge(self, instance_id: str, frozen: Overlay, pause: Callable[[float], object]) -> None:
        """Step by step. While a daemon is started anew, or another program has an image, it is tried for a minute."""
        merging = OverlayMerge(self._context, instance_id, frozen, pause)
        with self._context.metadata.lock_merge(instance_id):
            stepped, failed = time.monotonic(), False
            # Not `retry`: this loop also waits after each successful step, and accepts one error of any kind.
            while True:
                try:
                    if merging.step():
                        return
                    stepped, failed = time.monotonic(), False
                except (HypervisorUnavailable, ImageInUseError) as error:
                    if time.monotonic() - stepped > PATIENCE:
                        error.waited = time.monotonic() - stepped
                        raise
                except HypervisorError:
                    if failed:  # a guest that has just died is one to libvirt a moment longer: it is looked at again
                        raise
                    failed = True
                pause(LOOK_AGAIN)

    def _make_way_for(self, instance_id: str, frozen: Overlay) -> None:
        """One that was made for a definition that never was is made anew; any other is not touched."""
        overlay = frozen.overlay
        if overlay_files.exists(instance_id, overlay) and not overlay_files.is_empty(instance_id, overlay):
            raise HypervisorError(
                instance_id, f"{overlay} is there already, and something was written to it: merge it, or move it"
            )

    def _put_on(self, connection: Connection, domain: Domain, instance_id: str, disk: Disk, frozen: Overlay) -> None:
        volume = frozen.volume
        noted = OverlayMetadata(
            path=volume.path, format=volume.format, overlay=frozen.overlay, secret_file=volume.secret_file
        )
        with self._context.metadata.lock(instance_id), domain_errors_translated(domain, instance_id):
            record = read_metadata(domain, instance_id)
            changed = with_overlay(
                domain.XMLDesc(XmlFlag.INACTIVE | XmlFlag.SECURE),
                disk.target,
                record and replace(record, frozen=noted),
                volume=_volume(frozen),
                overlay=DiskImage(frozen.overlay, "qcow2"),
            )
            check_command(instance_id)
            connection.defineXML(changed)
        overlay_files.sync_definitions()

    def _take_off(self, connection: Connection, domain: Domain, instance_id: str, disk: Disk, frozen: Overlay) -> None:
        with self._context.metadata.lock(instance_id), domain_errors_translated(domain, instance_id):
            record = read_metadata(domain, instance_id)
            xml = domain.XMLDesc(XmlFlag.INACTIVE | XmlFlag.SECURE)
            unfrozen = record and replace(record, frozen=None)
            check_command(instance_id)
            connection.defineXML(without_overlay(xml, disk.target, unfrozen, volume=_volume(frozen)))
        overlay_files.remove(instance_id, frozen.overlay)


class OverlayHold:
    """An instance that is on its overlay, or off and will be."""

    def __init__(self, context: LibvirtContext, instance_id: str, frozen: Overlay) -> None:
        self._context = context
        self._instance_id = instance_id
        self._frozen = frozen
        self._jobs: int | None = None
        self._lost = context.events.disconnects

    def check(self) -> None:
        """Ask libvirt where the disk stands, and whether anything is being written into the volume."""
        call_with_deadline(self._instance_id, self._check)

    def _check(self) -> None:
        with self._context.hypervisor.session(self._instance_id) as connection:
            domain = self._context.cache.find(connection, self._instance_id)
            snapshot, live, config = self._context.locate_disks(domain, self._frozen.volume.path, self._frozen.overlay)
        if (live.location, config.location) not in _ON_OVERLAY:
            raise self._in_use(f"runs on {live.location} and will be started on {config.location}")
        if live.disk is not None and live.disk.mirror is not None:
            raise self._in_use(f"has a block job on {live.disk.target}")
        disk = live.disk or config.disk
        self._count_jobs(snapshot.uuid, "" if disk is None else disk.target)

    def _count_jobs(self, uuid: str, target: str) -> None:
        jobs = self._context.events.history(uuid).jobs.get(target, 0)
        lost = self._context.events.disconnects
        if self._jobs is None:  # the first look; it may have made the connection
            self._lost = lost
        elif jobs != self._jobs:
            raise self._in_use(f"had a block job on {target}")
        elif lost != self._lost:
            raise HoldLostError(
                self._instance_id,
                f"the connection to libvirt was lost: {self._instance_id} may have had a block job meanwhile",
            )
        self._jobs = jobs

    def _in_use(self, what: str) -> RootVolumeInUse:
        return RootVolumeInUse(self._instance_id, f"{self._instance_id} {what} while its root volume is read")


def _obstacle(
    connection: Connection, domain: Domain, snapshot: DomainSnapshot, volume: Path, overlay: Path
) -> str | None:
    """Why a domain can have no overlay over its root disk, by what libvirt and the disk say; None if it can."""
    if connection.getType() != "QEMU":
        return f"the hypervisor is {connection.getType()}"
    if snapshot.config is None:
        return "the domain is transient"
    if domain.hasManagedSaveImage():
        return "the memory of the domain is saved, with the disk that it had (virsh managedsave)"
    if domain.listAllCheckpoints():
        return "the domain has checkpoints, with which libvirt does not merge"
    return _obstacle_in_folder(volume, overlay)


def _obstacle_in_folder(volume: Path, overlay: Path) -> str | None:
    if len(os.fsencode(overlay.name)) > _LONGEST_NAME:
        return "its name is too long for an overlay beside it"
    try:
        regular = stat.S_ISREG(volume.stat().st_mode)
    except OSError as error:
        return f"{volume}: {os.strerror(error.errno or 0)}"
    return None if regular else f"{volume} is no regular file"


def _volume(frozen: Overlay) -> DiskImage:
    return DiskImage(frozen.volume.path, frozen.volume.format)
