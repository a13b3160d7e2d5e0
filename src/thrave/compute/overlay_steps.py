"""Where an overlay's merging stands, told by what is there, and what the next step is. Pure: one table.

A domain has up to two definitions: of the one that runs, and what it is started from the next time. Each has its root
disk on the volume, on the overlay over it, or on something else. From that alone every step follows, whoever began and
was cut off before: the driver, libvirt's daemon, QEMU or the host. The table is complete; a test walks all of it.
"""

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from thrave.compute.domain_xml import Definition, Disk


class Stand(StrEnum):
    """What a definition's root disk is on."""

    NOWHERE = "there is no such definition"
    VOLUME = "the root volume itself"
    OVERLAY = "the overlay"
    ELSEWHERE = "another image"


class Step(StrEnum):
    """What is to be done next."""

    COMMIT_LIVE = "have the running domain write the overlay into the volume and leave it"
    COMMIT_OFF = "write the overlay into the volume, then have the domain start from that"
    COMMIT_FILES = "write the overlay into the volume: there is no domain any more"
    REDEFINE = "have the domain start from the volume, which the running one is on already"
    CLEAN_UP = "remove the overlay and forget it"
    REFUSE = "leave everything as it is: somebody else has put another image there"


# (running domain, what it is started from the next time) -> what to do
MERGING: dict[tuple[Stand, Stand], Step] = {
    (Stand.NOWHERE, Stand.NOWHERE): Step.COMMIT_FILES,
    (Stand.NOWHERE, Stand.VOLUME): Step.CLEAN_UP,
    (Stand.NOWHERE, Stand.OVERLAY): Step.COMMIT_OFF,
    (Stand.NOWHERE, Stand.ELSEWHERE): Step.REFUSE,
    (Stand.VOLUME, Stand.NOWHERE): Step.CLEAN_UP,
    (Stand.VOLUME, Stand.VOLUME): Step.CLEAN_UP,
    (Stand.VOLUME, Stand.OVERLAY): Step.REDEFINE,
    (Stand.VOLUME, Stand.ELSEWHERE): Step.REFUSE,
    (Stand.OVERLAY, Stand.NOWHERE): Step.COMMIT_LIVE,
    (Stand.OVERLAY, Stand.VOLUME): Step.COMMIT_LIVE,
    (Stand.OVERLAY, Stand.OVERLAY): Step.COMMIT_LIVE,
    (Stand.OVERLAY, Stand.ELSEWHERE): Step.COMMIT_LIVE,
    (Stand.ELSEWHERE, Stand.NOWHERE): Step.REFUSE,
    (Stand.ELSEWHERE, Stand.VOLUME): Step.REFUSE,
    (Stand.ELSEWHERE, Stand.OVERLAY): Step.REFUSE,
    (Stand.ELSEWHERE, Stand.ELSEWHERE): Step.REFUSE,
}


class Standing(NamedTuple):
    """What a definition's root disk is on, and which disk that is."""

    stand: Stand
    disk: Disk | None


def standing_of(definition: Definition | None, volume: Path, overlay: Path) -> Standing:
    """What the root disk is on, for which there was the `volume` and an `overlay` over it; None is no definition."""
    if definition is None:
        return Standing(Stand.NOWHERE, None)
    for path, stand in ((overlay, Stand.OVERLAY), (volume, Stand.VOLUME)):
        for disk in definition.disks:
            if disk.path == path:
                return Standing(stand, disk)
    return Standing(Stand.ELSEWHERE, None)


def overlay_for(volume: Path, instance_id: str) -> Path:
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
