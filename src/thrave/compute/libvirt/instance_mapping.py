"""Maps a libvirt domain to an EC2 instance: id, root volume, state, architecture. Mostly tables; calls nothing."""

import hashlib
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import UUID

from thrave.compute.errors import InvalidDomainError
from thrave.compute.instance import Instance, InstanceState, OffReason, VolumeFile
from thrave.compute.libvirt.binding import DomainState, ShutoffReason, StoppedDetail
from thrave.compute.libvirt.domain_metadata import InstanceMetadata, RootDeviceType
from thrave.compute.libvirt.domain_xml import Disk, DomainDefinition

# A domain that has its disks open counts as running, even if its CPUs are paused. `SHUTDOWN`: the guest has powered
# off, but its process has not ended yet. `CRASHED`: the guest has panicked, and its process is kept.
STATES: dict[int, InstanceState] = {
    DomainState.NOSTATE: InstanceState.RUNNING,
    DomainState.RUNNING: InstanceState.RUNNING,
    DomainState.BLOCKED: InstanceState.RUNNING,
    DomainState.PAUSED: InstanceState.RUNNING,
    DomainState.SHUTDOWN: InstanceState.STOPPING,
    DomainState.SHUTOFF: InstanceState.STOPPED,
    DomainState.CRASHED: InstanceState.RUNNING,
    DomainState.PMSUSPENDED: InstanceState.RUNNING,
}

# Why a domain is off. `UNKNOWN`: the daemon was started after the domain was off, for example after a restart of the
# host. `FAILED`: a start failed, so the earlier reason is lost. `DAEMON`: the daemon ended it while it reconnected.
# `FROM_SNAPSHOT`: reverted to a snapshot that was made while the domain was off.
OFF_REASONS: dict[int, OffReason] = {
    ShutoffReason.UNKNOWN: OffReason.UNKNOWN,
    ShutoffReason.SHUTDOWN: OffReason.SHUT_DOWN,
    ShutoffReason.DESTROYED: OffReason.POWER_CUT,
    ShutoffReason.CRASHED: OffReason.CRASHED,
    ShutoffReason.MIGRATED: OffReason.MIGRATED,
    ShutoffReason.SAVED: OffReason.SAVED,
    ShutoffReason.FAILED: OffReason.UNKNOWN,
    ShutoffReason.FROM_SNAPSHOT: OffReason.SHUT_DOWN,
    ShutoffReason.DAEMON: OffReason.LOST_POWER,
}

# Reasons without a request to stop the domain.
_LOST_POWER = frozenset({OffReason.UNKNOWN, OffReason.CRASHED, OffReason.LOST_POWER})

# The reasons that events have.
REASON_OF_STOPPED_EVENT: dict[int, ShutoffReason] = {
    StoppedDetail.SHUTDOWN: ShutoffReason.SHUTDOWN,
    StoppedDetail.DESTROYED: ShutoffReason.DESTROYED,
    StoppedDetail.CRASHED: ShutoffReason.CRASHED,
    StoppedDetail.MIGRATED: ShutoffReason.MIGRATED,
    StoppedDetail.SAVED: ShutoffReason.SAVED,
    StoppedDetail.FAILED: ShutoffReason.FAILED,
    StoppedDetail.FROM_SNAPSHOT: ShutoffReason.FROM_SNAPSHOT,
}

ARCHITECTURES: dict[str, Literal["i386", "x86_64", "arm64"]] = {
    "i686": "i386",
    "x86_64": "x86_64",
    "aarch64": "arm64",
}
"""libvirt's names to EC2's."""

ROOT_DEVICE_TYPES: dict[str, RootDeviceType] = {
    "file": "instance-store",
    "block": "instance-store",
    "network": "ebs",
}
"""By the kind of a disk's source; `ebs` for every other kind. For a volume in a storage pool the pool decides."""

POOL_DEVICE_TYPES: dict[str, RootDeviceType] = {
    "dir": "instance-store",
    "fs": "instance-store",
    "disk": "instance-store",
    "logical": "instance-store",
    "zfs": "instance-store",
}
"""By the type of the storage pool; `ebs` for every other type, which is or may be on a network."""

_WINDOWS = re.compile(r"^https?://microsoft\.com/win")
_DISKS = frozenset({"disk", "lun"})  # not cdrom and floppy


class PoolVolume(NamedTuple):
    """A volume of a storage pool.

    Attributes:
        path: Path on the host; None if the volume is not a local file or device.
        pool_type: Type of the pool.
    """

    path: Path | None
    pool_type: str


FindVolume = Callable[[str, str], PoolVolume]
"""Finds a volume by the names of pool and volume; raises InvalidDomainError."""


def instance_id_of(uuid: str) -> str:
    """Return the instance id of the domain with a UUID. It is the same on every host."""
    return f"i-{hashlib.sha256(UUID(uuid).bytes).hexdigest()[:17]}"


def instance_state(state: int, *, terminated: bool) -> InstanceState:
    """Return EC2's state for a domain's. Unknown states count as running, since the disks may be open."""
    shown = STATES.get(state, InstanceState.RUNNING)
    if not terminated:
        return shown
    return InstanceState.TERMINATED if shown is InstanceState.STOPPED else InstanceState.SHUTTING_DOWN


def is_power_loss(reason: int, event_detail: int | None) -> bool:
    """Return whether a domain is off without a request to stop it. Arguments as for `off_reason`."""
    return off_reason(reason, event_detail) in _LOST_POWER


def off_reason(reason: int, event_detail: int | None, *, saved: bool = False) -> OffReason:
    """Return why a domain is off.

    Args:
        reason: A virDomainShutoffReason.
        event_detail: A `StoppedDetail` of the last stop event, if there was one. It is used if the daemon was restarted
            since and has lost the reason.
        saved: Whether the domain has a managed save image.
    """
    if saved:
        return OffReason.SAVED
    if reason == ShutoffReason.UNKNOWN and event_detail is not None:
        reason = REASON_OF_STOPPED_EVENT.get(event_detail, ShutoffReason.UNKNOWN)
    return OFF_REASONS.get(reason, OffReason.UNKNOWN)


def root_disk(definition: DomainDefinition, metadata: InstanceMetadata | None) -> Disk:
    """Return the root disk: the disk that the metadata name, else the one that the domain boots from.

    The latter is the disk with the lowest <boot order> if devices have one, else the first disk.

    Raises:
        InvalidDomainError: There is none.
    """
    disks = [disk for disk in definition.disks if disk.device in _DISKS]
    if metadata is not None and metadata.root_device is not None:
        disks = [disk for disk in disks if disk.target == metadata.root_device]
        if not disks:
            raise InvalidDomainError(f"rootDevice: there is no disk {metadata.root_device}")
    if not disks:
        raise InvalidDomainError("there is no disk")
    ordered = [disk for disk in disks if disk.boot_order is not None]
    return min(ordered, key=lambda disk: disk.boot_order or 0, default=disks[0])


def to_instance(
    definition: DomainDefinition,
    metadata: InstanceMetadata,
    state: InstanceState,
    launch_time: datetime,
    find_volume: FindVolume,
    *,
    off_reason: OffReason | None = None,
) -> Instance:
    """Return the instance of a domain.

    Raises:
        InvalidDomainError: The domain has no disk or an architecture that EC2 does not have, or the metadata do not fit
            the domain.
    """
    if definition.architecture not in ARCHITECTURES:
        raise InvalidDomainError(f"os/type: EC2 has no architecture {definition.architecture}")
    root = root_disk(definition, metadata)
    others = (volume_of(disk, find_volume) for disk in definition.disks if disk.device in _DISKS and disk != root)
    return Instance(
        instance_id=instance_id_of(definition.uuid),
        account_id=metadata.account_id,
        platform=_platform(definition, metadata),
        architecture=ARCHITECTURES[definition.architecture],
        root_device_type=_root_device_type(root, metadata, find_volume),
        root_device_name=_device_name(root),
        root_volume=_root_volume(root, metadata, find_volume),
        volumes=tuple(volume for volume in others if volume is not None),
        state=state,
        off_reason=off_reason,
        launch_time=launch_time,
        tags=dict(metadata.tags),
    )


def _platform(definition: DomainDefinition, metadata: InstanceMetadata) -> Literal["windows"] | None:
    if metadata.platform is not None:
        return "windows" if metadata.platform == "windows" else None
    return "windows" if definition.os_id and _WINDOWS.match(definition.os_id) else None


def _root_device_type(root: Disk, metadata: InstanceMetadata, find_volume: FindVolume) -> RootDeviceType:
    if metadata.root_device_type is not None:
        return metadata.root_device_type
    if root.pool_volume is not None:
        return POOL_DEVICE_TYPES.get(find_volume(*root.pool_volume).pool_type, "ebs")
    return ROOT_DEVICE_TYPES.get(root.kind, "ebs")


def _root_volume(root: Disk, metadata: InstanceMetadata, find_volume: FindVolume) -> VolumeFile:
    """Return the root volume. A disk without a local file gets a path that nothing opens; its instance is `ebs`."""
    if metadata.frozen is not None:
        frozen = metadata.frozen
        return VolumeFile(
            path=frozen.path,
            format=frozen.format,
            device_name=_device_name(root),
            secret_file=frozen.secret_file,
        )
    volume = volume_of(root, find_volume)
    if volume is None and _root_device_type(root, metadata, find_volume) == "instance-store":
        raise InvalidDomainError(f"rootDeviceType: the disk {root.target} is not a file or device of this host")
    path = Path("/", root.remote or root.kind) if volume is None else volume.path
    return VolumeFile(path=path, format=root.format, device_name=_device_name(root), secret_file=metadata.secret_file)


def volume_of(disk: Disk, find_volume: FindVolume) -> VolumeFile | None:
    """Return the file or device of a disk; None if it is not on this host. Raises InvalidDomainError."""
    path = disk.path if disk.pool_volume is None else find_volume(*disk.pool_volume).path
    return None if path is None else VolumeFile(path=path, format=disk.format, device_name=_device_name(disk))


def _device_name(disk: Disk) -> str:
    return f"/dev/{disk.target}"
