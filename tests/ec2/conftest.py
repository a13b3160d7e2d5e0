"""The front door with the real rooms behind it, but for the engine that would do the tasks: they stay pending."""

from dataclasses import dataclass
from datetime import timedelta

import boto3
import pytest
from botocore.config import Config

from support.servers.asgi_server import serving
from thrave.buckets.directory import DirectoryBuckets
from thrave.compute.descriptions import Description
from thrave.compute.directory import DirectoryInstances
from thrave.compute.instance import VolumeFile
from thrave.compute.power import PowerRequests
from thrave.compute.power_records import PowerRecords
from thrave.database import migrate, open_engine
from thrave.ec2.app import create_app
from thrave.ec2.door import Door
from thrave.ec2.rate import RateLimit
from thrave.identity.accounts import Accounts
from thrave.identity.keys import AccessKey
from thrave.tasks.records import Records
from thrave.tasks.requests import BundleTasks
from thrave.vault import Vault


@dataclass
class ServiceOnStore:
    """A data directory and everything in it."""

    door: Door
    records: Records
    instances: DirectoryInstances
    key: AccessKey
    volume: VolumeFile

    def add_instance(self, instance_id, **changes):
        facts = {"account_id": self.key.account_id, "platform": "windows", "root_volume": self.volume, **changes}
        self.instances.add(Description(instance_id=instance_id, **facts))
        return instance_id

    def another_key(self, name="somebody-else"):
        return self.door.accounts.create(name)[1]


@pytest.fixture
def house(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path / 'thrave.db'}")
    migrate(engine)
    vault = Vault.open_or_create(tmp_path / "vault.key")
    records = Records(engine, vault)
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    instances = DirectoryInstances(tmp_path / "instances")
    door = Door(
        accounts=Accounts(engine, vault),
        instances=instances,
        power=PowerRequests(instances, PowerRecords(engine), grace=20.0),
        region="eu-west-9",
        buckets=DirectoryBuckets(tmp_path / "buckets"),
        rate=RateLimit(1e6, 10**6),
        tasks=BundleTasks(
            engine,
            records,
            lambda connection, bundle_id, host: None,
            host_of=lambda instance_id: "localhost",
            retention=timedelta(days=7),
            per_account=4,
        ),
    )
    key = door.accounts.create("owner")[1]
    yield ServiceOnStore(door, records, instances, key, VolumeFile(path=tmp_path / "disk.raw"))
    engine.dispose()


class Street:
    """An ASGI application that leads to whichever house stands there now: one server serves every test."""

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def street():
    street = Street()
    with serving(street) as street.url:
        yield street


@pytest.fixture
def endpoint(house, street):
    street.app = create_app(house.door)
    return street.url


@pytest.fixture
def client_of(endpoint):
    """boto3, unmodified, with an access key."""
    clients = []

    def client_of(key, service="ec2"):
        config = Config(retries={"total_max_attempts": 1})
        secrets = {"aws_access_key_id": key.access_key_id, "aws_secret_access_key": key.secret_access_key}
        clients.append(boto3.client(service, "eu-west-9", endpoint_url=endpoint, config=config, **secrets))
        return clients[-1]

    yield client_of
    for client in clients:
        client.close()


@pytest.fixture
def ec2(house, client_of):
    return client_of(house.key)
