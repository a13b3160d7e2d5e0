"""One inventory of instances per driver, with what the contract tests need in addition."""

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
    """Instances that are only files."""

    def __init__(self, folder, disk):
        """Keep them in `folder`; each has the root volume `disk`."""
        self._root = folder / "instances"
        self._disk = disk
        self.instances = self.again()
        self.remove = self.instances.remove

    def again(self):
        """The same, as another process has them."""
        return DirectoryDriver(self._root, command_seconds=20.0)

    def add(self):
        """Another instance; its id."""
        return self._add()

    def holding(self, instance_id):
        """The Python code of a block in another process, in which an instance is held."""
        return (
            "from pathlib import Path; from thrave.compute.directory_driver import DirectoryDriver\n"
            f"with DirectoryDriver(Path({str(self._root)!r})).hold_stopped({instance_id!r}):"
        )

    def close(self):
        """Let go of what it needs."""

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
    """Instances that commands tie to a machine; all of them to the same."""

    def __init__(self, folder, disk):
        """Keep them, and the machine, in `folder`."""
        super().__init__(folder, disk)
        (folder / "machine").mkdir()
        self._machine = Machine(folder / "machine")
        self._is_first = True

    def add(self):
        """The first is tied to the machine, others to none."""
        commands = self._machine.commands if self._is_first else {}
        self._is_first = False
        return self._add(**commands)


class Domains:
    """Domains of libvirt's own pretence of a hypervisor."""

    def __init__(self, folder, disk):
        """Keep locks in `folder`; each domain has the root volume `disk`."""
        self._folder = folder
        self._disk = disk
        self._stack = ExitStack()
        self.names = {}
        self.libvirt = self._stack.enter_context(libvirt_test_driver())
        self.instances = self.again()
        self.instances.list()  # it is told of what happens from now on
        self.remove = self.instances.disown

    def again(self):
        """The same, as another process has them."""
        instances = LibvirtDriver(URI, lock_folder=self._folder / "locks")
        self._stack.callback(instances.close)
        return instances

    def add(self, **said):
        """Another domain that runs and was adopted; its instance id."""
        name = f"guest-{uuid.uuid4()}"
        machine = self.libvirt.define(name, self._disk)
        self.libvirt.start(name)
        # A start event that arrived after the adoption would count as another start.
        eventually(lambda: self.instances._events.history(machine).starts, "libvirt reports the start", interval=0.001)
        instance_id = self.instances.adopt(name, account_id=ACCOUNT, platform="windows", **said).instance_id
        self.names[instance_id] = name
        return instance_id

    @contextmanager
    def domain(self, instance_id):
        """The domain of an instance, for what others than the driver do to it."""
        with self.libvirt._hypervisor.session() as connection:
            yield connection.lookupByName(self.names[instance_id])

    def holding(self, instance_id):
        """See Files. Another process has another pretence, so it is told of the domain."""
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
        """Let go of every connection, and with the last of the domains."""
        self._stack.close()
