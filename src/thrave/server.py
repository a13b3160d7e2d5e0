"""Builds the service from its settings and runs it: all in one process, or as an API process or agent of a fleet.

The components are passed to each other here; no component creates another one. A start does first what can fail
because of a wrong setting, and creates files after that. Stopping is crash-only: requests in progress are answered, and
the process then ends with `os._exit`, as if it had been killed. The next start resumes unfinished tasks. Signals are
handled in `cli/server_commands.py`.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from typing import Never

import structlog
from starlette.types import ASGIApp

from thrave.agent import Agent
from thrave.buckets.base import ObjectStore
from thrave.buckets.retrying_store import RetryingStore
from thrave.components import Components, explain_database_errors, lock_data_directory
from thrave.compute.base import InstanceInventory
from thrave.compute.fleet import FleetInventory
from thrave.compute.power import PowerControl
from thrave.concurrency import start_thread
from thrave.config import Settings
from thrave.database import STATEMENT_TIMEOUT, DatabaseReplacedError, display_name
from thrave.doctor.component_probes import MAX_AGE, database_probe, hypervisor_probe, store_probe
from thrave.ec2.app import create_app
from thrave.ec2.backend import AroundAction, Ec2Backend, Permissions, RateLimit, do_nothing
from thrave.files import ProcessLock
from thrave.health import DATABASE, HYPERVISOR, STORE, HealthCache
from thrave.http_server import HttpServer, MonitoringServer, open_monitoring
from thrave.identity.users import Users
from thrave.log_events import log_event
from thrave.monitoring import MonitoringApp
from thrave.tasks.root_volume_check import RootVolumeCheck
from thrave.tasks.task_service import BundleTaskService
from thrave.tasks.workflow import OnState, ignore_state

log = structlog.get_logger()
DATABASE_TIMEOUT = 5.0  # seconds for a statement of an API process; then the caller gets `Unavailable`
STORE_RETRY_TIMEOUT = 5.0  # seconds for which a request repeats a failed call to the store, while its client waits
OnListening = Callable[[str], None]
"""Receives the URL when the service answers requests."""


@dataclass(frozen=True, kw_only=True)
class TestHooks:
    """What a test double of the service changes (`thrave.testing`).

    Attributes:
        store: The object store, in place of the one that the settings name.
        around_action: See `Ec2Backend`.
        on_state: See `TaskContext`.
        check_request_time: See `Ec2Backend`.
    """

    __test__ = False  # pytest: not a class of tests

    store: ObjectStore | None = None
    around_action: AroundAction = do_nothing
    on_state: OnState = ignore_state
    check_request_time: bool = True


def serve(settings: Settings, on_listening: OnListening, hooks: TestHooks | None = None) -> None:
    """Run the whole service, the API and the agent of the only host, until SIGTERM or SIGINT.

    Raises:
        DataDirectoryError: The data directory is in use, or its database is missing.
        DatabaseUnusableError: The database cannot be used.
        ListeningError: The address or certificate cannot be used, or plain HTTP would be reachable from other hosts.
        ServiceIdentityError: The data directory does not have the service identity of the database.
        VaultKeyError: The data directory does not have the vault key of the database.
    """
    # A data directory that exists is locked first: "in use by process 7" says more than "address in use". A new one is
    # locked when it is certain that the service can listen, so that a failed start creates nothing.
    exists = settings.directory.lock.exists() or settings.directory.vault_key.exists()
    lock = lock_data_directory(settings) if exists else None
    http_server, monitoring = HttpServer(settings), open_monitoring(settings)
    hooks = hooks or TestHooks()
    components = _create_components(settings, store=hooks.store)
    lock = lock or lock_data_directory(settings)
    components.open()
    _ = components.service
    agent = Agent(components, on_state=hooks.on_state)
    health = _start_probes(settings, DATABASE, STORE, HYPERVISOR)
    backend = _build_backend(components, components.instances, agent.power, settings.host_id, health)
    volume_check = RootVolumeCheck(components.instances, settings.image_dirs)
    backend = replace(
        backend,
        find_volume_problem=volume_check.find_problem,
        around_action=hooks.around_action,
        check_request_time=hooks.check_request_time,
    )
    app = create_app(backend)
    with explain_database_errors(settings):
        agent.start(reports=False)
    start_thread("drained", lambda: _stop_when_drained(agent), on_failure=lambda _error: os._exit(1))
    _start_monitoring(monitoring, health)
    _serve_requests(http_server, app, on_listening, lock=lock, settings=settings, process="serve")


def serve_api(settings: Settings, on_listening: OnListening) -> None:
    """Run an API process of a fleet until SIGTERM or SIGINT. It answers from the database and waits for no host.

    Raises:
        As `serve`.
    """
    http_server, monitoring = HttpServer(settings), open_monitoring(settings)
    components = _create_components(settings, database_timeout=DATABASE_TIMEOUT)
    components.open()
    _ = components.service
    fleet = FleetInventory(components.database)
    health = _start_probes(settings, DATABASE, STORE)
    app = create_app(_build_backend(components, fleet, fleet, None, health))
    _start_monitoring(monitoring, health)
    _serve_requests(http_server, app, on_listening, lock=None, settings=settings, process="api")


def run_agent(settings: Settings, on_started: Callable[[], None]) -> None:
    """Run the agent of a fleet's host until the host is drained, or a signal. Calls `on_started` when it works.

    Raises:
        As `serve`.
    """
    monitoring = open_monitoring(settings)
    components = _create_components(settings)
    _ = components.instances
    components.open()
    _ = components.service
    agent = Agent(components)
    with explain_database_errors(settings):
        agent.start(reports=True)
    if monitoring is not None:
        _start_monitoring(monitoring, _start_probes(settings, DATABASE, STORE, HYPERVISOR))
    _log_start(settings, "agent")
    on_started()
    if status := agent.wait():
        os._exit(status)


def _create_components(
    settings: Settings, *, database_timeout: float = STATEMENT_TIMEOUT, store: ObjectStore | None = None
) -> Components:
    """Open what needs no database, so that a first start with a wrong setting creates no database and no key."""
    components = Components(settings, database_timeout, on_replaced=_exit_at_once, store=store)
    if settings.store == "s3":
        _ = components.buckets
    return components


def _exit_at_once(error: DatabaseReplacedError) -> Never:
    """End the process: no database has its state any more, and nothing may be written."""
    log.error("the service stops", error=str(error))
    os._exit(1)


def _build_backend(
    components: Components,
    instances: InstanceInventory,
    power: PowerControl,
    default_host: str | None,
    health: HealthCache,
) -> Ec2Backend:
    """Build what the EC2 actions use."""
    settings = components.settings
    tasks = BundleTaskService(
        components.database,
        components.records(),
        components.queues.enqueue,
        default_host=default_host,
        retention=timedelta(days=settings.task_retention_days),
        max_per_account=settings.max_tasks_per_account,
    )
    return Ec2Backend(
        accounts=components.accounts,
        instances=instances,
        buckets=RetryingStore(components.buckets, STORE_RETRY_TIMEOUT),
        tasks=tasks,
        power=power,
        rate=RateLimit(settings.max_requests_per_second, settings.max_request_burst),
        region=settings.region,
        any_platform=settings.platforms == "any",
        existing_bundle=settings.existing_bundle,
        allow_signature_v2=settings.signature_version_2 == "accept",
        is_allowed=Permissions(users=Users(components.database), region=settings.region).is_allowed,
        health=health,
    )


def _start_probes(settings: Settings, *components: str) -> HealthCache:
    """Start the probes of these components; return the cache that receives their results."""
    health = HealthCache(dict.fromkeys(components, MAX_AGE))
    for component in components:
        _PROBES[component](settings, health).start()
    return health


_PROBES = {DATABASE: database_probe, STORE: store_probe, HYPERVISOR: hypervisor_probe}


def _start_monitoring(monitoring: MonitoringServer | None, health: HealthCache) -> None:
    if monitoring is not None:
        monitoring.start(MonitoringApp(health))
        log_event("monitoring started", address=monitoring.url)


def _log_start(settings: Settings, process: str, address: str | None = None) -> None:
    is_api = process == "api"
    log_event(
        "service started",
        process=process,
        version=version("thrave"),
        data_dir=str(settings.data_dir.absolute()),
        database=display_name(settings.database),
        store=settings.s3_endpoint or "s3" if settings.store == "s3" else "directory",
        hypervisor=None if is_api else settings.hypervisor,
        host=None if is_api else settings.host_id,
        address=address,
    )


def _serve_requests(
    http_server: HttpServer,
    app: ASGIApp,
    on_listening: OnListening,
    *,
    lock: ProcessLock | None,
    settings: Settings,
    process: str,
) -> None:
    def report_url(url: str) -> None:
        _log_start(settings, process, url)
        if lock is not None:
            lock.write(f"process {os.getpid()} ({url})")
        on_listening(url)

    http_server.serve(app, report_url)


def _stop_when_drained(agent: Agent) -> None:
    if status := agent.wait():
        os._exit(status)
    os.kill(os.getpid(), signal.SIGTERM)
