"""Checks of a hypervisor host: its instances, their root volumes and commands, and what reads them. Nothing is run.

What is only libvirt's is `domains.py`.

Checks of a host with libvirt: that it answers, and what its domains must have to be bundled.

Nothing is stopped, started or written. Whose a domain is, and which root volume it has, the driver says; here it is
asked what nobody needs while all goes well.
"""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast
from urllib.parse import urlsplit

from thrave.compute.base import Overlay, Overlays
from thrave.compute.description_files import DescriptionFiles, InstanceDescription, volume_fault
from thrave.compute.errors import InstanceError, OverlayNotSupported
from thrave.compute.instance import Instance
from thrave.compute.libvirt.binding import XmlFlag
from thrave.compute.libvirt.domain_metadata import NAMESPACE
from thrave.compute.libvirt.domain_xml import parsed
from thrave.compute.libvirt.instance_mapping import instance_id_of
from thrave.doctor.check_context import CheckContext, CheckFailed, CheckSkipped
from thrave.volumes import image_chain, ntfs_sandbox, qemu_nbd
from thrave.volumes.errors import ToolNotInstalled, VolumeError
from thrave.volumes.formats import FORMATS, QEMU_FORMATS, examine

_COMMANDS = ("stop_command", "force_stop_command", "start_command", "state_command")


def instances(subject: CheckContext) -> str:
    """Read every instance's file, or every adopted domain."""
    readable, broken = _all(subject)
    if broken:
        raise CheckFailed("; ".join(str(error) for error in broken))
    return f"{len(readable)} in {_place(subject)}"


def root_volumes(subject: CheckContext) -> str:
    """See that each root volume that may be bundled can be read, and is of a known format."""
    found = known_instances(subject)
    directories = subject.settings.image_dirs
    faults = [f"{one.instance_id}: {fault}" for one in found if (fault := _root_volume_fault(one, directories))]
    if faults:
        raise CheckFailed("; ".join(faults))
    return f"{len(found)} can be read"


def known_instances(subject: CheckContext) -> Sequence[Instance]:
    """Every instance that can be understood and whose root volume is this machine's."""
    return [one for one in _all(subject)[0] if one.root_device_type == "instance-store"]


def bundling_fault(instance: Instance) -> str | None:
    """Why an instance of this machine could not be bundled, but for its image's own words; None if nothing is seen."""
    volume = instance.root_volume
    if volume.format in QEMU_FORMATS:
        try:
            check_qemu()
        except ToolNotInstalled as error:
            return str(error)
    if volume.format not in FORMATS:
        return f"{volume.path}: unknown format {volume.format}"
    secret_fault = volume_fault(volume.secret_file) if volume.secret_file else None
    return volume_fault(volume.path) or secret_fault


def _root_volume_fault(instance: Instance, directories: Sequence[Path]) -> str | None:
    """Why an instance's root volume could not be read as what it is said to be; None if nothing is seen of it."""
    volume = instance.root_volume
    try:
        if (fault := bundling_fault(instance)) is not None:
            return fault
        examined = examine(volume.path, volume.format, directories=directories)
    except VolumeError as error:
        return str(error)
    return "; ".join(warned.text for warned in examined.warnings) if volume.format == "raw" else None


def commands(subject: CheckContext) -> str:
    """Look for the program of each command."""
    if subject.settings.hypervisor != "directory":
        raise CheckSkipped("libvirt's domains have none")
    named = [(one, name, getattr(one, name)) for one in _described(subject)[0] for name in _COMMANDS]
    given = [(one.instance_id, name, argv[0]) for one, name, argv in named if argv]
    if not given:
        raise CheckSkipped("no instance has any")
    missing = [f"{owner}: {name}: {program}" for owner, name, program in given if shutil.which(program) is None]
    if missing:
        raise CheckFailed("; ".join(missing))
    return f"{len(given)} are there"


def qemu(subject: CheckContext) -> str:
    """Look for what reads images of QEMU's formats, if an instance has one."""
    formats = {one.root_volume.format for one in known_instances(subject)} & {*QEMU_FORMATS}
    if not formats:
        raise CheckSkipped("every root volume is raw")
    check_qemu()
    return f"for {', '.join(sorted(formats))}"


def check_qemu() -> None:
    """Raise ComponentMissingError if images of QEMU's formats cannot be read."""
    for name in ("qemu-nbd", "qemu-img"):
        image_chain.program(name)
    qemu_nbd.load()


def skipping(subject: CheckContext) -> str:
    """Look for what reads NTFS, if the settings want it."""
    if not subject.settings.skip_unused:
        raise CheckSkipped("skip_unused = false")
    ntfs_sandbox.check_installed()
    return "pytsk3"


def sandbox(_subject: CheckContext) -> str:
    """Confine a process as one that reads a guest's file system is confined."""
    try:
        ntfs_sandbox.check_sandbox()
    except ToolNotInstalled as error:
        raise CheckSkipped(str(error)) from error
    return "its process can be confined"


def open_files(subject: CheckContext) -> str:
    """Compare the limit that the service can have with what the settings may open."""
    needed = subject.settings.max_open_files
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise CheckFailed(f"{allowed} allowed, {needed} may be needed")
    return f"{allowed} allowed, {needed} may be needed"


def _all(subject: CheckContext) -> tuple[Sequence[Instance], Sequence[InstanceError]]:
    """Every instance, and why some cannot be understood; no hypervisor's command is run for it."""
    if subject.settings.hypervisor == "libvirt":
        return subject.adopted.list(), subject.adopted.broken()
    return _described(subject)


def _place(subject: CheckContext) -> str:
    settings = subject.settings
    return settings.libvirt_uri if settings.hypervisor == "libvirt" else str(settings.effective_instance_dir)


def _described(subject: CheckContext) -> tuple[Sequence[InstanceDescription], Sequence[InstanceError]]:
    folder = subject.settings.effective_instance_dir
    if not folder.exists():
        raise CheckSkipped(f"{folder} is not there: no instance is described on this machine")
    folder.iterdir()
    return DescriptionFiles(folder).read_all()


LEAST_ROOM = 1 << 30
"""Bytes in a folder of overlays: a guest whose overlay cannot grow is paused."""


_AGENT_CHANNEL = "org.qemu.guest_agent.0"


class _Versions(Protocol):
    """What else a virConnect tells; a version is 1000000 * major + 1000 * minor + release."""

    def getType(self) -> str:  # noqa: N802 (libvirt's name)
        """The driver."""

    def getVersion(self) -> int:  # noqa: N802 (libvirt's name)
        """The hypervisor's version."""

    def getLibVersion(self) -> int:  # noqa: N802 (libvirt's name)
        """The daemon's version."""


class _Machine(NamedTuple):
    """An adopted domain, as far as it can be told to power off."""

    instance_id: str
    name: str
    has_acpi: bool
    has_channel: bool
    """For its guest's agent."""
    is_deaf: bool
    """It runs, and no agent has opened the channel."""

    def __str__(self) -> str:
        return f"{self.instance_id} ({self.name})"


def libvirt(subject: CheckContext) -> str:
    """Connect, and see that it is this machine's."""
    uri = _uri(subject)
    if (host := urlsplit(uri).hostname) is not None:
        raise CheckFailed(f"{uri} is the libvirt of {host}: disks are read on this machine")
    with subject.hypervisor.asked() as connection:
        said = cast("_Versions", connection)
        return f"{said.getType()} {_version(said.getVersion())}, libvirt {_version(said.getLibVersion())}"


def power_button(subject: CheckContext) -> str:
    """See that each guest can be told to power off."""
    machines = _machines(subject)
    deaf = [str(machine) for machine in machines if not (machine.has_acpi or machine.has_channel)]
    if deaf:
        raise CheckFailed(f"{', '.join(deaf)}: neither ACPI nor a channel for an agent")
    by_agent = sum(machine.has_channel for machine in machines)
    return f"{len(machines)} can be told, {by_agent} through an agent's channel"


def sysprep(subject: CheckContext) -> str:
    """See that each guest has somebody to run the command."""
    if not subject.settings.sysprep_command:
        raise CheckSkipped("no sysprep_command is set")
    if subject.settings.hypervisor != "libvirt":
        raise CheckFailed("it needs hypervisor = libvirt: there is no way into the guests")
    machines = _machines(subject)
    lacking = [str(machine) for machine in machines if not machine.has_channel or machine.is_deaf]
    if lacking:
        raise CheckFailed(f"{', '.join(lacking)}: no agent")
    return f"{len(machines)} guests can be told"


def overlays(subject: CheckContext) -> str:
    """See that each overlay that can be had could be made, and merged."""
    planned, _ = _plans(subject)
    image_chain.program("qemu-img")
    faults = dict.fromkeys(fault for frozen in planned for fault in _faults(frozen))
    if faults:
        raise CheckFailed("; ".join(faults))
    return f"{len(planned)} could be made"


def capture_mode(subject: CheckContext) -> str:
    """See that each root volume can have an overlay."""
    planned, impossible = _plans(subject)
    if impossible:
        raise CheckFailed("; ".join(f"{reason.instance_id}: {reason}" for reason in impossible))
    return f"{len(planned)} can"


def _uri(subject: CheckContext) -> str:
    if subject.settings.hypervisor != "libvirt":
        raise CheckSkipped("hypervisor = directory")
    return subject.settings.libvirt_uri


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


def _machines(subject: CheckContext) -> Sequence[_Machine]:
    _uri(subject)
    with subject.hypervisor.asked() as connection:
        found = []
        for domain in connection.listAllDomains():
            live, config = (domain.XMLDesc(flags) for flags in (0, XmlFlag.INACTIVE if domain.isPersistent() else 0))
            if NAMESPACE in config:
                found.append(_machine(live, config))
        return found


def _machine(live: str, config: str) -> _Machine:
    domain, running = parsed(config), parsed(live)
    channel = f"devices/channel/target[@name='{_AGENT_CHANNEL}']"
    return _Machine(
        instance_id=instance_id_of(domain.findtext("uuid", "")),
        name=domain.findtext("name", ""),
        has_acpi=domain.find("features/acpi") is not None,
        has_channel=domain.find(channel) is not None,
        is_deaf="id" in running.attrib and running.find(f"{channel}[@state='connected']") is None,
    )


def _plans(subject: CheckContext) -> tuple[Sequence[Overlay], Sequence[OverlayNotSupported]]:
    """What would be done to each root volume, and why it cannot be."""
    if subject.settings.capture_mode != "overlay":
        raise CheckSkipped("capture_mode = offline")
    if subject.settings.hypervisor != "libvirt":
        raise CheckFailed("it needs hypervisor = libvirt: every instance is off until its root volume has been read")
    planned: list[Overlay] = []
    impossible: list[OverlayNotSupported] = []
    for one in known_instances(subject):
        try:
            planned.append(_overlays(subject).plan(one.instance_id))
        except OverlayNotSupported as reason:
            impossible.append(reason)
    return planned, impossible


def _overlays(subject: CheckContext) -> Overlays:
    return subject.adopted.overlays


def _faults(frozen: Overlay) -> Sequence[str]:
    """Why an overlay could not be made or merged."""
    folder = frozen.overlay.parent
    found = []
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(f"{folder}: no file can be made in it")
    elif (free := shutil.disk_usage(folder).free) < LEAST_ROOM:
        found.append(f"{folder}: {free >> 20} MiB left")
    if not os.access(frozen.volume.path, os.W_OK):
        found.append(f"{frozen.volume.path}: cannot be written to")
    return found
