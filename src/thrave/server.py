"""The service put together from the settings: whole in one process, or as a fleet's API and agents.

This is where the components are handed to each other; none of them makes its own neighbours. Its one rule is
the order of a start: whatever can fail because of a setting comes before anything is made.
Stopping is crash-only: requests under way are answered, then the process is to end (`os._exit`) as if it had been
killed, and a task under way resumes at the next start. Signals are handled in `cli/server_commands.py`.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Never

import structlog
from starlette.types import ASGIApp

from thrave.agent import Agent
from thrave.buckets.retrying_store import RetryingStore
from thrave.components import Components, explained, hold_data_directory
from thrave.compute.base import InstanceInventory
from thrave.compute.fleet import FleetInventory
from thrave.compute.power import PowerControl
from thrave.concurrency import supervised
from thrave.config import Settings
from thrave.database import TIMEOUT, DatabaseReplacedError
from thrave.doctor.standing_checks import StandingChecks, VolumeChecks
from thrave.ec2.app import create_app
from thrave.ec2.backend import Ec2Backend, Permissions, RateLimit
from thrave.files import HeldFile
from thrave.http_server import HttpServer
from thrave.identity.users import Users
from thrave.tasks.task_service import BundleTaskService

log = structlog.get_logger()
DATABASE_TIMEOUT = 5.0  # seconds for a statement of an API process; then the caller gets `Unavailable`
REQUEST_PATIENCE = 5.0  # seconds for which a caller waits while the store fails
Listening = Callable[[str], None]
"""Told the URL once requests are answered."""


def serve(settings: Settings, listening: Listening) -> None:
    """Be the whole service: the EC2 door, and the agent of the one host that there is. Until SIGTERM or SIGINT.

    Raises:
        DataDirectoryError: The data directory is in use, or has lost its database.
        DatabaseUnusableError: The database cannot be used.
        ListeningError: The address or the certificate cannot be used, or it would be plain HTTP to others.
        ServiceIdentityError: The data directory has not the database's service identity.
        VaultKeyError: The data directory has not the database's vault key.
    """
    lock = _lock_if_begun(settings)
    listener = HttpServer(settings)
    ground = _start(settings)
    lock = lock or hold_data_directory(settings)
    ground.open()
    _ = ground.service
    agent = Agent(ground)
    door = _door(ground, ground.instances, agent.power, lambda _instance_id: settings.host_id)
    volumes = VolumeChecks(ground.instances, settings.image_dirs)
    app = create_app(replace(door, volume_problem=volumes.trouble))
    with explained(settings):
        agent.start(reports=False)
    supervised("drained", lambda: _end_when_drained(agent), on_failure=lambda _error: os._exit(1))
    _listen(listener, app, listening, lock)


def serve_api(settings: Settings, listening: Listening) -> None:
    """Be one of a fleet's API processes: answer from the database, and wait for no host. Until SIGTERM or SIGINT.

    Raises:
        As `serve`.
    """
    listener = HttpServer(settings)
    ground = _start(settings, database_timeout=DATABASE_TIMEOUT)
    ground.open()
    _ = ground.service
    fleet = FleetInventory(ground.database)
    _listen(listener, create_app(_door(ground, fleet, fleet, fleet.host_of)), listening, None)


def run_agent(settings: Settings, working: Callable[[], None]) -> None:
    """Be the agent of a fleet's host: call `working()`, and work until the host has been drained, or a signal.

    Raises:
        As `serve`, but for the listener.
    """
    ground = _start(settings)
    _ = ground.instances
    ground.open()
    _ = ground.service
    agent = Agent(ground)
    with explained(settings):
        agent.start(reports=True)
    working()
    if status := agent.wait():
        os._exit(status)


def _lock_if_begun(settings: Settings) -> HeldFile | None:
    """Lock a data directory that was begun before: "in use by process 7" says more than "address in use".

    A new one is locked once it is certain that the service can listen: a start that fails leaves nothing.
    """
    begun = settings.directory.lock.exists() or settings.directory.vault_key.exists()
    return hold_data_directory(settings) if begun else None


def _start(settings: Settings, *, database_timeout: float = TIMEOUT) -> Components:
    """Open what needs no database, so that a first start with a wrong setting makes no database and no key."""
    ground = Components(settings, database_timeout, replaced=_end_at_once)
    if settings.store == "s3":
        _ = ground.buckets
    return ground


def _end_at_once(error: DatabaseReplacedError) -> Never:
    """End the process: what it knows is in no database any more, and it must write nothing."""
    log.error("the service stops", error=str(error))
    os._exit(1)


def _door(
    ground: Components, instances: InstanceInventory, power: PowerControl, host_of: Callable[[str], str]
) -> Ec2Backend:
    """The EC2 door, in front of these instances."""
    settings = ground.settings
    tasks = BundleTaskService(
        ground.database,
        ground.records(),
        ground.queues.enqueue,
        host_of=host_of,
        retention=timedelta(days=settings.task_retention_days),
        max_per_account=settings.max_tasks_per_account,
    )
    return Ec2Backend(
        accounts=ground.accounts,
        instances=instances,
        buckets=RetryingStore(ground.buckets, REQUEST_PATIENCE),
        tasks=tasks,
        power=power,
        rate=RateLimit(settings.max_requests_per_second, settings.max_request_burst),
        region=settings.region,
        any_platform=settings.platforms == "any",
        existing_bundle=settings.existing_bundle,
        allow_signature_v2=settings.signature_version_2 == "accept",
        is_allowed=Permissions(users=Users(ground.database), region=settings.region).is_allowed,
        store_problem=StandingChecks(settings).store_trouble,
    )


def _listen(listener: HttpServer, app: ASGIApp, listening: Listening, lock: HeldFile | None) -> None:
    def answers(url: str) -> None:
        if lock is not None:
            lock.write(f"process {os.getpid()} ({url})")
        listening(url)

    listener.serve(app, answers)


def _end_when_drained(agent: Agent) -> None:
    if status := agent.wait():
        os._exit(status)
    os.kill(os.getpid(), signal.SIGTERM)
