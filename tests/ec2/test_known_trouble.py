"""What is known to fail is refused at request time, before anything is stopped or written for it."""

import socket
import threading
from dataclasses import replace

import pytest
from botocore.exceptions import ClientError

from support.buckets.s3_storage import storage
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.config import Settings
from thrave.doctor import standing_checks
from thrave.doctor.standing_checks import StandingChecks, VolumeChecks
from thrave.ec2.app import create_app

INSTANCE = "i-1234567890abcdef0"


def refusal(ec2, service):
    with pytest.raises(ClientError) as caught:
        ec2.bundle_instance(InstanceId=INSTANCE, Storage=storage(service.key))
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"], answer["Error"]["Message"]


@pytest.fixture
def lead_to(service, current_app, ec2):
    """Has the endpoint lead to the same door, changed."""

    def lead_to(**changes):
        current_app.app = create_app(replace(service.backend, **changes))

    return lead_to


@pytest.mark.parametrize(
    "volume",
    [
        lambda folder: VolumeFile(path=folder / "gone.raw"),
        lambda folder: VolumeFile(path=folder),
        lambda folder: VolumeFile(path=folder / "disk.raw", format="vdi"),
        lambda folder: VolumeFile(path=folder / "disk.raw", format="luks", secret_file=folder / "passphrase"),
    ],
    ids=["gone", "no file", "unknown format", "no passphrase"],
)
def test_an_instance_whose_volume_cannot_be_read_is_not_stopped(service, ec2, lead_to, tmp_path, volume):
    (tmp_path / "gone.raw").touch()
    service.instances._folder.create(house_description(service, volume(tmp_path)))
    (tmp_path / "gone.raw").unlink()
    lead_to(volume_problem=VolumeChecks(service.instances, ()).trouble)
    status, code, message = refusal(ec2, service)
    assert (status, code) == (400, "IncorrectInstanceState")
    assert ("thrave doctor" in message, str(tmp_path) in message) == (True, False)
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING
    assert service.backend.buckets.owner("my-bucket") is None


def test_a_volume_that_another_machine_writes_to_is_not_bundled(service, ec2, lead_to):
    service.add_instance(INSTANCE)
    service.add_instance("i-00000000000000001")
    lead_to(volume_problem=VolumeChecks(service.instances, ()).trouble)
    status, code, message = refusal(ec2, service)
    assert (status, code) == (400, "IncorrectInstanceState")
    assert "is also a disk of another machine, which is not off" in message
    assert service.instances.state(INSTANCE) is InstanceState.RUNNING


def test_a_volume_that_does_not_answer_keeps_nobody_waiting(service, monkeypatch):
    service.add_instance(INSTANCE)
    instance, go_on = service.instances.get(INSTANCE), threading.Event()
    looks = []

    def hang(*_):
        looks.append(1)
        assert go_on.wait(60)

    monkeypatch.setattr(standing_checks, "_TIMEOUT", 0.1)
    monkeypatch.setattr(standing_checks, "check_root_volume", hang)
    checks = VolumeChecks(service.instances, ())
    assert [checks.trouble(instance) for _ in range(3)] == ["its root volume does not respond"] * 3
    assert looks == [1]
    go_on.set()
    checks._hanging[INSTANCE].result(60)
    monkeypatch.setattr(standing_checks, "check_root_volume", lambda *_: ())
    assert checks.trouble(instance) is None


def house_description(service, volume):
    service.add_instance(INSTANCE)
    described = service.instances.get(INSTANCE)
    service.instances.remove(INSTANCE)
    return replace(described, root_volume=volume)


@pytest.fixture
def away():
    """The settings of a service whose store is not there."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    key = {"s3_access_key_id": "AKIA", "s3_secret_access_key": "secret"}
    return Settings(store="s3", upload_credentials="service", s3_endpoint=f"http://127.0.0.1:{port}", **key)


def test_a_store_that_is_known_to_fail_is_named_and_nothing_is_asked_of_it(service, ec2, lead_to, away):
    service.add_instance(INSTANCE)
    lead_to(store_problem=StandingChecks(away).store_trouble, buckets=None)
    status, code, message = refusal(ec2, service)
    assert (status, code) == (503, "Unavailable")
    assert ("Cannot connect" in message, "thrave doctor" in message) == (True, True)


def test_the_store_is_asked_once_for_many(away, monkeypatch):
    asked = []
    monkeypatch.setattr(StandingChecks, "_run_checks", lambda self: asked.append(1) or "trouble")
    checks = StandingChecks(away)
    callers = [threading.Thread(target=checks.store_trouble) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (len(asked), checks.store_trouble()) == (1, "trouble")


def test_a_store_that_is_back_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(standing_checks, "BAD_FOR", 0.0)
    checks = StandingChecks(Settings(data_dir=tmp_path / "data"))
    assert "is not a data directory" in checks.store_trouble()
    (tmp_path / "data").mkdir()
    assert checks.store_trouble() is None
