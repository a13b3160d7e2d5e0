"""The EC2 API with real components and without the engine that runs tasks: tasks stay pending."""

from dataclasses import dataclass
from datetime import timedelta

import boto3
import pytest
from botocore.config import Config

from support.eventually import eventually
from support.servers.asgi_server import serving
from thrave.buckets.directory_store import DirectoryStore
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver
from thrave.compute.instance import VolumeFile
from thrave.compute.power import BackgroundPower
from thrave.compute.power_records import PowerRecords
from thrave.database import migrate, open_engine
from thrave.ec2.app import create_app
from thrave.ec2.backend import Ec2Backend, RateLimit
from thrave.identity.accounts import AccessKey, Accounts
from thrave.tasks.repository import TaskRepository
from thrave.tasks.task_service import BundleTaskService
from thrave.vault import Vault


@dataclass
class ServiceWithoutEngine:
    """A data directory and everything in it."""

    backend: Ec2Backend
    records: TaskRepository
    instances: DirectoryDriver
    key: AccessKey
    volume: VolumeFile

    def add_instance(self, instance_id, **changes):
        facts = {"account_id": self.key.account_id, "platform": "windows", "root_volume": self.volume, **changes}
        self.instances.add(InstanceDescription(instance_id=instance_id, **facts))
        return instance_id

    def another_key(self, name="another-account"):
        return self.backend.accounts.create(name)[1]


@pytest.fixture
def service(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path / 'thrave.db'}")
    migrate(engine)
    vault = Vault.open_or_create(tmp_path / "vault.key")
    records = TaskRepository(engine, vault)
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    instances = DirectoryDriver(tmp_path / "instances")
    power = BackgroundPower(instances, PowerRecords(engine), shutdown_timeout=20.0)
    backend = Ec2Backend(
        accounts=Accounts(engine, vault),
        instances=instances,
        power=power,
        region="eu-west-9",
        buckets=DirectoryStore(tmp_path / "buckets"),
        rate=RateLimit(1e6, 10**6),
        tasks=BundleTaskService(
            engine,
            records,
            lambda connection, bundle_id, host: None,
            default_host="localhost",
            retention=timedelta(days=7),
            max_per_account=4,
        ),
    )
    key = backend.accounts.create("owner")[1]
    yield ServiceWithoutEngine(backend, records, instances, key, VolumeFile(path=tmp_path / "disk.raw"))
    # A thread that outlives the database retries, and logs, in the tests that follow.
    eventually(lambda: power._wake_events, "every power request ends", until=lambda threads: not threads)
    engine.dispose()


class CurrentApp:
    """An ASGI application that calls the application of the current test, so that one server serves all tests."""

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def current_app():
    current_app = CurrentApp()
    with serving(current_app) as current_app.url:
        yield current_app


@pytest.fixture
def endpoint(service, current_app):
    current_app.app = create_app(service.backend)
    return current_app.url


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
def ec2(service, client_of):
    return client_of(service.key)
