"""Changes of an instance's file are compare-and-set: what was decided upon an older state is not written."""

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
def test_a_change_from_another_state_than_was_seen_is_refused(folder, described, before, after):
    description = described(state=before)
    folder.create(description)
    for seen in STATES:
        if seen is not before:
            with pytest.raises(StateChangedError, match=f"has become {before}"):
                folder.change(description.instance_id, after, seen=described(**{**vars(description), "state": seen}))
    assert folder.read(description.instance_id).state is before


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_nothing_leads_out_of_terminated_and_nothing_comes_back_unless_it_was_seen(folder, described, before, after):
    description = described(state=before)
    folder.create(description)
    is_right = after in TERMINATING if before in TERMINATING else True
    is_right = is_right and not (before is InstanceState.TERMINATED is not after)
    if is_right:
        folder.change(description.instance_id, after)
    else:
        with pytest.raises(StateChangedError):
            folder.change(description.instance_id, after)
    assert folder.read(description.instance_id).state is (after if is_right else before)


def test_a_start_in_between_is_seen_though_the_state_is_the_same_again(folder, described):
    seen = described(state=InstanceState.STOPPING)
    folder.create(seen)
    folder.change(seen.instance_id, InstanceState.RUNNING, launch_time=datetime.now(UTC))
    folder.change(seen.instance_id, InstanceState.STOPPING)
    with pytest.raises(StateChangedError):
        folder.change(seen.instance_id, InstanceState.STOPPED, seen=seen)


def test_the_end_of_a_stop_command_changes_nothing_once_the_instance_was_started(instances, added, monkeypatch):
    instance_id = added(stop_command=("true",), start_command=("true",))
    change, late = DescriptionFiles.change, []

    def starts_before(self, instance_id, state, **more):
        if state is InstanceState.STOPPED and not late:
            late.append(state)
            instances.start(instance_id)
        change(self, instance_id, state, **more)

    monkeypatch.setattr(DescriptionFiles, "change", starts_before)
    instances.request_stop(instance_id)
    assert eventually(lambda: instances.state(instance_id) is InstanceState.RUNNING)
    assert late


def test_an_instance_terminated_while_it_is_started_stays_so_and_its_machine_is_stopped(instances, added, tmp_path):
    gate, begun, stopped = tmp_path / "gate", tmp_path / "begun", tmp_path / "stopped"
    instance_id = added(
        state="stopped", start_command=command_that_waits(gate, begun), stop_command=("touch", str(stopped))
    )
    errors = []

    def start():
        try:
            instances.start(instance_id)
        except IncorrectInstanceState as error:
            errors.append(str(error))

    starting = threading.Thread(target=start)
    starting.start()
    assert eventually(begun.exists)
    instances.terminate(instance_id)
    gate.touch()
    starting.join()
    assert errors == [f"{instance_id} has become terminated meanwhile"]
    assert eventually(stopped.exists)
    assert instances.state(instance_id) is InstanceState.TERMINATED


def test_a_terminate_that_its_command_refuses_leaves_the_instance_running(instances, added):
    instance_id = added(stop_command=("false",))
    with pytest.raises(Exception, match="ended with 1"):
        instances.terminate(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_whoever_holds_the_lock_on_a_file_for_too_long_is_not_waited_for(folder, described, root, monkeypatch):
    description = described()
    folder.create(description)
    monkeypatch.setattr("thrave.files.LOCK_TIMEOUT", 0.1)
    with file_lock(root / ".locks" / f"{description.instance_id}.change", wait=False):
        for ask in (
            lambda: folder.change(description.instance_id, InstanceState.STOPPED),
            lambda: folder.remove(description.instance_id),
        ):
            with pytest.raises(InstanceLocked):
                ask()
    folder.change(description.instance_id, InstanceState.STOPPED)
