"""Checks of a host with libvirt: that it answers, and what its domains must have to be bundled.

Nothing is stopped, started or written. Whose a domain is, and which root volume it has, the driver says; here it is
asked what nobody needs while all goes well.
"""

import os
import shutil
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast
from urllib.parse import urlsplit

from thrave.compute.base import Overlay, Overlays
from thrave.compute.errors import OverlayNotSupported
from thrave.compute.libvirt.binding import XmlFlag
from thrave.compute.libvirt.domain_metadata import NAMESPACE
from thrave.compute.libvirt.domain_xml import parsed
from thrave.compute.libvirt.instance_mapping import instance_id_of
from thrave.doctor.errors import NotTried, Trouble
from thrave.doctor.host import known_instances
from thrave.doctor.subject import Subject
from thrave.volumes import image_chain

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


def libvirt(subject: Subject) -> str:
    """Connect, and see that it is this machine's."""
    uri = _uri(subject)
    if (host := urlsplit(uri).hostname) is not None:
        raise Trouble(f"{uri} is the libvirt of {host}: disks are read on this machine")
    with subject.hypervisor.asked() as connection:
        said = cast("_Versions", connection)
        return f"{said.getType()} {_version(said.getVersion())}, libvirt {_version(said.getLibVersion())}"


def power_button(subject: Subject) -> str:
    """See that each guest can be told to power off."""
    machines = _machines(subject)
    deaf = [str(machine) for machine in machines if not (machine.has_acpi or machine.has_channel)]
    if deaf:
        raise Trouble(f"{', '.join(deaf)}: neither ACPI nor a channel for an agent")
    by_agent = sum(machine.has_channel for machine in machines)
    return f"{len(machines)} can be told, {by_agent} through an agent's channel"


def sysprep(subject: Subject) -> str:
    """See that each guest has somebody to run the command."""
    if not subject.settings.sysprep_command:
        raise NotTried("no sysprep_command is set")
    if subject.settings.hypervisor != "libvirt":
        raise Trouble("it needs hypervisor = libvirt: there is no way into the guests")
    machines = _machines(subject)
    lacking = [str(machine) for machine in machines if not machine.has_channel or machine.is_deaf]
    if lacking:
        raise Trouble(f"{', '.join(lacking)}: no agent")
    return f"{len(machines)} guests can be told"


def overlays(subject: Subject) -> str:
    """See that each overlay that can be had could be made, and merged."""
    planned, _ = _plans(subject)
    image_chain.program("qemu-img")
    faults = dict.fromkeys(fault for frozen in planned for fault in _faults(frozen))
    if faults:
        raise Trouble("; ".join(faults))
    return f"{len(planned)} could be made"


def capture_mode(subject: Subject) -> str:
    """See that each root volume can have an overlay."""
    planned, impossible = _plans(subject)
    if impossible:
        raise Trouble("; ".join(f"{reason.instance_id}: {reason}" for reason in impossible))
    return f"{len(planned)} can"


def _uri(subject: Subject) -> str:
    if subject.settings.hypervisor != "libvirt":
        raise NotTried("hypervisor = directory")
    return subject.settings.libvirt_uri


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


def _machines(subject: Subject) -> Sequence[_Machine]:
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


def _plans(subject: Subject) -> tuple[Sequence[Overlay], Sequence[OverlayNotSupported]]:
    """What would be done to each root volume, and why it cannot be."""
    if subject.settings.capture_mode != "overlay":
        raise NotTried("capture_mode = offline")
    if subject.settings.hypervisor != "libvirt":
        raise Trouble("it needs hypervisor = libvirt: every instance is off until its root volume has been read")
    planned: list[Overlay] = []
    impossible: list[OverlayNotSupported] = []
    for one in known_instances(subject):
        try:
            planned.append(_overlays(subject).plan(one.instance_id))
        except OverlayNotSupported as reason:
            impossible.append(reason)
    return planned, impossible


def _overlays(subject: Subject) -> Overlays:
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
