"""The service put together from the settings: whole in one process, or as a fleet's API and agents.

This is where the rooms are handed to each other; none of them makes its own neighbours. It holds no rule of its own.
Stopping is crash-only: requests under way are answered, then the process is to end (`os._exit`) as if it had been
killed, and a task under way goes on at the next start. There is one way to come back, and it is tested.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import structlog
from starlette.types import ASGIApp

from thrave.agent import Agent
from thrave.buckets.retrying import RetryingBuckets
from thrave.compute.fleet import ReportedInstances
from thrave.compute.instances import Inventory
from thrave.compute.power import PowerControl, PowerRequests
from thrave.config import Settings
from thrave.doctor.standing import StandingChecks, VolumeChecks
from thrave.ec2.app import create_app
from thrave.ec2.door import Door
from thrave.ec2.permissions import Permissions
from thrave.ec2.rate import RateLimit
from thrave.ground import Ground, open_ground
from thrave.identity.users import Users
from thrave.listening import Listener
from thrave.tasks.requests import BundleTasks

log = structlog.get_logger()
DATABASE_TIMEOUT = 5.0  # seconds for a statement of an API process; then the caller gets `Unavailable`
REQUEST_PATIENCE = 5.0  # seconds for which a caller waits while the store fails
Listening = Callable[[str], None]
"""Told the URL once requests are answered."""


def serve(settings: Settings, listening: Listening) -> None:
    """Be the whole service: the EC2 door, and the agent of the one host that there is. Until SIGTERM or SIGINT.

    Raises:
        ListeningError: The address or the certificate cannot be used, or it would be plain HTTP to others.
        VaultKeyError: The data directory has not the database's vault key.
    """
    ground = open_ground(settings)
    power = PowerRequests(ground.instances, grace=settings.shutdown_grace)
    door = _door(ground, ground.instances, power, lambda _instance_id: settings.host_name)
    volumes = VolumeChecks(ground.instances, settings.image_directories)
    app = create_app(replace(door, volume_trouble=volumes.trouble))
    _listen(settings, app, listening, Agent(ground))


def serve_api(settings: Settings, listening: Listening) -> None:
    """Be one of a fleet's API processes: answer from the database, and wait for no host. Until SIGTERM or SIGINT.

    Raises:
        As `serve`.
    """
    ground = open_ground(settings, database_timeout=DATABASE_TIMEOUT)
    _ = ground.service  # the first process of a fleet makes it, for the others to be given a copy
    fleet = ReportedInstances(ground.database)
    _listen(settings, create_app(_door(ground, fleet, fleet, fleet.host_of)), listening, None)


def run_agent(settings: Settings, working: Callable[[], None]) -> None:
    """Be the agent of a fleet's host: call `working()`, and work until the host has been drained, or a signal.

    Raises:
        VaultKeyError: As `serve`.
    """
    agent = Agent(open_ground(settings))
    agent.start(reports=True)
    working()
    agent.wait()


def _door(ground: Ground, instances: Inventory, power: PowerControl, host_of: Callable[[str], str]) -> Door:
    """The EC2 door, in front of these instances."""
    settings = ground.settings
    tasks = BundleTasks(
        ground.database,
        ground.records(),
        ground.queues.enqueue,
        host_of=host_of,
        retention=timedelta(days=settings.task_retention_days),
        per_account=settings.tasks_per_account,
    )
    return Door(
        accounts=ground.accounts,
        instances=instances,
        buckets=RetryingBuckets(ground.buckets, REQUEST_PATIENCE),
        tasks=tasks,
        power=power,
        rate=RateLimit(settings.requests_per_second, settings.request_burst),
        region=settings.region,
        any_platform=settings.platforms == "any",
        version_2=settings.signature_version_2 == "accept",
        may=Permissions(users=Users(ground.database), region=settings.region).may,
        store_trouble=StandingChecks(settings).store_trouble,
    )


def _listen(settings: Settings, app: ASGIApp, listening: Listening, agent: Agent | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _heard)  # uvicorn stops for it, then raises it again for whoever had it before
    listener = Listener(settings)
    if agent is not None:
        agent.start(reports=False)
        threading.Thread(target=_end_when_drained, args=[agent], name="drained", daemon=True).start()
    listener.serve(app, listening)
    log.info("stopped", pid=os.getpid())


def _end_when_drained(agent: Agent) -> None:
    agent.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def _heard(_number: int, _frame: object) -> None:
    """Take note of a signal that has had its effect already."""
