"""Fixtures with instances of the directory driver."""

import gc

import pytest

from thrave.compute.commands import BackgroundStops
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver, new_instance_id
from thrave.compute.instance import VolumeFile


@pytest.fixture(autouse=True)
def kill_stop_commands():
    """Kill the stopCommands that a test has left in the background."""
    yield
    for stops in [found for found in gc.get_objects() if isinstance(found, BackgroundStops)]:
        for instance_id in [*stops._running]:
            stops.abandon(instance_id)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "root.raw"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "instances"


@pytest.fixture
def instances(root):
    return DirectoryDriver(root, command_timeout=20.0)


@pytest.fixture
def described(disk):
    """Return a function that describes an instance with the root volume `disk`."""

    def describe(**changes):
        return InstanceDescription(
            **{
                "instance_id": new_instance_id(),
                "account_id": "123456789012",
                "platform": "windows",
                "root_volume": VolumeFile(path=disk),
                **changes,
            }
        )

    return describe


@pytest.fixture
def added(instances, described):
    """Return a function that adds an instance and returns its id."""

    def add(**changes):
        description = described(**changes)
        instances.add(description)
        return description.instance_id

    return add
