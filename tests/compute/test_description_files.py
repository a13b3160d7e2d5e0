"""Changes of an instance file are compare-and-set: a change that was decided on an older state is refused."""

import threading
from datetime import UTC, datetime

import pytest

from support.eventually import eventually
from support.instances.command_machine import command_that_waits
from thrave.compute.description_files import DescriptionFiles
from thrave.compute.errors import IncorrectInstanceState, InstanceLocked, StateChangedError
from thrave.compute.instance import TERMINATING, InstanceState
from thrave.files import file_lock

STATES = [*InstanceState]


@pytest.fixture
def folder(root):
    return DescriptionFiles(root)


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_change_state_refuses_other_state_than_seen(folder, described, before, after):
    description = described(state=before)
    folder.create(description)
    for seen in STATES:
        if seen is not before:
            with pytest.raises(StateChangedError, match=f"has become {before}"):
                folder.change_state(
                    description.instance_id, after, seen=described(**{**vars(description), "state": seen})
                )
    assert folder.read(description.instance_id).state is before


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_change_state_without_seen_never_leaves_terminating_states(folder, described, before, after):
    description = described(state=before)
    folder.create(description)
    is_allowed = after in TERMINATING if before in TERMINATING else True
    is_allowed = is_allowed and not (before is InstanceState.TERMINATED is not after)
    if is_allowed:
        folder.change_state(description.instance_id, after)
    else:
        with pytest.raises(StateChangedError):
            folder.change_state(description.instance_id, after)
    assert folder.read(description.instance_id).state is (after if is_allowed else before)


def test_change_state_detects_start_in_between(folder, described):
    seen = described(state=InstanceState.STOPPING)
    folder.create(seen)
    folder.change_state(seen.instance_id, InstanceState.RUNNING, launch_time=datetime.now(UTC))
    folder.change_state(seen.instance_id, InstanceState.STOPPING)
    with pytest.raises(StateChangedError):
        folder.change_state(seen.instance_id, InstanceState.STOPPED, seen=seen)


def test_end_of_stop_command_is_ignored_after_start(instances, added, monkeypatch):
    instance_id = added(stop_command=("true",), start_command=("true",))
    change_state, started = DescriptionFiles.change_state, []

    def start_first(self, instance_id, state, **options):
        if state is InstanceState.STOPPED and not started:
            started.append(state)
            instances.start(instance_id)
        change_state(self, instance_id, state, **options)

    monkeypatch.setattr(DescriptionFiles, "change_state", start_first)
    instances.request_stop(instance_id)
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)
    assert started


def test_instance_terminated_during_start_is_stopped(instances, added, tmp_path):
    gate, has_begun, stopped = tmp_path / "gate", tmp_path / "begun", tmp_path / "stopped"
    instance_id = added(
        state="stopped", start_command=command_that_waits(gate, has_begun), stop_command=("touch", str(stopped))
    )
    errors = []

    def start():
        try:
            instances.start(instance_id)
        except IncorrectInstanceState as error:
            errors.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    assert eventually(has_begun.exists)
    instances.terminate(instance_id)
    gate.touch()
    thread.join()
    assert errors == [f"{instance_id} has become terminated meanwhile"]
    assert eventually(stopped.exists)
    assert instances.state(instance_id) is InstanceState.TERMINATED


def test_terminate_whose_command_fails_keeps_instance_running(instances, added):
    instance_id = added(stop_command=("false",))
    with pytest.raises(Exception, match="ended with 1"):
        instances.terminate(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_change_raises_if_file_stays_locked(folder, described, root, monkeypatch):
    description = described()
    folder.create(description)
    monkeypatch.setattr("thrave.files.LOCK_TIMEOUT", 0.1)
    with file_lock(root / ".locks" / f"{description.instance_id}.change", wait=False):
        for change in (
            lambda: folder.change_state(description.instance_id, InstanceState.STOPPED),
            lambda: folder.remove(description.instance_id),
        ):
            with pytest.raises(InstanceLocked):
                change()
    folder.change_state(description.instance_id, InstanceState.STOPPED)
