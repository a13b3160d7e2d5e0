"""libvirt's `test:` driver: domains without machines, inside this process.

All connections of a process see the same domains, for as long as one of them is open.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from support.required_programs import missing
from thrave.compute.errors import LibraryNotInstalled
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection

URI = "test:///default"

_XML = """\
<domain type="{kind}">
  <name>{name}</name>
  <memory unit="MiB">64</memory>
  <os><type arch="x86_64">hvm</type></os>
  {features}
  <devices>
    <disk type="file" device="cdrom"><driver name="qemu" type="raw"/><target dev="hda"/></disk>
    <disk type="file" device="disk"><driver name="qemu" type="{format}"/>
      <source file="{disk}"/><target dev="vda"/></disk>
    {channel}
  </devices>
</domain>
"""
_ACPI = "<features><acpi/></features>"
_CHANNEL = '<channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>'


def domain_xml(name, disk, *, kind="test", image_format="raw", acpi=True, channel=False):
    """Return the XML of a domain with an empty CD drive and a disk."""
    features, agent = _ACPI if acpi else "", _CHANNEL if channel else ""
    return _XML.format(kind=kind, name=name, disk=disk, format=image_format, features=features, channel=agent)


class LibvirtTestDriver:
    """Domains of libvirt's test driver."""

    def __init__(self, hypervisor: LibvirtConnection) -> None:
        """Use a connection; the domains exist as long as it is open."""
        self._hypervisor = hypervisor
        self._defined: list[str] = []

    def define(self, name, disk, **details):
        """Define a domain, which is off; return its UUID. Details as for `domain_xml`."""
        with self._hypervisor.session() as connection:
            self._defined.append(name)
            return connection.defineXML(domain_xml(name, disk, **details)).UUIDString()

    def start(self, name):
        """Start a domain without our driver."""
        with self._hypervisor.session() as connection:
            connection.lookupByName(name).create()

    def metadata(self, name, element, *, key="thrave", uri="https://thrave.dev/xmlns/instance/1"):
        """Write an element into a domain's metadata, as an operator would."""
        with self._hypervisor.session() as connection:
            connection.lookupByName(name).setMetadata(2, element, key, uri, 2)

    def definition(self, name):
        """Return the XML of a domain."""
        with self._hypervisor.session() as connection:
            return connection.lookupByName(name).XMLDesc(2)

    def forget(self):
        """Remove all domains that were defined here."""
        with self._hypervisor.session() as connection:
            for domain in connection.listAllDomains():
                if domain.name() in self._defined:
                    if domain.isActive():
                        domain.destroy()
                    domain.undefine()


@contextmanager
def libvirt_test_driver() -> Iterator[LibvirtTestDriver]:
    """Yield the test driver; remove the test's domains after the block."""
    hypervisor = LibvirtConnection(URI, DomainEvents())
    try:
        driver = LibvirtTestDriver(hypervisor)
        with hypervisor.session():
            pass
    except LibraryNotInstalled as error:
        missing(error.component, package=error.package)
    try:
        yield driver
    finally:
        driver.forget()
        hypervisor.close()
