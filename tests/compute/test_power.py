"""Power switched for somebody who waits, and for somebody who does not."""

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
from thrave.compute.power import BackgroundPower, power_off
from thrave.compute.power_records import PowerAction, PowerRecords

DEAF = (sys.executable, "-c", "")


@pytest.fixture(params=["files", "commands"])
def instance_id(request, added, machine):
    return added() if request.param == "files" else added(**machine.commands)


@pytest.fixture
def requests(instances):
    """Requests that have all been seen to before the folder of the instances goes."""
    requests = BackgroundPower(instances, grace=20.0)
    yield requests
    assert eventually(lambda: not requests._busy)


def test_a_guest_powers_off_and_one_that_is_off_is_left_alone(instances, instance_id):
    for _ in range(2):
        assert power_off(instances, instance_id, grace=20.0) is InstanceState.STOPPED


def test_a_deaf_guest_stays_up(instances, added):
    instance_id = added(stop_command=DEAF, state_command=("echo", "running"))
    assert power_off(instances, instance_id, grace=0.5) is InstanceState.RUNNING


def test_time_in_which_this_process_stood_still_is_not_the_guests(monkeypatch):
    """As after SIGSTOP: an hour passes between two looks."""
    clock, asked, states = [1.0], [], [InstanceState.RUNNING] * 3 + [InstanceState.STOPPED]
    monkeypatch.setattr("thrave.compute.power.monotonic", lambda: clock[0])
    instances = SimpleNamespace(state=lambda _instance_id: states.pop(0), request_stop=asked.append)

    def pause(_seconds):
        clock[0] += 3600.0

    assert power_off(instances, "i-00000000", grace=600.0, pause=pause) is InstanceState.STOPPED
    assert asked == ["i-00000000"] * 3


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
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_a_request_to_start_waits_for_whoever_holds_the_instance(instances, instance_id, requests):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id):
        requests.start(instance_id)
        requests.start(instance_id)
        assert instances.state(instance_id) is InstanceState.STOPPED
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_a_reboot_stops_and_starts(instances, instance_id, requests):
    before = instances.get(instance_id).launch_time
    requests.reboot(instance_id)
    assert eventually(lambda: instances.get(instance_id).launch_time > before)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_a_deaf_guest_is_not_rebooted_and_the_log_says_so(instances, added):
    instance_id = added(stop_command=DEAF, start_command=DEAF, state_command=("echo", "running"))
    with capture_logs() as logs:
        BackgroundPower(instances, grace=0.2).reboot(instance_id)
        assert eventually(lambda: any("did not power off" in entry.get("error", "") for entry in logs))


def test_what_goes_wrong_is_logged_and_tried_again(root, added, tmp_path):
    gate = tmp_path / "gate"
    code = f"import os, sys; os.path.exists({str(gate)!r}) or sys.exit('no memory')"
    instance_id = added(state="stopped", start_command=(sys.executable, "-c", code))
    instances = DirectoryDriver(root)
    with capture_logs() as logs:
        BackgroundPower(instances, grace=1.0).start(instance_id)
        assert eventually(lambda: sum("no memory" in entry.get("error", "") for entry in [*logs]) > 1)
    gate.touch()
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_a_folder_that_cannot_be_written_delays_a_request_and_is_logged(instances, added, requests, monkeypatch):
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
def test_what_is_asked_while_a_command_runs_takes_the_place_of_what_was_asked(
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
    assert eventually(lambda: not requests._busy)
    assert instances.state(instance_id) is state


def test_an_instance_that_hangs_or_fails_holds_up_no_other(instances, added, requests, tmp_path):
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


def test_nothing_but_terminating_again_is_asked_of_an_instance_that_is_being_terminated(instances, added, requests):
    instance_id = added(stop_command=DEAF, state_command=("echo", "running"))
    requests.terminate(instance_id)
    for ask in (requests.start, requests.stop):
        with pytest.raises(IncorrectInstanceState, match="shutting-down"):
            ask(instance_id)
    requests.reboot(instance_id)  # is ignored
    requests.terminate(instance_id)
    assert instances.state(instance_id) is InstanceState.SHUTTING_DOWN
    for record in [requests._records.get(instance_id)]:
        assert record.request == "terminate"
        requests._records.finish(record)


def test_what_was_accepted_is_carried_out_by_the_next_process(instances, added):
    instance_id, records = added(), PowerRecords.in_memory()
    records.request(instance_id, PowerAction.REBOOT)
    assert records.note_asked(records.get(instance_id))
    instances.request_stop(instance_id)  # and then the process died
    BackgroundPower(instances, records, grace=20.0).look()
    assert eventually(lambda: not records.to_do())
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_a_start_that_was_cut_off_is_repeated(instances, added, requests, tmp_path):
    instance_id = added(state="pending", start_command=("touch", str(tmp_path / "started")))
    requests.start(instance_id)
    assert eventually((tmp_path / "started").exists)
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)


def test_a_request_of_another_process_does_not_wait_for_one_that_fails(instances, added, monkeypatch):
    monkeypatch.setattr(power, "LOOK_AGAIN", 3600.0)
    monkeypatch.setattr(power, "LONGEST", 3600.0)
    instance_id, records = added(state="stopped", start_command=("false",)), PowerRecords.in_memory()
    requests = BackgroundPower(instances, records, grace=20.0)
    records.request(instance_id, PowerAction.START)
    with capture_logs() as logs:
        requests.look()
        assert eventually(lambda: any(entry["event"] == "power request failed, retrying" for entry in [*logs]))
        requests.look()  # wakes nothing
    records.request(instance_id, PowerAction.STOP)
    requests.look()
    assert eventually(lambda: not requests._busy)
    assert not records.to_do()
    assert len([entry for entry in logs if "retrying" in entry["event"]]) == 1
