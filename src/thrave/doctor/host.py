"""Checks of a hypervisor host: its instances, their root volumes and commands, and what reads them. Nothing is run.

What is only libvirt's is `domains.py`.
"""

import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from thrave.compute.description_files import DescriptionFiles, InstanceDescription, volume_fault
from thrave.compute.errors import InstanceError
from thrave.compute.instance import Instance
from thrave.doctor.errors import NotTried, Trouble
from thrave.doctor.subject import Subject
from thrave.volumes import image_chain, ntfs_sandbox, qemu_nbd
from thrave.volumes.errors import ToolNotInstalled, VolumeError
from thrave.volumes.formats import FORMATS, QEMU_FORMATS, examine

_COMMANDS = ("stop_command", "force_stop_command", "start_command", "state_command")


def instances(subject: Subject) -> str:
    """Read every instance's file, or every adopted domain."""
    readable, broken = _all(subject)
    if broken:
        raise Trouble("; ".join(str(error) for error in broken))
    return f"{len(readable)} in {_place(subject)}"


def root_volumes(subject: Subject) -> str:
    """See that each root volume that may be bundled can be read, and is of a known format."""
    found = known_instances(subject)
    directories = subject.settings.image_dirs
    faults = [f"{one.instance_id}: {fault}" for one in found if (fault := _root_volume_fault(one, directories))]
    if faults:
        raise Trouble("; ".join(faults))
    return f"{len(found)} can be read"


def known_instances(subject: Subject) -> Sequence[Instance]:
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


def commands(subject: Subject) -> str:
    """Look for the program of each command."""
    if subject.settings.hypervisor != "directory":
        raise NotTried("libvirt's domains have none")
    named = [(one, name, getattr(one, name)) for one in _described(subject)[0] for name in _COMMANDS]
    given = [(one.instance_id, name, argv[0]) for one, name, argv in named if argv]
    if not given:
        raise NotTried("no instance has any")
    missing = [f"{owner}: {name}: {program}" for owner, name, program in given if shutil.which(program) is None]
    if missing:
        raise Trouble("; ".join(missing))
    return f"{len(given)} are there"


def qemu(subject: Subject) -> str:
    """Look for what reads images of QEMU's formats, if an instance has one."""
    formats = {one.root_volume.format for one in known_instances(subject)} & {*QEMU_FORMATS}
    if not formats:
        raise NotTried("every root volume is raw")
    check_qemu()
    return f"for {', '.join(sorted(formats))}"


def check_qemu() -> None:
    """Raise ComponentMissingError if images of QEMU's formats cannot be read."""
    for name in ("qemu-nbd", "qemu-img"):
        image_chain.program(name)
    qemu_nbd.load()


def skipping(subject: Subject) -> str:
    """Look for what reads NTFS, if the settings want it."""
    if not subject.settings.skip_unused:
        raise NotTried("skip_unused = false")
    ntfs_sandbox.check_installed()
    return "pytsk3"


def sandbox(_subject: Subject) -> str:
    """Confine a process as one that reads a guest's file system is confined."""
    try:
        ntfs_sandbox.check_sandbox()
    except ToolNotInstalled as error:
        raise NotTried(str(error)) from error
    return "its process can be confined"


def open_files(subject: Subject) -> str:
    """Compare the limit that the service can have with what the settings may open."""
    needed = subject.settings.max_open_files
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise Trouble(f"{allowed} allowed, {needed} may be needed")
    return f"{allowed} allowed, {needed} may be needed"


def _all(subject: Subject) -> tuple[Sequence[Instance], Sequence[InstanceError]]:
    """Every instance, and why some cannot be understood; no hypervisor's command is run for it."""
    if subject.settings.hypervisor == "libvirt":
        return subject.adopted.list(), subject.adopted.broken()
    return _described(subject)


def _place(subject: Subject) -> str:
    settings = subject.settings
    return settings.libvirt_uri if settings.hypervisor == "libvirt" else str(settings.effective_instance_dir)


def _described(subject: Subject) -> tuple[Sequence[InstanceDescription], Sequence[InstanceError]]:
    folder = subject.settings.effective_instance_dir
    if not folder.exists():
        raise NotTried(f"{folder} is not there: no instance is described on this machine")
    folder.iterdir()
    return DescriptionFiles(folder).read_all()
