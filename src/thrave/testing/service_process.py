"""The process of `ThraveService`: the service, its store in memory, and commands of the test.

`python -m thrave.testing.service_process DATA_DIR SETTINGS` prints `listening on URL`. Each line on stdin is a command,
`[NAME, ARGUMENTS]` in JSON. Each gets one line: `{"result": …}` or `{"error": …}`. The process ends when stdin is
closed, so that it does not outlive the test.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path

import sqlalchemy as sa
import structlog

from thrave.components import Components, open_components
from thrave.concurrency import System, start_thread, use_system, utc_now
from thrave.config import Settings
from thrave.database import bundle_part, bundle_task, task_in_progress
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import Parameters
from thrave.logs import configure_logs
from thrave.server import TestHooks, serve
from thrave.tasks.models import BundleTaskState
from thrave.testing.faults import FaultList, new_fault
from thrave.testing.memory_store import MemoryStore
from thrave.testing.task_gate import TaskGate

log = structlog.get_logger()
EXPECTED_ERRORS = ("TimeoutError", "ValueError")
"""Errors that the test gets as they are; the others become ServerError."""


class _ManualTime(System):
    """The operating system's threads and clocks, but the time of day is fixed if a test says so."""

    fixed: datetime | None = None

    def wall_time(self) -> float:
        """Return the fixed time, or the current one."""
        return System.wall_time() if self.fixed is None else self.fixed.timestamp()


class _Commands:
    """The commands of the test, each a public method."""

    def __init__(self, settings: Settings, time: _ManualTime) -> None:
        self._time = time
        self._settings = settings
        self._faults = FaultList()
        self._gate = TaskGate(self._faults)
        self._store = MemoryStore(settings.region, self._faults)
        self._s3_url = self._store.serve()
        self.hooks = TestHooks(
            store=self._store,
            around_action=self._around_action,
            on_state=self._gate.on_state,
            check_request_time=False,  # the test may have set the clock, and the client's is another one
        )

    def s3_url(self) -> str:
        """Return the URL of the store."""
        return self._s3_url

    def new_account(self, name: str, certificate: str | None) -> dict[str, dict[str, object]]:
        """Create an account with an access key."""
        account, key = self._components.accounts.create(name, certificate)
        self._store.add_key(key)
        return {"account": asdict(account), "key": asdict(key)}

    @cached_property
    def _components(self) -> Components:
        return open_components(self._settings)

    def inject(self, name: str, options: dict[str, object]) -> None:
        """Inject a fault."""
        self._faults.add(new_fault(name, options))

    def fault_counts(self) -> dict[str, int]:
        """Return how often each fault was injected."""
        return self._faults.counts()

    def hold(self) -> None:
        """Stop each task in each state."""
        self._gate.hold()

    def set_time(self, time: str) -> None:
        """Set the clock, and stop it."""
        self._time.fixed = datetime.fromisoformat(time)

    def add_time(self, seconds: float) -> None:
        """Advance the clock, and stop it."""
        self._time.fixed = utc_now() + timedelta(seconds=seconds)

    def time(self) -> str:
        """Return the time of the service."""
        return utc_now().isoformat()

    def advance(self, bundle_id: str, until: str | None) -> str:
        """Let a task continue; return the state that it has reached."""
        return self._gate.advance(bundle_id, None if until is None else BundleTaskState(until)).value

    def reset(self) -> None:
        """Remove all faults, let tasks and uploads continue, and start the clock."""
        self._faults.clear()
        self._gate.release()
        self._store.release()
        self._time.fixed = None

    def wait_for_end(self, bundle_id: str) -> str:
        """Wait until a task has ended."""
        return self._gate.wait_for_end(bundle_id).value

    def remove_buckets(self, account_id: str) -> None:
        """Remove all buckets of an account, and its ended tasks with their claims of objects.

        Otherwise the next test with the same bucket and prefix would get other names of parts: after an earlier task
        there, a late upload may still arrive.
        """
        self._store.remove_all(account_id)
        ended = sa.and_(bundle_task.c.owner_id == account_id, sa.not_(task_in_progress))
        tasks = sa.select(bundle_task.c.bundle_id).where(ended)
        with self._components.database.begin() as connection:
            connection.execute(bundle_part.delete().where(bundle_part.c.bundle_id.in_(tasks)))
            connection.execute(bundle_task.delete().where(ended))

    @contextmanager
    def _around_action(self, action: str, parameters: Parameters) -> Iterator[None]:
        fault = self._faults.take_for_action(action)
        if fault is not None and fault.name == "throttle":
            raise EC2Error("RequestLimitExceeded")
        if fault is not None and fault.name == "request-error":
            raise EC2Error(str(fault.options["code"]), "Injected by a test.")
        yield
        if action == "CancelBundleTask":
            self._gate.cancel(str(parameters["BundleId"]))
        if fault is not None:
            raise EC2Error("Unavailable", reason="injected by a test after the request was executed")


def main() -> None:
    """Run the service until stdin is closed or a signal arrives."""
    data_dir, settings_json = sys.argv[1:]
    settings = Settings.model_validate({**json.loads(settings_json), "data_dir": Path(data_dir)})
    configure_logs(settings.log_format)
    time = _ManualTime()
    use_system(time)
    commands = _Commands(settings, time)
    serve(settings, partial(_start_commands, commands), commands.hooks)
    os._exit(0)


def _start_commands(commands: _Commands, url: str) -> None:
    _write(f"listening on {url}")
    start_thread("commands", partial(_run_commands, commands), on_failure=lambda _error: os._exit(1))


def _run_commands(commands: _Commands) -> None:
    for line in sys.stdin:
        name, arguments = json.loads(line)
        command: Callable[..., object] = getattr(commands, name)
        try:
            answer = {"result": command(*arguments)}
        except Exception as error:
            if type(error).__name__ not in EXPECTED_ERRORS:
                log.exception("command of a test failed", command=name)
            answer = {"error": [type(error).__name__, str(error)]}
        _write(json.dumps(answer, default=str))
    os._exit(0)


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
