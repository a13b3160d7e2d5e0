"""What a libvirt domain is to EC2: which instance, on which root volume, in which state. Pure, and mostly tables.

It decides nothing about what is done to a domain; what can be read off its definition and its metadata is decided here,
so that it can be tested with no hypervisor.
"""

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

# A domain that has its disks open counts as running, whatever its CPUs do. `SHUTDOWN` is libvirt's word for a guest
# that has powered off and whose process has not ended yet; `CRASHED` for a panicked one whose process is kept.
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

# Why a domain is off. `UNKNOWN` is what a daemon says that was started after the domain went off, so also after the
# host was; `FAILED` that it could not be started, which hides why it was off before; `DAEMON` that the daemon gave up
# on it. A snapshot that leaves a domain off was itself made while the domain was off.
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

# Those for which nobody has stopped the domain.
_LOST_POWER = frozenset({OffReason.UNKNOWN, OffReason.CRASHED, OffReason.LOST_POWER})

# The same reasons, as the event says them.
STOPPED_BECAUSE: dict[int, ShutoffReason] = {
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
"""EC2's words for libvirt's."""

ROOT_DEVICE_TYPES: dict[str, RootDeviceType] = {
    "file": "instance-store",
    "block": "instance-store",
    "network": "ebs",
}
"""By the kind of a disk's source, `ebs` for every other; that of a volume in a storage pool is its pool's."""

POOL_DEVICE_TYPES: dict[str, RootDeviceType] = {
    "dir": "instance-store",
    "fs": "instance-store",
    "disk": "instance-store",
    "logical": "instance-store",
    "zfs": "instance-store",
}
"""By the type of the storage pool; every other is on a network, or may be."""

_WINDOWS = re.compile(r"^https?://microsoft\.com/win")
_DISKS = frozenset({"disk", "lun"})  # not cdrom and floppy


class PoolVolume(NamedTuple):
    """A volume of a storage pool.

    Attributes:
        path: Where the host has it; None where it has no file of it.
        pool_type: The type of the pool.
    """

    path: Path | None
    pool_type: str


FindVolume = Callable[[str, str], PoolVolume]
"""Finds the volume of a pool, both by name; raises DomainFaultError."""


def instance_id_of(uuid: str) -> str:
    """The instance id of the domain with a UUID: always the same, on whatever host it is defined."""
    return f"i-{hashlib.sha256(UUID(uuid).bytes).hexdigest()[:17]}"


def instance_state(state: int, *, terminated: bool) -> InstanceState:
    """EC2's word for a domain's state. One that is newer than the table may have its disks open, and runs."""
    shown = STATES.get(state, InstanceState.RUNNING)
    if not terminated:
        return shown
    return InstanceState.TERMINATED if shown is InstanceState.STOPPED else InstanceState.SHUTTING_DOWN


def is_power_loss(reason: int, seen: int | None) -> bool:
    """Whether a domain that is off was not stopped by anybody; the arguments are those of `off_reason`."""
    return off_reason(reason, seen) in _LOST_POWER


def off_reason(reason: int, seen: int | None, *, saved: bool = False) -> OffReason:
    """Why a domain that is off is off.

    Args:
        reason: A virDomainShutoffReason.
        seen: The detail of the last event of its stopping, if there was one. A daemon that was started since does not
            know the reason any more.
        saved: Whether it has a managed-save image.
    """
    if saved:
        return OffReason.SAVED
    if reason == ShutoffReason.UNKNOWN and seen is not None:
        reason = STOPPED_BECAUSE.get(seen, ShutoffReason.UNKNOWN)
    return OFF_REASONS.get(reason, OffReason.UNKNOWN)


def root_disk(definition: DomainDefinition, record: InstanceMetadata | None) -> Disk:
    """The disk that is bundled: the one that the record names, else the one that is booted.

    That is the disk with the lowest <boot order>, where devices have one, else the first.

    Raises:
        DomainFaultError: There is none.
    """
    disks = [disk for disk in definition.disks if disk.device in _DISKS]
    if record is not None and record.root_device is not None:
        disks = [disk for disk in disks if disk.target == record.root_device]
        if not disks:
            raise InvalidDomainError(f"rootDevice: there is no disk {record.root_device}")
    if not disks:
        raise InvalidDomainError("there is no disk")
    ordered = [disk for disk in disks if disk.boot_order is not None]
    return min(ordered, key=lambda disk: disk.boot_order or 0, default=disks[0])


def to_instance(
    definition: DomainDefinition,
    record: InstanceMetadata,
    state: InstanceState,
    launch_time: datetime,
    find_volume: FindVolume,
    *,
    off: OffReason | None = None,
) -> Instance:
    """The instance that a domain is; `off` is why it is off.

    Raises:
        DomainFaultError: It is none: it has no disk, or an architecture that EC2 does not know, or what its record says
            does not fit it.
    """
    if definition.architecture not in ARCHITECTURES:
        raise InvalidDomainError(f"os/type: EC2 knows no {definition.architecture}")
    root = root_disk(definition, record)
    others = (volume_of(disk, find_volume) for disk in definition.disks if disk.device in _DISKS and disk != root)
    return Instance(
        instance_id=instance_id_of(definition.uuid),
        account_id=record.account_id,
        platform=_platform(definition, record),
        architecture=ARCHITECTURES[definition.architecture],
        root_device_type=_root_device_type(root, record, find_volume),
        root_device_name=_device_name(root),
        root_volume=_root_volume(root, record, find_volume),
        volumes=tuple(volume for volume in others if volume is not None),
        state=state,
        off_reason=off,
        launch_time=launch_time,
        tags=dict(record.tags),
    )


def _platform(definition: DomainDefinition, record: InstanceMetadata) -> Literal["windows"] | None:
    if record.platform is not None:
        return "windows" if record.platform == "windows" else None
    return "windows" if definition.os_id and _WINDOWS.match(definition.os_id) else None


def _root_device_type(root: Disk, record: InstanceMetadata, find_volume: FindVolume) -> RootDeviceType:
    if record.root_device_type is not None:
        return record.root_device_type
    if root.pool_volume is not None:
        return POOL_DEVICE_TYPES.get(find_volume(*root.pool_volume).pool_type, "ebs")
    return ROOT_DEVICE_TYPES.get(root.kind, "ebs")


def _root_volume(root: Disk, record: InstanceMetadata, find_volume: FindVolume) -> VolumeFile:
    """The file or device; of a disk that has none, what it is called, which nothing opens: its instance is `ebs`."""
    if record.frozen is not None:
        frozen = record.frozen
        return VolumeFile(
            path=frozen.path,
            format=frozen.format,
            device_name=_device_name(root),
            secret_file=frozen.secret_file,
        )
    volume = volume_of(root, find_volume)
    if volume is None and _root_device_type(root, record, find_volume) == "instance-store":
        raise InvalidDomainError(f"rootDeviceType: the disk {root.target} is no file or device of this host")
    path = Path("/", root.remote or root.kind) if volume is None else volume.path
    return VolumeFile(path=path, format=root.format, device_name=_device_name(root), secret_file=record.secret_file)


def volume_of(disk: Disk, find_volume: FindVolume) -> VolumeFile | None:
    """The file or device that a disk is; None if it is none of this host's. Raises DomainFaultError."""
    path = disk.path if disk.pool_volume is None else find_volume(*disk.pool_volume).path
    return None if path is None else VolumeFile(path=path, format=disk.format, device_name=_device_name(disk))


def _device_name(disk: Disk) -> str:
    return f"/dev/{disk.target}"
