"""Unmodified EC2 clients: each action with each client."""

import pytest

from clients.clients import CLIENTS, UNREAD
from clients.relay import RequestStyle
from clients.world import BUCKET

pytestmark = pytest.mark.clients

UNKNOWN_INSTANCE = "i-00000000000000000"
MOST_USED = {"boto3, newest", "AWS CLI 1"}
"""`make test` runs these clients, `make test-sweep` all others."""


def client_parameter(client):
    marks = [] if client.name in MOST_USED else [pytest.mark.sweep]
    return pytest.param(client, marks=marks, id=client.name)


def check_bundle(world, driver):
    instance = world.instance()
    task = driver("bundle", *world.bundling(instance, prefix=instance))
    assert task["state"] == "pending"
    known = world.ended(task["id"])
    assert (known["InstanceId"], known["State"]) == (instance, "complete")
    assert known["Storage"]["S3"] == {"Bucket": BUCKET, "Prefix": instance}
    assert world.stored(instance)


def check_describe(world, driver):
    others, wanted = world.instance(), world.instance()
    world.bundle(others, prefix=others)
    bundle_id = world.bundle(wanted, prefix=wanted)
    assert [task["id"] for task in driver("describe", wanted)["tasks"]] == [bundle_id]


def check_wait(world, driver):
    instance = world.instance()
    bundle_id = world.bundle(instance, prefix=instance)
    assert driver("wait", bundle_id) == {"id": bundle_id, "state": "complete"}


def check_cancel(world, driver):
    bundle_id = world.bundle(world.unresponsive_instance(), prefix="cancelled")
    task = driver("cancel", bundle_id)
    assert task["id"] == bundle_id
    assert task["state"] in {"cancelling", "failed"}
    assert world.ended(bundle_id)["BundleTaskError"]["Code"] == "Client.Cancelled"


def check_dry_run(world, driver):
    instance = world.instance()
    assert driver("dry-run", *world.bundling(instance, prefix=instance)) == {"error": "DryRunOperation"}
    assert world.tasks_of(instance) == []


def check_error(world, driver):
    refused = driver("bundle", *world.bundling(UNKNOWN_INSTANCE, prefix="refused"))
    assert refused == {"error": "InvalidInstanceID.NotFound"}


SCENARIOS = {
    "bundle": check_bundle,
    "describe": check_describe,
    "wait": check_wait,
    "cancel": check_cancel,
    "dry-run": check_dry_run,
    "error": check_error,
}


@pytest.mark.parametrize("client", [client_parameter(client) for client in CLIENTS], indirect=True)
@pytest.mark.parametrize("action", SCENARIOS)
def test_client_performs_action(world, driver, relay, client, action):
    if action in client.cannot:
        pytest.skip(f"{client.name} {client.cannot[action]}")
    relay.clear()
    SCENARIOS[action](world, driver)
    assert relay.style() == RequestStyle(client.method, client.api_version, client.signature)


@pytest.mark.parametrize(
    "client", [client_parameter(client) for client in CLIENTS if UNREAD in client.cannot.values()], indirect=True
)
def test_action_is_performed_even_if_client_rejects_response(world, driver):
    instance = world.unresponsive_instance()
    with pytest.raises(AssertionError, match="progress"):
        driver("bundle", *world.bundling(instance, prefix=instance))
    (task,) = world.tasks_of(instance)
    with pytest.raises(AssertionError, match="progress"):
        driver("cancel", task["BundleId"])
    assert world.ended(task["BundleId"])["BundleTaskError"]["Code"] == "Client.Cancelled"
