"""The table of states against EC2's own enumeration, and against what the docs promise of it."""

import botocore.session
import pytest

from thrave.tasks.models import CANCELLABLE, FINISHED, FOLLOWS, BundleTaskState, before


def test_the_states_are_exactly_those_of_ec2s_model():
    model = botocore.session.get_session().get_service_model("ec2")
    assert [*BundleTaskState] == model.shape_for("BundleTaskState").enum


def test_every_state_has_a_row():
    assert set(FOLLOWS) == set(BundleTaskState)


@pytest.mark.parametrize("state", sorted(FINISHED))
def test_nothing_follows_an_end(state):
    assert FOLLOWS[state] == frozenset()


@pytest.mark.parametrize("state", sorted(set(BundleTaskState) - FINISHED))
def test_every_unfinished_state_can_fail(state):
    assert BundleTaskState.FAILED in FOLLOWS[state]


def test_what_can_be_cancelled_is_what_has_not_ended_and_is_not_being_cancelled():
    assert set(BundleTaskState) - FINISHED - {BundleTaskState.CANCELLING} == CANCELLABLE


def test_a_cancelled_task_can_only_fail():
    assert FOLLOWS[BundleTaskState.CANCELLING] == {BundleTaskState.FAILED}


def test_the_way_to_complete_has_no_short_cut():
    way, state = [], BundleTaskState.COMPLETE
    while before(state):
        (state,) = before(state)
        way.append(state)
    assert way == ["storing", "bundling", "waiting-for-shutdown", "pending"]
