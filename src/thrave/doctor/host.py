"""Checks of a hypervisor host: its instances, their root volumes and commands, and what reads them. Nothing is run."""

import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from thrave.compute.descriptions import Description, volume_fault
from thrave.compute.folder import DescriptionFolder
from thrave.compute.instance import Instance
from thrave.doctor.errors import NotTried, Trouble
from thrave.doctor.subject import Subject
from thrave.volumes import inspection, libnbd, surveyor
from thrave.volumes.errors import ComponentMissingError
from thrave.volumes.opening import FORMATS, QEMU_FORMATS

_COMMANDS = ("stop_command", "force_stop_command", "start_command", "state_command")
_FILES_OF_A_TASK = 32  # its connections to the store, its volume, its pipes
_FILES_OF_THE_SERVICE = 64


def instances(subject: Subject) -> str:
    """Read every instance's file."""
    readable, broken = DescriptionFolder(_folder(subject)).read_all()
    if broken:
        raise Trouble("; ".join(str(error) for error in broken))
    return f"{len(readable)} in {subject.settings.instance_folder}"


def root_volumes(subject: Subject) -> str:
    """See that each root volume can be read, and is of a known format."""
    found = _described(subject)
    faults = [f"{one.instance_id}: {fault}" for one in found if (fault := root_volume_fault(one))]
    if faults:
        raise Trouble("; ".join(faults))
    return f"{len(found)} can be read"


def bundling_fault(instance: Instance) -> str | None:
    """Why an instance of this machine could not be bundled; None if nothing is seen of it."""
    if instance.root_volume.format in QEMU_FORMATS:
        try:
            check_qemu()
        except ComponentMissingError as error:
            return str(error)
    return root_volume_fault(instance)


def root_volume_fault(instance: Instance) -> str | None:
    """Why an instance's root volume could not be read; None if nothing is seen of it."""
    volume = instance.root_volume
    if volume.format not in FORMATS:
        return f"{volume.path}: unknown format {volume.format}"
    return volume_fault(volume.path)


def commands(subject: Subject) -> str:
    """Look for the program of each command."""
    named = [(one, name, getattr(one, name)) for one in _described(subject) for name in _COMMANDS]
    given = [(one.instance_id, name, argv[0]) for one, name, argv in named if argv]
    if not given:
        raise NotTried("no instance has any")
    missing = [f"{owner}: {name}: {program}" for owner, name, program in given if shutil.which(program) is None]
    if missing:
        raise Trouble("; ".join(missing))
    return f"{len(given)} are there"


def qemu(subject: Subject) -> str:
    """Look for what reads images of QEMU's formats, if an instance has one."""
    formats = {one.root_volume.format for one in _described(subject)} & {*QEMU_FORMATS}
    if not formats:
        raise NotTried("every root volume is raw")
    check_qemu()
    return f"for {', '.join(sorted(formats))}"


def check_qemu() -> None:
    """Raise ComponentMissingError if images of QEMU's formats cannot be read."""
    for name in ("qemu-nbd", "qemu-img"):
        inspection.program(name)
    libnbd.load()


def skipping(subject: Subject) -> str:
    """Look for what reads NTFS, if the settings want it."""
    if subject.settings.skip == "nothing":
        raise NotTried("skip = nothing")
    surveyor.check_installed()
    return "pytsk3"


def open_files(subject: Subject) -> str:
    """Compare the process's limit with what the settings may open."""
    settings = subject.settings
    needed = settings.connections + settings.tasks_at_once * _FILES_OF_A_TASK + _FILES_OF_THE_SERVICE
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise Trouble(f"{allowed} allowed, {needed} may be needed")
    return f"{allowed} allowed, {needed} may be needed"


def _folder(subject: Subject) -> Path:
    folder = subject.settings.instance_folder
    if not folder.exists():
        raise NotTried(f"{folder} is not there: no instance is described on this machine")
    folder.iterdir()
    return folder


def _described(subject: Subject) -> Sequence[Description]:
    return DescriptionFolder(_folder(subject)).read_all()[0]
