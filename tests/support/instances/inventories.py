"""One inventory of instances for each driver, with what the contract tests need in addition."""

import uuid
from contextlib import ExitStack, contextmanager

from support.eventually import eventually
from support.instances.command_machine import Machine
from support.libvirt.libvirt_test_driver import URI, libvirt_test_driver
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver, new_instance_id
from thrave.compute.instance import VolumeFile
from thrave.compute.libvirt.driver import LibvirtDriver

ACCOUNT = "123456789012"


class Files:
    """Instances described by files without commands."""

    def __init__(self, folder, disk):
        """Create an inventory in `folder`; each instance has the root volume `disk`."""
        self._root = folder / "instances"
        self._disk = disk
        self.instances = self.open_again()
        self.remove = self.instances.remove

    def open_again(self):
        """Open the same instances as another process would."""
        return DirectoryDriver(self._root, command_timeout=20.0)

    def add(self):
        """Add an instance and return its id."""
        return self._add()

    def hold_code(self, instance_id):
        """Return Python code for another process: the start of a block in which the instance is held."""
        return (
            "from pathlib import Path; from thrave.compute.directory_driver import DirectoryDriver\n"
            f"with DirectoryDriver(Path({str(self._root)!r})).hold_stopped({instance_id!r}):"
        )

    def close(self):
        """Release all resources."""

    def _add(self, **details):
        description = InstanceDescription(
            instance_id=new_instance_id(),
            account_id=ACCOUNT,
            platform="windows",
            root_volume=VolumeFile(path=self._disk),
            **details,
        )
        self.instances.add(description)
        return description.instance_id


class Commands(Files):
    """Instances with commands; the first one is connected to a simulated machine."""

    def __init__(self, folder, disk):
        """Create an inventory and the machine in `folder`; each instance has the root volume `disk`."""
        super().__init__(folder, disk)
        (folder / "machine").mkdir()
        self._machine = Machine(folder / "machine")
        self._is_first = True

    def add(self):
        """Add an instance and return its id. Only the first one has the commands of the machine."""
        commands = self._machine.commands if self._is_first else {}
        self._is_first = False
        return self._add(**commands)


class Domains:
    """Domains of libvirt's test driver, which has no guests."""

    def __init__(self, folder, disk):
        """Use `folder` for locks; each domain has the root volume `disk`."""
        self._folder = folder
        self._disk = disk
        self._stack = ExitStack()
        self.names = {}
        self.libvirt = self._stack.enter_context(libvirt_test_driver())
        self.instances = self.open_again()
        self.instances.list()  # connects: from now on the driver receives events
        self.remove = self.instances.disown

    def open_again(self):
        """Open the same instances as another process would."""
        instances = LibvirtDriver(URI, lock_folder=self._folder / "locks")
        self._stack.callback(instances.close)
        return instances

    def add(self, **metadata):
        """Start and adopt a new domain; return its instance id."""
        name = f"guest-{uuid.uuid4()}"
        machine = self.libvirt.define(name, self._disk)
        self.libvirt.start(name)
        # A start event that arrived after the adoption would count as another start.
        eventually(lambda: self.instances._events.history(machine).starts, "libvirt reports the start", interval=0.001)
        instance_id = self.instances.adopt(name, account_id=ACCOUNT, platform="windows", **metadata).instance_id
        self.names[instance_id] = name
        return instance_id

    @contextmanager
    def domain(self, instance_id):
        """Yield the domain of an instance, for changes by other clients."""
        with self.libvirt._hypervisor.session() as connection:
            yield connection.lookupByName(self.names[instance_id])

    def hold_code(self, instance_id):
        """See `Files.hold_code`. The test driver exists for each process, so the code defines the domain again."""
        definition = self.libvirt.definition(self.names[instance_id])
        return (
            "from pathlib import Path; from thrave.compute.libvirt.connection import DomainEvents\n"
            "from thrave.compute.libvirt.connection import LibvirtConnection\n"
            "from thrave.compute.libvirt.driver import LibvirtDriver\n"
            f"hypervisor = LibvirtConnection({URI!r}, DomainEvents())\n"
            f"with hypervisor.session() as connection: connection.defineXML({definition!r})\n"
            f"driver = LibvirtDriver({URI!r}, lock_folder=Path({str(self._folder / 'locks')!r}))\n"
            f"with driver.hold_stopped({instance_id!r}):"
        )

    def close(self):
        """Close all connections; with the last one the domains end."""
        self._stack.close()
