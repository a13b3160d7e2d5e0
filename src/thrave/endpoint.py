"""The whole service in one process: the EC2 door, the worker and the store, put together from the settings.

This is where the rooms are handed to each other; none of them makes its own neighbours. It holds no rule of its own.
"""

import os
import signal
from collections.abc import Callable
from functools import partial

import structlog
from starlette.applications import Starlette

from thrave.buckets.directory import DirectoryBuckets
from thrave.compute.directory import DirectoryInstances
from thrave.compute.power import PowerRequests
from thrave.config import Settings
from thrave.database import migrate, open_engine
from thrave.ec2.app import create_app
from thrave.ec2.door import Door
from thrave.ec2.permissions import Permissions
from thrave.ec2.rate import RateLimit
from thrave.identity.accounts import Accounts
from thrave.identity.service import ServiceIdentity
from thrave.identity.users import Users
from thrave.listening import Listener
from thrave.tasks.bundling import Host, bundle
from thrave.tasks.caretaker import Caretaker
from thrave.tasks.engine import Engine
from thrave.tasks.records import Records
from thrave.tasks.requests import BundleTasks
from thrave.vault import Vault

log = structlog.get_logger()


class Endpoint:
    """The service on the embedded default: SQLite, bucket directories, instances described by files."""

    def __init__(self, settings: Settings) -> None:
        """Open everything in the data directory, making what is not there yet."""
        self._settings = settings
        directory = settings.directory
        directory.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = open_engine(directory.database_url)
        migrate(database)
        vault = Vault.open_or_create(directory.vault_key)
        self._records = Records(database, vault)
        self._engine = Engine(directory.database_url, settings.host_name, tasks_at_once=settings.tasks_at_once)
        self._host = Host(
            records=self._records,
            accounts=Accounts(database, vault),
            instances=DirectoryInstances(directory.instances),
            buckets=DirectoryBuckets(directory.buckets),
            service=ServiceIdentity.open_or_create(directory.service),
            shutdown_grace=settings.shutdown_grace,
            level=settings.level,
            skip=settings.skip,
        )
        self._permissions = Permissions(users=Users(database), region=settings.region)
        self._tasks = BundleTasks(
            database,
            self._records,
            self._engine.enqueue,
            host=settings.host_name,
            retention=settings.task_retention,
            per_account=settings.tasks_per_account,
        )

    def app(self) -> Starlette:
        """The EC2 door."""
        return create_app(
            Door(
                accounts=self._host.accounts,
                instances=self._host.instances,
                buckets=self._host.buckets,
                tasks=self._tasks,
                power=PowerRequests(self._host.instances, grace=self._settings.shutdown_grace),
                rate=RateLimit(self._settings.requests_per_second, self._settings.request_burst),
                region=self._settings.region,
                any_platform=self._settings.platforms == "any",
                may=self._permissions.may,
            )
        )

    def serve(self, listening: Callable[[str], None]) -> None:
        """Work until SIGTERM or SIGINT; call `listening(url)` once requests are answered.

        Stopping is crash-only: requests under way are answered, then the process is to end (`os._exit`) as if it had
        been killed, and a task under way goes on at the next start. There is one way to come back, and it is tested.

        Raises:
            ListeningError: The address or the certificate cannot be used, or it would be plain HTTP to others.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _heard)  # uvicorn stops for it, then raises it again for whoever had it before
        listener = Listener(self._settings)
        self._engine.launch(partial(bundle, self._host))
        Caretaker(self._records, self._host.instances, self._settings.host_name).start()
        listener.serve(self.app(), listening)
        log.info("stopped", pid=os.getpid())


def _heard(_number: int, _frame: object) -> None:
    """Take note of a signal that has had its effect already."""
