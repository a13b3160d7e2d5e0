"""Limits of one account: rate of requests, number of tasks."""

import threading
from dataclasses import replace

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from support.buckets.s3_storage import storage
from support.manual_clock import ManualClock
from thrave.ec2.app import create_app
from thrave.ec2.backend import RateLimit, TooManyRequests

ALICE, BOB = "111111111111", "222222222222"


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def rate(clock):
    return RateLimit(2.0, 5, clock)


def taken(rate, account_id=ALICE):
    """How many requests are answered at this moment."""
    for count in range(100):
        try:
            rate.take(account_id)
        except TooManyRequests:
            return count
    return 100


def test_rate_limit_allows_one_burst(rate):
    assert taken(rate) == 5
    assert taken(rate) == 0


@pytest.mark.parametrize(("seconds", "more"), [(0.4, 0), (0.5, 1), (1.2, 2), (2.5, 5), (1e6, 5)])
def test_rate_limit_refills_up_to_one_burst(rate, clock, seconds, more):
    taken(rate)
    clock.now += seconds
    assert taken(rate) == more


def test_rate_limit_adds_fractions_of_tokens(rate, clock):
    taken(rate)
    for _ in range(4):
        clock.now += 0.125
        count = taken(rate)
    assert count == 1


def test_rate_limit_has_a_bucket_for_each_account(rate):
    assert (taken(rate, ALICE), taken(rate, BOB)) == (5, 5)


def test_rate_limit_is_thread_safe():
    rate, count = RateLimit(1e-9, 500), []
    threads = [
        threading.Thread(target=lambda: count.append(taken(rate)) or count.append(taken(rate))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count) == 500


def test_rate_limit_refuses_only_the_account_that_exceeds_it(service, current_app, client_of):
    busy, other = client_of(service.key), client_of(service.another_key())
    current_app.app = create_app(replace(service.backend, rate=RateLimit(1e-9, 3)))
    for _ in range(3):
        busy.describe_instances()
    with pytest.raises(ClientError) as refusal:
        busy.describe_instances()
    error = refusal.value.response
    assert error["Error"] == {"Code": "RequestLimitExceeded", "Message": "Request limit exceeded."}
    assert error["ResponseMetadata"]["HTTPStatusCode"] == 503
    assert other.describe_instances()["Reservations"] == []


def test_boto3_retries_after_the_rate_limit(service, current_app):
    current_app.app = create_app(replace(service.backend, rate=RateLimit(2.0, 1)))
    ec2 = boto3.client(
        "ec2", "eu-west-9", endpoint_url=current_app.url, config=Config(retries={"total_max_attempts": 10}),
        aws_access_key_id=service.key.access_key_id, aws_secret_access_key=service.key.secret_access_key,
    )  # fmt: skip
    responses = [ec2.describe_instances()["ResponseMetadata"]["RetryAttempts"] for _ in range(3)]
    assert responses[0] == 0
    assert max(responses) > 0
    ec2.close()


@pytest.mark.parametrize("change", [{"access_key_id": "AKIDNOBODY"}, {"secret_access_key": "x" * 40}])
def test_requests_with_invalid_signatures_take_no_token(service, current_app, client_of, change):
    rate = RateLimit(1e-9, 1)
    unauthenticated = client_of(replace(service.key, **change))
    current_app.app = create_app(replace(service.backend, rate=rate))
    for _ in range(3):
        with pytest.raises(ClientError, match="AuthFailure"):
            unauthenticated.describe_instances()
    assert rate._buckets == {}
    client_of(service.key)
    current_app.app = create_app(replace(service.backend, rate=rate))
    assert taken(rate, service.key.account_id) == 1


def bundle(ec2, service, number):
    return ec2.bundle_instance(
        InstanceId=service.add_instance(f"i-{number:08x}"), Storage=storage(service.key, bucket=f"bucket-{number}")
    )["BundleTask"]["BundleId"]


def test_bundle_instance_limits_the_tasks_of_an_account(service, ec2, client_of):
    first, *_ = [bundle(ec2, service, number) for number in range(4)]
    with pytest.raises(ClientError) as refusal:
        bundle(ec2, service, 5)
    assert refusal.value.response["Error"] == {
        "Code": "ResourceLimitExceeded",
        "Message": "You have exceeded an Amazon EC2 resource limit. You may have 4 bundle tasks in progress.",
    }
    assert service.backend.buckets.owner("bucket-5") is None
    ec2.cancel_bundle_task(BundleId=first)
    bundle(ec2, service, 6)


def test_bundle_instance_limits_simultaneous_requests(service, ec2):
    ids = [service.add_instance(f"i-{number:08x}") for number in range(12)]
    outcomes = []

    def ask(instance_id):
        try:
            ec2.bundle_instance(InstanceId=instance_id, Storage=storage(service.key, prefix=instance_id))
            outcomes.append("a task")
        except ClientError as refusal:
            outcomes.append(refusal.response["Error"]["Code"])

    threads = [threading.Thread(target=ask, args=(instance_id,)) for instance_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ResourceLimitExceeded"] * 8 + ["a task"] * 4
    assert len(ec2.describe_bundle_tasks()["BundleTasks"]) == 4
