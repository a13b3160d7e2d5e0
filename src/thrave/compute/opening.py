"""Which inventory a host has, as the settings say: instances that files describe, or libvirt's domains.

Nothing here asks a hypervisor, and libvirt's binding is loaded only where the settings want it.
"""

from typing import TYPE_CHECKING

from thrave.compute.directory import DirectoryInstances
from thrave.compute.instances import Instances
from thrave.config import Settings

if TYPE_CHECKING:
    from thrave.compute.libvirt import LibvirtInstances


def open_instances(settings: Settings) -> Instances:
    """The inventory that the settings name.

    Raises:
        ComponentMissingError: libvirt's binding is not installed.
        HypervisorError: libvirt does not answer.
    """
    return open_described(settings) if settings.hypervisor == "directory" else open_adopted(settings)


def open_described(settings: Settings) -> DirectoryInstances:
    """The instances that files describe."""
    return DirectoryInstances(settings.effective_instance_dir)


def open_adopted(settings: Settings) -> "LibvirtInstances":
    """The domains that have been adopted. Raises as `open_instances`."""
    from thrave.compute.libvirt import LibvirtInstances  # noqa: PLC0415 (needs a Debian package that few hosts have)

    return LibvirtInstances(settings.libvirt_uri, lock_folder=settings.directory.locks)
