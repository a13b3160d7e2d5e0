"""The contract of `HypervisorDriver`, for files, files with commands, and libvirt domains."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from support.instances.inventories import Commands, Domains, Files
from thrave.compute.errors import IncorrectInstanceState, InstanceLocked, InstanceNotFound, RootVolumeInUse
from thrave.compute.instance import InstanceState
from thrave.write_guard import command_guard

UNKNOWN_IDS = [
    "",
    "i-",
    "i-00000000",
    "i-0123456789abcdef0",
    "I-01234567",
    "i-0123456789ABCDEF0",
    "../i-00000000",
    "i-\0",
    "*",
]


@pytest.fixture(params=[Files, Commands, pytest.param(Domains, marks=pytest.mark.libvirt)])
def inventory(request, tmp_path, disk):
    inventory = request.param(tmp_path, disk)
    try:
        yield inventory
    finally:
        inventory.close()


@pytest.fixture
def instances(inventory):
    return inventory.instances


@pytest.fixture
def instance_id(inventory):
    return inventory.add()


def test_get_returns_added_instance(instances, instance_id, disk):
    found = instances.get(instance_id)
    assert (found.instance_id, found.account_id, found.platform) == (instance_id, "123456789012", "windows")
    assert (found.root_device_type, found.architecture) == ("instance-store", "x86_64")
    assert (found.root_volume.path, found.root_volume.format, found.volumes) == (disk, "raw", ())
    assert found.state is InstanceState.RUNNING
    assert instances.list() == [found]


def test_get_owner_returns_recorded_account(instances, instance_id):
    assert instances.get_owner(instance_id) == instances.get(instance_id).account_id
    for unknown in UNKNOWN_IDS:
        with pytest.raises(InstanceNotFound):
            instances.get_owner(unknown)


def test_list_is_sorted_by_id(inventory, instances, instance_id):
    ids = [instance_id, *(inventory.add() for _ in range(5))]
    assert [found.instance_id for found in instances.list()] == sorted(ids)


def test_request_stop_and_start_change_state(instances, instance_id):
    instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED
    assert instances.get(instance_id).state is InstanceState.STOPPED
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_force_stop_stops_instance_that_can_be_started(instances, instance_id):
    for _ in range(2):
        instances.force_stop(instance_id)
        assert instances.state(instance_id) is InstanceState.STOPPED
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_force_stop_works_while_instance_is_held(instances, instance_id):
    with instances.hold_stopped(instance_id):
        instances.force_stop(instance_id)
        assert instances.state(instance_id) is InstanceState.STOPPED


def test_repeated_stop_and_start_change_nothing(instances, instance_id):
    instances.start(instance_id)
    for _ in range(3):
        instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED
    for _ in range(3):
        instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_launch_time_is_that_of_last_start(instances, instance_id):
    first = instances.get(instance_id).launch_time
    instances.start(instance_id)
    assert instances.get(instance_id).launch_time == first
    before = datetime.now(UTC)
    instances.request_stop(instance_id)
    instances.start(instance_id)
    assert before <= instances.get(instance_id).launch_time <= datetime.now(UTC)


def test_terminate_is_final(instances, instance_id, disk):
    for _ in range(2):
        instances.terminate(instance_id)
        assert instances.state(instance_id) is InstanceState.TERMINATED
    for method in (instances.request_stop, instances.force_stop, instances.start):
        with pytest.raises(IncorrectInstanceState, match="is terminated"):
            method(instance_id)
    assert [found.state for found in instances.list()] == [InstanceState.TERMINATED]
    assert disk.exists()


def test_terminate_works_while_instance_is_stopped_and_held(instances, instance_id):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id):
        instances.terminate(instance_id)
        assert instances.state(instance_id) is InstanceState.TERMINATED


def test_start_raises_while_instance_is_held(instances, instance_id):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id), pytest.raises(InstanceLocked):
        instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED
    instances.start(instance_id)


def test_hold_is_exclusive_and_allows_reads(inventory, instances, instance_id):
    other = inventory.add()
    with instances.hold_stopped(instance_id):
        with pytest.raises(InstanceLocked), instances.hold_stopped(instance_id):
            pass
        with instances.hold_stopped(other):
            assert instances.state(instance_id) is InstanceState.RUNNING
            assert len(instances.list()) == 2
    with instances.hold_stopped(instance_id):
        pass


def test_hold_ends_on_error(instances, instance_id):
    with pytest.raises(ZeroDivisionError), instances.hold_stopped(instance_id):
        raise ZeroDivisionError
    instances.start(instance_id)


def test_hold_ends_when_process_is_killed(inventory, instances, instance_id):
    code = f"{inventory.hold_code(instance_id)} print('held', flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InstanceLocked):
            instances.start(instance_id)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with instances.hold_stopped(instance_id):
        pass


@pytest.mark.parametrize("unknown", UNKNOWN_IDS)
def test_unknown_id_is_not_found(inventory, instances, instance_id, unknown):
    for method in (
        instances.get,
        instances.state,
        instances.request_stop,
        instances.force_stop,
        instances.start,
        instances.terminate,
        inventory.remove,
    ):
        with pytest.raises(InstanceNotFound):
            method(unknown)
    with pytest.raises(InstanceNotFound), instances.hold_stopped(unknown):
        pass


def test_other_process_lists_same_instances(inventory, instances, instance_id):
    instances.request_stop(instance_id)
    assert inventory.open_again().list() == instances.list()


def test_driver_is_thread_safe(instances, instance_id):
    def switch(number):
        with suppress(InstanceLocked):
            (instances.request_stop if number % 2 else instances.start)(instance_id)
        return instances.get(instance_id).instance_id

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(switch, range(24))) == {instance_id}
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_hold_check_raises_if_instance_is_running(instances, instance_id):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id) as hold:
        for _ in range(3):
            hold.check()
    instances.start(instance_id)
    with (
        instances.hold_stopped(instance_id) as hold,
        pytest.raises(RootVolumeInUse, match="is running while its root volume"),
    ):
        hold.check()


def test_find_users_returns_running_machines_with_disk(inventory, instances, instance_id, disk):
    other = inventory.add()
    compared = []

    def is_same(volume):
        compared.append(volume.path)
        return volume.path == disk

    (name,) = instances.find_users(is_same, except_instance=instance_id)
    assert (disk in compared, instance_id in name) == (True, False)
    assert len(instances.find_users(is_same, except_instance="i-00000000")) == 2
    assert not instances.find_users(lambda _: False, except_instance="i-00000000")
    instances.request_stop(other)
    assert not instances.find_users(is_same, except_instance=instance_id)


def test_remove_deletes_instance_and_keeps_volume(inventory, instances, instance_id, disk):
    with instances.hold_stopped(instance_id), pytest.raises(InstanceLocked):
        inventory.remove(instance_id)
    inventory.remove(instance_id)
    assert instances.list() == []
    assert disk.exists()


class NotAllowedError(Exception):
    """Another process may have started the instance."""


@pytest.mark.parametrize("command", ["request_stop", "force_stop", "terminate"])
def test_commands_that_stop_check_guard_right_before_command(instances, instance_id, command):
    def refuse():
        if asked:
            raise NotAllowedError
        asked.append(True)  # entering the block checks once

    asked = []
    with pytest.raises(NotAllowedError), command_guard.using(refuse):
        getattr(instances, command)(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING
    getattr(instances, command)(instance_id)


def test_start_checks_guard_right_before_command(instances, instance_id):
    instances.request_stop(instance_id)
    allowed = [None]

    def check():
        if not allowed:
            raise NotAllowedError
        allowed.pop()

    with pytest.raises(NotAllowedError), command_guard.using(check):
        instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING
