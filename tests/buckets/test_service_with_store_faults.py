"""The whole service with a store that fails while a bundle of several parts is uploaded."""

from contextlib import suppress

import pytest

from support.eventually import eventually
from support.servers import stores
from support.service.forked_server import ForkedServer
from support.service.service_on_store import UPLOAD_BY_SERVICE, ServiceOnStore
from support.service.upload_bench import noise_disk
from support.store_faults import faults
from support.store_faults.fault_proxy import Kind, Rule
from thrave.buckets.errors import NoSuchBucket
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.compute.instance import InstanceState
from thrave.testing import upload_policy

pytestmark = pytest.mark.s3

PARTS = 2
SETTINGS = {"policy": {}, "service": UPLOAD_BY_SERVICE}
SENT_AS = {
    "policy": {"part": Kind.POST_OBJECT, "manifest": Kind.POST_MANIFEST},
    "service": {"part": Kind.PUT_OBJECT, "manifest": Kind.PUT_MANIFEST},
}


@pytest.fixture(scope="module", params=SETTINGS)
def shared_service(request, seaweedfs, proxy, tmp_path_factory):
    # Long enough for a store on a busy machine, so that only the fault exceeds the timeout.
    settings = {
        "store": "s3",
        "s3_endpoint": proxy.url,
        "s3_timeout": 8,
        "s3_retry_timeout": 10,
        **SETTINGS[request.param],
    }
    folder = tmp_path_factory.mktemp("service")
    with ForkedServer.running(folder / "thrave", **settings) as server:
        service = ServiceOnStore(server, seaweedfs, folder)
        service.disk = noise_disk(folder / "large.raw", PARTS)
        yield request.param, service


@pytest.fixture
def service(shared_service, tmp_path):
    service = shared_service[1].begin(tmp_path)
    service.objects = S3ObjectClient(service.store.connection())  # without the proxy, and with every key
    yield service
    with suppress(NoSuchBucket):  # removed by a failed task
        service.objects.delete(service.bucket, service.files())
        service.objects._requests.send("DELETE", service.bucket)


def bundle(service):
    policy, signature = upload_policy(stores.ALICE.secret_access_key, service.bucket, "winami")
    return service.bundle(policy, signature)


def bundle_files(service):
    return [key for key in service.files() if key.startswith("winami")]


@pytest.mark.parametrize(
    ("fault", "what", "first"),
    [
        (faults.slow_down, "part", 2),
        (faults.no_response, "part", 2),
        (faults.response_lost, "manifest", 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_task_completes_after_a_temporary_fault(fault, what, first, shared_service, service, proxy):
    rule = Rule(SENT_AS[shared_service[0]][what], fault, first=first)
    with proxy.injecting(rule):
        task = bundle(service)
    assert rule.injected == 1
    assert task["State"] == "complete", task
    assert len(bundle_files(service)) == PARTS + 2
    assert service.is_whole()


@pytest.mark.parametrize(
    ("fault", "what", "first", "code"),
    [
        (faults.denied_early, "part", 2, "Client.S3Error"),
        (faults.discarded, "part", 2, "Server.S3Error"),
        (faults.internal_error, "manifest", 1, "Server.S3Error"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_permanent_fault_leaves_instance_running_and_bucket_empty(
    fault, what, first, code, shared_service, service, proxy
):
    rule = Rule(SENT_AS[shared_service[0]][what], fault, first=first, is_repeated=True)
    with proxy.injecting(rule):
        task = bundle(service)
    assert rule.injected
    assert task["State"] == "failed"
    assert task["BundleTaskError"]["Code"] == code, task
    assert service.server.instances.state(task["InstanceId"]) is InstanceState.RUNNING
    # Objects of an upload that ends after its task are deleted later.
    eventually(lambda: bundle_files(service), "the bucket is empty", until=lambda files: not files)
