"""Power switched for somebody who waits, and for somebody who does not."""

import errno
import os
import sys
import time

import pytest

from thrave import files
from thrave.compute.directory import DirectoryInstances
from thrave.compute.instance import InstanceState
from thrave.compute.power import PowerRequests, power_off

DEAF = (sys.executable, "-c", "")


@pytest.fixture(params=["files", "commands"])
def instance_id(request, added, machine):
    return added() if request.param == "files" else added(**machine.commands)


@pytest.fixture
def requests(instances):
    """Requests that have all been seen to before the folder of the instances goes."""
    requests = PowerRequests(instances, grace=20.0)
    yield requests
    assert wait_for(lambda: not requests._busy)


def wait_for(condition):
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_guest_powers_off_and_one_that_is_off_is_left_alone(instances, instance_id):
    for _ in range(2):
        assert power_off(instances, instance_id, grace=20.0) is InstanceState.STOPPED


def test_a_deaf_guest_stays_up(instances, added):
    instance_id = added(stop_command=DEAF, state_command=("echo", "running"))
    assert power_off(instances, instance_id, grace=0.5) is InstanceState.RUNNING


def test_what_is_gone_is_not_waited_for(instances, added):
    assert power_off(instances, added(state="terminated"), grace=20.0) is InstanceState.TERMINATED


def test_a_pause_may_end_the_wait(instances, added):
    def interrupt(seconds):
        raise KeyboardInterrupt

    instance_id = added(stop_command=DEAF, state_command=("echo", "running"))
    with pytest.raises(KeyboardInterrupt):
        power_off(instances, instance_id, grace=20.0, pause=interrupt)


def test_a_request_to_start_starts(instances, instance_id, requests):
    instances.request_stop(instance_id)
    requests.start(instance_id)
    assert wait_for(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_a_request_to_start_waits_for_whoever_holds_the_instance(instances, instance_id, requests):
    instances.request_stop(instance_id)
    with instances.hold(instance_id):
        requests.start(instance_id)
        requests.start(instance_id)
        assert instances.state(instance_id) is InstanceState.STOPPED
    assert wait_for(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_a_reboot_stops_and_starts(instances, instance_id, requests):
    before = instances.get(instance_id).launch_time
    requests.reboot(instance_id)
    assert wait_for(lambda: instances.get(instance_id).launch_time > before)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_a_deaf_guest_is_not_rebooted_and_the_log_says_so(instances, added, caplog):
    instance_id = added(stop_command=DEAF, start_command=DEAF, state_command=("echo", "running"))
    PowerRequests(instances, grace=0.2).reboot(instance_id)
    assert wait_for(lambda: "did not power off" in caplog.text)


def test_what_goes_wrong_is_logged_and_the_next_request_is_heard(root, added, caplog):
    instance_id = added(state="stopped", start_command=(sys.executable, "-c", "import sys; sys.exit('no memory')"))
    requests = PowerRequests(DirectoryInstances(root), grace=1.0)
    for times in (1, 2):
        requests.start(instance_id)
        assert wait_for(lambda times=times: caplog.text.count("no memory") == times)
        assert wait_for(lambda: not requests._busy)


def test_a_folder_that_cannot_be_written_is_logged_too(instances, added, requests, caplog, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    instance_id = added(state="stopped")
    monkeypatch.setattr(files, "replace", full)
    requests.start(instance_id)
    assert wait_for(lambda: f"start of {instance_id}: [Errno 28]" in caplog.text)
