"""BundleInstance refuses a request that is known to fail, before anything is stopped or written for it."""

import socket
import threading
from dataclasses import replace

import pytest
from botocore.exceptions import ClientError

from support.buckets.s3_storage import storage
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.config import Settings
from thrave.doctor.component_probes import MAX_AGE, store_probe
from thrave.ec2.app import create_app
from thrave.health import STORE, HealthCache
from thrave.tasks import root_volume_check
from thrave.tasks.root_volume_check import RootVolumeCheck

INSTANCE = "i-1234567890abcdef0"


def refusal(ec2, service):
    with pytest.raises(ClientError) as caught:
        ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"], response["Error"]["Message"]


@pytest.fixture
def use_backend(service, current_app, ec2):
    """Replaces attributes of the backend behind the endpoint."""

    def use_backend(**changes):
        current_app.app = create_app(replace(service.backend, **changes))

    return use_backend


@pytest.mark.parametrize(
    "volume",
    [
        lambda folder: VolumeFile(path=folder / "missing.raw"),
        lambda folder: VolumeFile(path=folder),
        lambda folder: VolumeFile(path=folder / "disk.raw", format="vdi"),
        lambda folder: VolumeFile(path=folder / "disk.raw", format="luks", secret_file=folder / "passphrase"),
    ],
    ids=["missing", "directory", "unknown format", "no passphrase"],
)
def test_bundle_instance_does_not_stop_an_instance_with_an_unreadable_volume(
    service, ec2, use_backend, tmp_path, volume
):
    (tmp_path / "missing.raw").touch()
    service.instances._files.create(instance_description(service, volume(tmp_path)))
    (tmp_path / "missing.raw").unlink()
    use_backend(find_volume_problem=RootVolumeCheck(service.instances, ()).find_problem)
    status, code, message = refusal(ec2, service)
    assert (status, code) == (400, "IncorrectInstanceState")
    assert ("thrave doctor" in message, str(tmp_path) in message) == (True, False)
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING
    assert service.backend.buckets.owner("my-bucket") is None


def test_bundle_instance_refuses_a_volume_that_another_machine_uses(service, ec2, use_backend):
    service.add_instance(INSTANCE)
    service.add_instance("i-00000000000000001")
    use_backend(find_volume_problem=RootVolumeCheck(service.instances, ()).find_problem)
    status, code, message = refusal(ec2, service)
    assert (status, code) == (400, "IncorrectInstanceState")
    assert "is also a disk of another machine, which is not off" in message
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING


def test_root_volume_check_does_not_wait_again_for_an_unresponsive_disk(service, monkeypatch):
    service.add_instance(INSTANCE)
    instance, respond = service.instances.get(INSTANCE), threading.Event()
    calls = []

    def hang(*_):
        calls.append(1)
        assert respond.wait(60)

    monkeypatch.setattr(root_volume_check, "CHECK_TIMEOUT", 0.1)
    monkeypatch.setattr(root_volume_check, "check_root_volume", hang)
    check = RootVolumeCheck(service.instances, ())
    assert [check.find_problem(instance) for _ in range(3)] == ["its root volume does not respond"] * 3
    assert calls == [1]
    respond.set()
    check._hanging[INSTANCE].result(60)
    monkeypatch.setattr(root_volume_check, "check_root_volume", lambda *_: ())
    assert check.find_problem(instance) is None


def instance_description(service, volume):
    service.add_instance(INSTANCE)
    described = service.instances.get(INSTANCE)
    service.instances.remove(INSTANCE)
    return replace(described, root_volume=volume)


@pytest.fixture
def unreachable_store():
    """The settings of a service whose store refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    key = {"s3_access_key_id": "AKIA", "s3_secret_access_key": "secret"}
    return Settings(store="s3", upload_credentials="service", s3_endpoint=f"http://127.0.0.1:{port}", **key)


def test_bundle_instance_reports_a_broken_store_and_sends_it_nothing(service, ec2, use_backend, unreachable_store):
    service.add_instance(INSTANCE)
    health = HealthCache({STORE: MAX_AGE})
    store_probe(unreachable_store, health).run()
    use_backend(health=health, buckets=None)
    status, code, message = refusal(ec2, service)
    assert (status, code) == (503, "Unavailable")
    assert ("Cannot connect" in message, "thrave doctor" in message) == (True, True)
