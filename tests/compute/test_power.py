"""Shutting an instance down, and power requests that are carried out in the background."""

import errno
import os
import sys
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from support.eventually import eventually
from support.instances.command_machine import command_that_waits
from thrave import files
from thrave.compute import power
from thrave.compute.directory_driver import DirectoryDriver
from thrave.compute.errors import IncorrectInstanceState
from thrave.compute.instance import InstanceState
from thrave.compute.power import BackgroundPower, shut_down_guest
from thrave.compute.power_records import PowerAction, PowerRecords

NO_EFFECT = (sys.executable, "-c", "")


@pytest.fixture(params=["files", "commands"])
def instance_id(request, added, machine):
    return added() if request.param == "files" else added(**machine.commands)


@pytest.fixture
def requests(instances):
    """Background power; waits until all requests are carried out before the folder of the instances is removed."""
    power = BackgroundPower(instances, shutdown_timeout=20.0)
    yield power
    assert eventually(lambda: not power._wake_events)


def test_shut_down_guest_stops_instance_and_accepts_stopped_one(instances, instance_id):
    for _ in range(2):
        assert shut_down_guest(instances, instance_id, timeout=20.0) is InstanceState.STOPPED


def test_shut_down_guest_returns_running_after_timeout(instances, added):
    instance_id = added(stop_command=NO_EFFECT, state_command=("echo", "running"))
    assert shut_down_guest(instances, instance_id, timeout=0.5) is InstanceState.RUNNING


def test_shut_down_guest_does_not_count_time_in_which_process_was_stopped(monkeypatch):
    """As after SIGSTOP: an hour passes between two polls."""
    clock, requested, states = [1.0], [], [InstanceState.RUNNING] * 3 + [InstanceState.STOPPED]
    monkeypatch.setattr("thrave.compute.power.monotonic", lambda: clock[0])
    instances = SimpleNamespace(state=lambda _instance_id: states.pop(0), request_stop=requested.append)

    def pause(_seconds):
        clock[0] += 3600.0

    assert shut_down_guest(instances, "i-00000000", timeout=600.0, pause=pause) is InstanceState.STOPPED
    assert requested == ["i-00000000"] * 3


def test_shut_down_guest_returns_at_once_if_terminated(instances, added):
    assert shut_down_guest(instances, added(state="terminated"), timeout=20.0) is InstanceState.TERMINATED


def test_shut_down_guest_raises_error_of_pause(instances, added):
    def interrupt(seconds):
        raise KeyboardInterrupt

    instance_id = added(stop_command=NO_EFFECT, state_command=("echo", "running"))
    with pytest.raises(KeyboardInterrupt):
        shut_down_guest(instances, instance_id, timeout=20.0, pause=interrupt)


def test_start_request_starts_instance(instances, instance_id, requests):
    instances.request_stop(instance_id)
    requests.start(instance_id)
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_start_request_waits_while_instance_is_locked(instances, instance_id, requests):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id):
        requests.start(instance_id)
        requests.start(instance_id)
        assert instances.state(instance_id) is InstanceState.STOPPED
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_reboot_request_stops_and_starts(instances, instance_id, requests):
    before = instances.get(instance_id).launch_time
    requests.reboot(instance_id)
    assert eventually(lambda: instances.get(instance_id).launch_time > before)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_reboot_request_fails_if_guest_does_not_power_off(instances, added):
    instance_id = added(stop_command=NO_EFFECT, start_command=NO_EFFECT, state_command=("echo", "running"))
    with capture_logs() as logs:
        BackgroundPower(instances, shutdown_timeout=0.2).reboot(instance_id)
        assert eventually(lambda: any("did not power off" in entry.get("error", "") for entry in logs))


def test_failed_request_is_logged_and_retried(root, added, tmp_path):
    gate = tmp_path / "gate"
    code = f"import os, sys; os.path.exists({str(gate)!r}) or sys.exit('no memory')"
    instance_id = added(state="stopped", start_command=(sys.executable, "-c", code))
    instances = DirectoryDriver(root)
    with capture_logs() as logs:
        BackgroundPower(instances, shutdown_timeout=1.0).start(instance_id)
        assert eventually(lambda: sum("no memory" in entry.get("error", "") for entry in [*logs]) > 1)
    gate.touch()
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_request_is_retried_if_disk_is_full(instances, added, requests, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    instance_id = added(state="stopped")
    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(files, "replace", full)
        requests.start(instance_id)
        assert eventually(lambda: any("[Errno 28]" in entry.get("error", "") for entry in [*logs]))
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


@pytest.mark.parametrize(
    ("command", "first", "then", "state"),
    [
        ("stop_command", "reboot", "stop", InstanceState.STOPPED),
        ("start_command", "start", "stop", InstanceState.STOPPED),
        ("start_command", "start", "terminate", InstanceState.TERMINATED),
        ("start_command", "start", "reboot", InstanceState.RUNNING),
        ("stop_command", "stop", "reboot", InstanceState.RUNNING),
    ],
)
def test_request_during_command_replaces_earlier_request(
    instances, added, requests, tmp_path, command, first, then, state
):
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    instance_id = added(
        state="running" if command == "stop_command" else "stopped", **{command: command_that_waits(gate, begun)}
    )
    getattr(requests, first)(instance_id)
    assert eventually(begun.exists)
    getattr(requests, then)(instance_id)
    gate.touch()
    assert eventually(lambda: not requests._wake_events)
    assert instances.state(instance_id) is state


def test_hanging_or_failing_instance_does_not_delay_others(instances, added, requests, tmp_path):
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    hanging = added(state="stopped", start_command=command_that_waits(gate, begun))
    failing = added(state="stopped", start_command=("false",))
    others = [added(), added()]
    for instance_id in (hanging, failing):
        requests.start(instance_id)
    assert eventually(begun.exists)
    for instance_id in others:
        requests.stop(instance_id)
    assert eventually(lambda: {instances.state(instance_id) for instance_id in others} == {InstanceState.STOPPED})
    assert not gate.exists()
    gate.touch()
    requests.terminate(failing)


def test_terminating_instance_rejects_start_and_stop(instances, added, requests):
    instance_id = added(stop_command=NO_EFFECT, state_command=("echo", "running"))
    requests.terminate(instance_id)
    for request in (requests.start, requests.stop):
        with pytest.raises(IncorrectInstanceState, match="shutting-down"):
            request(instance_id)
    requests.reboot(instance_id)  # ignored
    requests.terminate(instance_id)
    assert instances.state(instance_id) is InstanceState.SHUTTING_DOWN
    record = requests._power_records.get(instance_id)
    assert record.request == "terminate"
    requests._power_records.finish_request(record)


def test_recorded_request_is_carried_out_by_next_process(instances, added):
    instance_id, records = added(), PowerRecords.in_memory()
    records.add_request(instance_id, PowerAction.REBOOT)
    assert records.record_shutdown_request(records.get(instance_id))
    instances.request_stop(instance_id)  # then the process was killed
    BackgroundPower(instances, records, shutdown_timeout=20.0).resume_pending()
    assert eventually(lambda: not records.list_pending())
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_start_request_repeats_interrupted_start(instances, added, requests, tmp_path):
    instance_id = added(state="pending", start_command=("touch", str(tmp_path / "started")))
    requests.start(instance_id)
    assert eventually((tmp_path / "started").exists)
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_request_of_another_process_interrupts_wait_of_failed_one(instances, added, monkeypatch):
    monkeypatch.setattr(power, "POLL_INTERVAL", 3600.0)
    monkeypatch.setattr(power, "MAX_RETRY_INTERVAL", 3600.0)
    instance_id, records = added(state="stopped", start_command=("false",)), PowerRecords.in_memory()
    requests = BackgroundPower(instances, records, shutdown_timeout=20.0)
    records.add_request(instance_id, PowerAction.START)
    with capture_logs() as logs:
        requests.resume_pending()
        assert eventually(lambda: any(entry["event"] == "power request failed, retrying" for entry in [*logs]))
        requests.resume_pending()  # does not end the wait
    records.add_request(instance_id, PowerAction.STOP)
    requests.resume_pending()
    assert eventually(lambda: not requests._wake_events)
    assert not records.list_pending()
    assert len([entry for entry in logs if "retrying" in entry["event"]]) == 1
