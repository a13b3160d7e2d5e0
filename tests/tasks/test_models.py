"""The states and transitions of a task, compared with EC2's enumeration and with the documentation."""

import botocore.session
import pytest

from thrave.tasks.models import ALLOWED_FROM, CANCELLABLE, FINISHED, TASK_TRANSITIONS, BundleTaskState


def test_states_equal_those_of_ec2_model():
    model = botocore.session.get_session().get_service_model("ec2")
    assert [*BundleTaskState] == model.shape_for("BundleTaskState").enum


def test_task_transitions_have_every_state():
    assert set(TASK_TRANSITIONS) == set(BundleTaskState)


@pytest.mark.parametrize("state", sorted(FINISHED))
def test_finished_state_has_no_next_state(state):
    assert TASK_TRANSITIONS[state] == frozenset()


@pytest.mark.parametrize("state", sorted(set(BundleTaskState) - FINISHED))
def test_unfinished_state_can_become_failed(state):
    assert BundleTaskState.FAILED in TASK_TRANSITIONS[state]


def test_cancellable_states_are_unfinished_and_not_cancelling():
    assert set(BundleTaskState) - FINISHED - {BundleTaskState.CANCELLING} == CANCELLABLE


def test_cancelling_task_can_only_fail():
    assert TASK_TRANSITIONS[BundleTaskState.CANCELLING] == {BundleTaskState.FAILED}


def test_complete_is_reached_through_every_state():
    path, state = [], BundleTaskState.COMPLETE
    while ALLOWED_FROM[state]:
        (state,) = ALLOWED_FROM[state]
        path.append(state)
    assert path == ["storing", "bundling", "waiting-for-shutdown", "pending"]
