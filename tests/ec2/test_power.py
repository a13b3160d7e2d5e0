"""StartInstances, StopInstances, RebootInstances and TerminateInstances, through boto3."""

import sys
from datetime import UTC, datetime, timedelta

import pytest
from botocore.exceptions import ClientError
from structlog.testing import capture_logs

from support.buckets.s3_storage import storage
from support.eventually import eventually, one_of
from thrave.compute.instance import InstanceState

STATES = {state.value: {"Code": state.code, "Name": state.value} for state in InstanceState}
ANSWER = {"start": "StartingInstances", "stop": "StoppingInstances", "terminate": "TerminatingInstances"}
DOES = ["start", "stop", "reboot", "terminate"]
INSTANCE = "i-0000000a"


def ask(ec2, what, *instance_ids, **options):
    return getattr(ec2, f"{what}_instances")(InstanceIds=[*instance_ids], **options)


def refusal(ec2, what, *instance_ids, **options):
    with pytest.raises(ClientError) as refused:
        ask(ec2, what, *instance_ids, **options)
    return refused.value.response["Error"]


@pytest.mark.parametrize(
    ("what", "before", "said", "after"),
    [
        ("start", "stopped", "pending", "running"),
        ("start", "running", "running", "running"),
        ("start", "pending", "pending", "running"),
        ("stop", "running", "stopping", "stopped"),
        ("stop", "pending", "stopping", "stopped"),
        ("stop", "stopped", "stopped", "stopped"),
        ("terminate", "running", "shutting-down", "terminated"),
        ("terminate", "stopped", "shutting-down", "terminated"),
        ("terminate", "terminated", "terminated", "terminated"),
    ],
)
def test_the_answer_says_what_the_state_was_and_what_it_is_becoming(service, ec2, what, before, said, after):
    service.add_instance(INSTANCE, state=before)
    change = {"InstanceId": INSTANCE, "PreviousState": STATES[before], "CurrentState": STATES[said]}
    assert ask(ec2, what, INSTANCE)[ANSWER[what]] == [change]
    assert eventually(lambda: service.instances.state(INSTANCE), until=one_of(after)) == after


def test_boto3s_waiters_see_what_they_wait_for(service, ec2):
    service.add_instance(INSTANCE)
    for what, waiter in (("stop", "stopped"), ("start", "running"), ("terminate", "terminated")):
        ask(ec2, what, INSTANCE)
        ec2.get_waiter(f"instance_{waiter}").wait(InstanceIds=[INSTANCE], WaiterConfig={"Delay": 1})


def test_a_reboot_stops_and_starts(service, ec2):
    service.add_instance(INSTANCE)
    before = service.instances.get(INSTANCE).launch_time
    assert ask(ec2, "reboot", INSTANCE)["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert eventually(lambda: service.instances.get(INSTANCE).launch_time > before)
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING


@pytest.mark.parametrize("state", ["terminated", "shutting-down"])
def test_a_reboot_of_what_is_terminated_is_ignored(service, ec2, state):
    service.add_instance(INSTANCE, state=state)
    ask(ec2, "reboot", INSTANCE)
    assert service.instances.state(INSTANCE) == state


@pytest.mark.parametrize(
    ("what", "done", "state"),
    [
        ("start", "started", "stopping"),
        ("start", "started", "shutting-down"),
        ("start", "started", "terminated"),
        ("stop", "stopped", "shutting-down"),
        ("stop", "stopped", "terminated"),
        ("reboot", "rebooted", "stopped"),
        ("reboot", "rebooted", "stopping"),
    ],
)
def test_a_state_that_does_not_allow_it_is_named(service, ec2, what, done, state):
    service.add_instance(INSTANCE, state=state)
    assert refusal(ec2, what, INSTANCE) == {
        "Code": "IncorrectInstanceState",
        "Message": f"The instance '{INSTANCE}' is not in a state from which it can be {done}: it is {state}.",
    }


@pytest.mark.parametrize("what", DOES)
def test_nothing_is_done_to_any_if_one_cannot_be(service, ec2, what):
    service.add_instance(INSTANCE)
    service.add_instance("i-0000000b", account_id="999999999999")
    before = service.instances.list()
    assert refusal(ec2, what, INSTANCE, "i-0000000b")["Code"] == "InvalidInstanceID.NotFound"
    assert refusal(ec2, what, INSTANCE, "i-0000000c")["Code"] == "InvalidInstanceID.NotFound"
    assert refusal(ec2, what, INSTANCE, "i-c")["Code"] == "InvalidInstanceID.Malformed"
    assert refusal(ec2, what) == {
        "Code": "MissingParameter",
        "Message": "The request must contain the parameter InstanceId",
    }
    assert service.instances.list() == before


def test_several_are_changed_in_the_order_in_which_they_are_named(service, ec2):
    ids = [service.add_instance(f"i-0000000{letter}") for letter in "bca"]
    answer = ask(ec2, "stop", *ids, ids[0])["StoppingInstances"]
    assert [change["InstanceId"] for change in answer] == ids
    assert {instance.state for instance in service.instances.list()} == {InstanceState.STOPPED}


@pytest.mark.parametrize("what", DOES)
def test_a_dry_run_changes_nothing(service, ec2, what):
    service.add_instance(INSTANCE)
    before = service.instances.list()
    assert refusal(ec2, what, INSTANCE, DryRun=True)["Code"] == "DryRunOperation"
    assert service.instances.list() == before


def test_hibernating_is_not_supported(service, ec2):
    service.add_instance(INSTANCE)
    assert refusal(ec2, "stop", INSTANCE, Hibernate=True)["Code"] == "UnsupportedOperation"
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING


def test_force_asks_the_guest_all_the_same(service, ec2):
    service.add_instance(INSTANCE)
    ask(ec2, "stop", INSTANCE, Force=True)
    assert service.instances.state(INSTANCE) is InstanceState.STOPPED


@pytest.mark.parametrize(("what", "done"), [("start", "started"), ("reboot", "rebooted")])
def test_what_is_being_bundled_is_not_started_and_the_task_is_named(service, ec2, what, done):
    service.add_instance(INSTANCE)
    task = ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))["BundleTask"]
    why = f"it is being bundled by {task['BundleId']}"
    assert refusal(ec2, what, INSTANCE) == {
        "Code": "IncorrectInstanceState",
        "Message": f"The instance '{INSTANCE}' is not in a state from which it can be {done}: {why}.",
    }


@pytest.mark.parametrize("what", ["stop", "terminate"])
def test_what_is_being_bundled_may_be_stopped_and_terminated(service, ec2, what):
    service.add_instance(INSTANCE)
    ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))
    assert ask(ec2, what, INSTANCE)[ANSWER[what]][0]["PreviousState"] == STATES["running"]


def test_an_instance_that_is_stopped_on_purpose_is_not_started_for_the_sake_of_a_task_that_has_ended(service, ec2):
    service.add_instance(INSTANCE)
    task = ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))["BundleTask"]
    ec2.cancel_bundle_task(BundleId=task["BundleId"])
    service.records.schedule_power_recovery(task["BundleId"], datetime.now(UTC) + timedelta(hours=1))
    ask(ec2, "stop", INSTANCE)
    assert not service.records.has_power_recovery(INSTANCE)


@pytest.mark.parametrize("what", ["stop", "terminate"])
def test_an_instance_that_only_its_hypervisor_can_stop_is_left_alone(service, ec2, what):
    service.add_instance(INSTANCE, state_command=("echo", "running"))
    error = refusal(ec2, what, INSTANCE)
    assert error["Code"] == "OperationNotPermitted"
    assert "has no stopCommand" in error["Message"]


@pytest.mark.parametrize("what", ["stop", "terminate"])
def test_what_the_hypervisor_refuses_is_logged_and_the_state_stays(service, ec2, what):
    service.add_instance(INSTANCE, stop_command=(sys.executable, "-c", "import sys; sys.exit('domain is locked')"))
    with capture_logs() as logs:
        (change,) = ask(ec2, what, INSTANCE)[ANSWER[what]]
    assert change["CurrentState"] == STATES["running"]
    assert "domain is locked" in logs[0]["error"]
