"""Checks of a hypervisor host: instances, root volumes, commands, libvirt domains, and the programs that read images.

No instance is stopped or started, no operator command is run, nothing is written.
"""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast
from urllib.parse import urlsplit

from thrave.compute.base import Overlay, Overlays
from thrave.compute.description_files import DescriptionFiles, InstanceDescription
from thrave.compute.errors import InstanceError, OverlayNotSupported
from thrave.compute.instance import Instance
from thrave.compute.libvirt.binding import XmlFlag
from thrave.compute.libvirt.domain_metadata import NAMESPACE
from thrave.compute.libvirt.domain_xml import parse_xml
from thrave.compute.libvirt.instance_mapping import instance_id_of
from thrave.doctor.check_context import CheckContext, CheckFailed, CheckSkipped
from thrave.tasks.root_volume_check import find_volume_fault, require_qemu
from thrave.volumes import image_chain, ntfs_sandbox
from thrave.volumes.errors import ToolNotInstalled, VolumeError
from thrave.volumes.formats import QEMU_FORMATS, read_metadata

_COMMANDS = ("stop_command", "force_stop_command", "start_command", "state_command")


def check_instances(context: CheckContext) -> str:
    """Read every instance's file, or every adopted domain."""
    readable, broken = _all(context)
    if broken:
        raise CheckFailed("; ".join(str(error) for error in broken))
    return f"{len(readable)} in {_place(context)}"


def check_root_volumes(context: CheckContext) -> str:
    """Check that each root volume that may be bundled is readable and has a known format."""
    found = known_instances(context)
    directories = context.settings.image_dirs
    faults = [f"{one.instance_id}: {fault}" for one in found if (fault := _root_volume_fault(one, directories))]
    if faults:
        raise CheckFailed("; ".join(faults))
    return f"{len(found)} readable"


def known_instances(context: CheckContext) -> Sequence[Instance]:
    """Every instance with a valid description and a root volume on this machine."""
    return [one for one in _all(context)[0] if one.root_device_type == "instance-store"]


def _root_volume_fault(instance: Instance, directories: Sequence[Path]) -> str | None:
    """Why an instance's root volume cannot be read in its stated format; None if no reason is known."""
    volume = instance.root_volume
    try:
        if (fault := find_volume_fault(instance)) is not None:
            return fault
        metadata = read_metadata(volume.path, volume.format, directories=directories)
    except VolumeError as error:
        return str(error)
    return "; ".join(warning.text for warning in metadata.warnings) if volume.format == "raw" else None


def check_commands(context: CheckContext) -> str:
    """Find the program of each command."""
    if context.settings.hypervisor != "directory":
        raise CheckSkipped("libvirt domains have no commands")
    named = [(one, name, getattr(one, name)) for one in _described(context)[0] for name in _COMMANDS]
    given = [(one.instance_id, name, argv[0]) for one, name, argv in named if argv]
    if not given:
        raise CheckSkipped("no instance has commands")
    missing = [f"{owner}: {name}: {program}" for owner, name, program in given if shutil.which(program) is None]
    if missing:
        raise CheckFailed("; ".join(missing))
    return f"{len(given)} exist"


def check_qemu(context: CheckContext) -> str:
    """Find the programs that read QEMU's image formats, if an instance has such an image."""
    formats = {one.root_volume.format for one in known_instances(context)} & {*QEMU_FORMATS}
    if not formats:
        raise CheckSkipped("every root volume is raw")
    require_qemu()
    return f"for {', '.join(sorted(formats))}"


def check_ntfs(context: CheckContext) -> str:
    """Find the library that reads NTFS, if the settings need it."""
    if not context.settings.skip_unused:
        raise CheckSkipped("skip_unused = false")
    ntfs_sandbox.check_installed()
    return "pytsk3"


def check_sandbox(_context: CheckContext) -> str:
    """Start a sandboxed process, as for reading a guest's file system."""
    try:
        ntfs_sandbox.check_sandbox()
    except ToolNotInstalled as error:
        raise CheckSkipped(str(error)) from error
    return "the sandbox works"


def check_open_files(context: CheckContext) -> str:
    """Compare the hard limit of open files with the number that the settings may need."""
    needed = context.settings.max_open_files
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise CheckFailed(f"{allowed} allowed, {needed} may be needed")
    return f"{allowed} allowed, {needed} may be needed"


def _all(context: CheckContext) -> tuple[Sequence[Instance], Sequence[InstanceError]]:
    """Every valid instance, and an error for each invalid one. Runs no operator command."""
    if context.settings.hypervisor == "libvirt":
        return context.adopted.list(), context.adopted.list_errors()
    return _described(context)


def _place(context: CheckContext) -> str:
    settings = context.settings
    return settings.libvirt_uri if settings.hypervisor == "libvirt" else str(settings.effective_instance_dir)


def _described(context: CheckContext) -> tuple[Sequence[InstanceDescription], Sequence[InstanceError]]:
    folder = context.settings.effective_instance_dir
    if not folder.exists():
        raise CheckSkipped(f"{folder} does not exist: this machine has no instances")
    folder.iterdir()
    return DescriptionFiles(folder).read_all()


MIN_OVERLAY_SPACE = 1 << 30
"""Free bytes in a folder of overlays: QEMU pauses a guest whose overlay cannot grow."""

_AGENT_CHANNEL = "org.qemu.guest_agent.0"


class _Versions(Protocol):
    """Further methods of virConnect. A version is 1000000 * major + 1000 * minor + release."""

    def getType(self) -> str:  # noqa: N802 (libvirt's name)
        """Name of the driver."""

    def getVersion(self) -> int:  # noqa: N802 (libvirt's name)
        """The hypervisor's version."""

    def getLibVersion(self) -> int:  # noqa: N802 (libvirt's name)
        """The daemon's version."""


class _Machine(NamedTuple):
    """The parts of an adopted domain that matter for shutting it down."""

    instance_id: str
    name: str
    has_acpi: bool
    has_channel: bool
    """Channel of the guest agent."""
    is_disconnected: bool
    """The domain runs, and no agent has opened the channel."""

    def __str__(self) -> str:
        return f"{self.instance_id} ({self.name})"


def check_libvirt(context: CheckContext) -> str:
    """Connect, and check that libvirt runs on this machine."""
    uri = _uri(context)
    if (host := urlsplit(uri).hostname) is not None:
        raise CheckFailed(f"{uri} is on another host, {host}; root volumes are read on this machine")
    with context.hypervisor.session() as connection:
        versions = cast("_Versions", connection)
        library = _version(versions.getLibVersion())
        return f"{versions.getType()} {_version(versions.getVersion())}, libvirt {library}"


def check_power_button(context: CheckContext) -> str:
    """Check that each guest can be asked to power off."""
    machines = _machines(context)
    unreachable = [str(machine) for machine in machines if not (machine.has_acpi or machine.has_channel)]
    if unreachable:
        raise CheckFailed(f"{', '.join(unreachable)}: neither ACPI nor a guest agent channel")
    with_channel = sum(machine.has_channel for machine in machines)
    return f"{len(machines)} can be shut down, {with_channel} through a guest agent channel"


def check_sysprep(context: CheckContext) -> str:
    """Check that each guest has an agent that can run the command."""
    if not context.settings.sysprep_command:
        raise CheckSkipped("no sysprep_command is set")
    if context.settings.hypervisor != "libvirt":
        raise CheckFailed("sysprep_command needs hypervisor = libvirt")
    machines = _machines(context)
    without_agent = [str(machine) for machine in machines if not machine.has_channel or machine.is_disconnected]
    if without_agent:
        raise CheckFailed(f"{', '.join(without_agent)}: no agent")
    return f"{len(machines)} guests have an agent"


def check_overlays(context: CheckContext) -> str:
    """Check that each possible overlay can be created and merged."""
    planned, _ = _plans(context)
    image_chain.find_program("qemu-img")
    faults = dict.fromkeys(fault for overlay in planned for fault in _overlay_faults(overlay))
    if faults:
        raise CheckFailed("; ".join(faults))
    return f"{len(planned)} can be created"


def check_capture_mode(context: CheckContext) -> str:
    """Check that each root volume can have an overlay."""
    planned, impossible = _plans(context)
    if impossible:
        raise CheckFailed("; ".join(f"{reason.instance_id}: {reason}" for reason in impossible))
    return f"{len(planned)} can have one"


def _uri(context: CheckContext) -> str:
    if context.settings.hypervisor != "libvirt":
        raise CheckSkipped("hypervisor = directory")
    return context.settings.libvirt_uri


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


def _machines(context: CheckContext) -> Sequence[_Machine]:
    _uri(context)
    with context.hypervisor.session() as connection:
        found = []
        for domain in connection.listAllDomains():
            live, config = (domain.XMLDesc(flags) for flags in (0, XmlFlag.INACTIVE if domain.isPersistent() else 0))
            if NAMESPACE in config:
                found.append(_machine(live, config))
        return found


def _machine(live: str, config: str) -> _Machine:
    domain, running = parse_xml(config), parse_xml(live)
    channel = f"devices/channel/target[@name='{_AGENT_CHANNEL}']"
    return _Machine(
        instance_id=instance_id_of(domain.findtext("uuid", "")),
        name=domain.findtext("name", ""),
        has_acpi=domain.find("features/acpi") is not None,
        has_channel=domain.find(channel) is not None,
        is_disconnected="id" in running.attrib and running.find(f"{channel}[@state='connected']") is None,
    )


def _plans(context: CheckContext) -> tuple[Sequence[Overlay], Sequence[OverlayNotSupported]]:
    """The overlay planned for each root volume, and an error for each that cannot have one."""
    if context.settings.capture_mode != "overlay":
        raise CheckSkipped("capture_mode = offline")
    if context.settings.hypervisor != "libvirt":
        raise CheckFailed(
            "capture_mode = overlay needs hypervisor = libvirt; without it every instance stays off until its root "
            "volume has been read"
        )
    planned: list[Overlay] = []
    impossible: list[OverlayNotSupported] = []
    for one in known_instances(context):
        try:
            planned.append(_overlays(context).plan(one.instance_id))
        except OverlayNotSupported as reason:
            impossible.append(reason)
    return planned, impossible


def _overlays(context: CheckContext) -> Overlays:
    return context.adopted.overlays


def _overlay_faults(planned: Overlay) -> Sequence[str]:
    """Why an overlay cannot be created or merged."""
    folder = planned.overlay.parent
    found = []
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(f"{folder}: not writable")
    elif (free := shutil.disk_usage(folder).free) < MIN_OVERLAY_SPACE:
        found.append(f"{folder}: {free >> 20} MiB free, {MIN_OVERLAY_SPACE >> 20} MiB needed")
    if not os.access(planned.volume.path, os.W_OK):
        found.append(f"{planned.volume.path}: not writable")
    return found
