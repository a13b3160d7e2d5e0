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
def test_power_action_returns_previous_and_next_state(service, ec2, what, before, said, after):
    service.add_instance(INSTANCE, state=before)
    change = {"InstanceId": INSTANCE, "PreviousState": STATES[before], "CurrentState": STATES[said]}
    assert ask(ec2, what, INSTANCE)[ANSWER[what]] == [change]
    assert eventually(lambda: service.instances.state(INSTANCE), until=one_of(after)) == after


def test_boto3_waiters_end_at_their_states(service, ec2):
    service.add_instance(INSTANCE)
    for what, waiter in (("stop", "stopped"), ("start", "running"), ("terminate", "terminated")):
        ask(ec2, what, INSTANCE)
        ec2.get_waiter(f"instance_{waiter}").wait(InstanceIds=[INSTANCE], WaiterConfig={"Delay": 1})


def test_reboot_stops_and_starts_the_instance(service, ec2):
    service.add_instance(INSTANCE)
    before = service.instances.get(INSTANCE).launch_time
    assert ask(ec2, "reboot", INSTANCE)["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert eventually(lambda: service.instances.get(INSTANCE).launch_time > before)
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING


@pytest.mark.parametrize("state", ["terminated", "shutting-down"])
def test_reboot_ignores_terminated_instances(service, ec2, state):
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
def test_power_action_reports_a_state_that_does_not_allow_it(service, ec2, what, done, state):
    service.add_instance(INSTANCE, state=state)
    assert refusal(ec2, what, INSTANCE) == {
        "Code": "IncorrectInstanceState",
        "Message": f"The instance '{INSTANCE}' is not in a state from which it can be {done}: it is {state}.",
    }


@pytest.mark.parametrize("what", DOES)
def test_power_action_changes_nothing_if_one_instance_is_refused(service, ec2, what):
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


def test_power_action_keeps_the_order_of_the_request(service, ec2):
    ids = [service.add_instance(f"i-0000000{letter}") for letter in "bca"]
    response = ask(ec2, "stop", *ids, ids[0])["StoppingInstances"]
    assert [change["InstanceId"] for change in response] == ids
    assert {instance.state for instance in service.instances.list()} == {InstanceState.STOPPED}


@pytest.mark.parametrize("what", DOES)
def test_power_action_dry_run_changes_nothing(service, ec2, what):
    service.add_instance(INSTANCE)
    before = service.instances.list()
    assert refusal(ec2, what, INSTANCE, DryRun=True)["Code"] == "DryRunOperation"
    assert service.instances.list() == before


def test_stop_rejects_hibernation(service, ec2):
    service.add_instance(INSTANCE)
    assert refusal(ec2, "stop", INSTANCE, Hibernate=True)["Code"] == "UnsupportedOperation"
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING


def test_stop_with_force_still_asks_the_guest(service, ec2):
    service.add_instance(INSTANCE)
    ask(ec2, "stop", INSTANCE, Force=True)
    assert service.instances.state(INSTANCE) is InstanceState.STOPPED


@pytest.mark.parametrize(("what", "done"), [("start", "started"), ("reboot", "rebooted")])
def test_start_and_reboot_report_the_task_of_a_bundled_instance(service, ec2, what, done):
    service.add_instance(INSTANCE)
    task = ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))["BundleTask"]
    why = f"it is being bundled by {task['BundleId']}"
    assert refusal(ec2, what, INSTANCE) == {
        "Code": "IncorrectInstanceState",
        "Message": f"The instance '{INSTANCE}' is not in a state from which it can be {done}: {why}.",
    }


@pytest.mark.parametrize("what", ["stop", "terminate"])
def test_stop_and_terminate_accept_a_bundled_instance(service, ec2, what):
    service.add_instance(INSTANCE)
    ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))
    assert ask(ec2, what, INSTANCE)[ANSWER[what]][0]["PreviousState"] == STATES["running"]


def test_stop_cancels_the_power_recovery_of_an_ended_task(service, ec2):
    service.add_instance(INSTANCE)
    task = ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))["BundleTask"]
    ec2.cancel_bundle_task(BundleId=task["BundleId"])
    service.records.schedule_power_recovery(task["BundleId"], datetime.now(UTC) + timedelta(hours=1))
    ask(ec2, "stop", INSTANCE)
    assert not service.records.has_power_recovery(INSTANCE)


@pytest.mark.parametrize("what", ["stop", "terminate"])
def test_stop_rejects_an_instance_without_commands(service, ec2, what):
    service.add_instance(INSTANCE, state_command=("echo", "running"))
    error = refusal(ec2, what, INSTANCE)
    assert error["Code"] == "OperationNotPermitted"
    assert "has no stopCommand" in error["Message"]


@pytest.mark.parametrize("what", ["stop", "terminate"])
def test_refusal_of_the_hypervisor_is_logged_and_the_state_unchanged(service, ec2, what):
    service.add_instance(INSTANCE, stop_command=(sys.executable, "-c", "import sys; sys.exit('domain is locked')"))
    with capture_logs() as logs:
        (change,) = ask(ec2, what, INSTANCE)[ANSWER[what]]
    assert change["CurrentState"] == STATES["running"]
    assert "domain is locked" in logs[0]["error"]
