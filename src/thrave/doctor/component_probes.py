"""Runs cheap checks of store, database and hypervisor in the background and records the results (`health.py`)."""

import os
from collections.abc import Sequence
from functools import partial

import structlog

from thrave.concurrency import Call, CallTimeoutError, monotonic, start_repeating
from thrave.config import Settings
from thrave.doctor.check_context import CheckContext, CheckSkipped
from thrave.doctor.check_table import CHECKS
from thrave.doctor.checks import Check, Finding, Outcome, evaluate_check
from thrave.health import DATABASE, HYPERVISOR, STORE, HealthCache

GOOD_INTERVALS = {STORE: 30.0, DATABASE: 5.0, HYPERVISOR: 10.0}  # seconds between two runs while it can be used
BAD_INTERVAL = 1.0  # seconds between two runs while it cannot, so that a component that has recovered is used soon
CHECK_TIMEOUT = 5.0  # seconds for one attempt of one check
ATTEMPTS = 2  # a single failure may be transient
# A disk or a network file system may never respond. Then the probe waits for these calls and starts no further ones.
MAX_HANGING = 2
# One interval after a bad result, and two checks with all attempts: a bad result is older only if the probe does not
# run at all. A good result that is older has no effect.
MAX_AGE = BAD_INTERVAL + 2 * ATTEMPTS * CHECK_TIMEOUT

log = structlog.get_logger()


class ComponentProbe:
    """Checks whether a component of the service can be used now.

    Args:
        component: Name of the results in `health`.
        checks: Checks in their order; the first that fails is the result.
        context: What the checks use.
        health: Receives the results.
    """

    def __init__(self, component: str, checks: Sequence[Check], context: CheckContext, health: HealthCache) -> None:
        self._component = component
        self._checks = checks
        self._context = context
        self._health = health
        self._hanging: list[Call[Finding]] = []

    def start(self) -> None:
        """Run now, and then in a thread at the interval that the last result demands."""
        start_repeating(f"{self._component} probe", BAD_INTERVAL, self.run_if_due)

    def run_if_due(self) -> None:
        """Run, unless the last result is good and younger than its interval in `GOOD_INTERVALS`."""
        last = self._health.last(self._component)
        if last is None or last.error is not None or monotonic() - last.time >= GOOD_INTERVALS[self._component]:
            self.run()

    def run(self) -> None:
        """Run the checks up to the first that fails, and record the result."""
        last = self._health.last(self._component)
        error = next((error for check in self._checks if (error := self._find_error(check)) is not None), None)
        self._health.record(self._component, error)
        if error is not None and (last is None or last.error is None):
            log.warning("component unusable", component=self._component, error=error)
        elif error is None and last is not None and last.error is not None:
            log.info("component usable again", component=self._component)

    def _find_error(self, check: Check) -> str | None:
        error = f"no result after {CHECK_TIMEOUT:.0f} s"
        # Not `retry`: a failed check is a result, no exception.
        for _ in range(ATTEMPTS):
            self._hanging = [call for call in self._hanging if call.is_running]
            if len(self._hanging) >= MAX_HANGING:
                break
            call = Call(check.name, partial(evaluate_check, check, self._context))
            try:
                finding = call.result(CHECK_TIMEOUT)
            except CallTimeoutError:
                self._hanging.append(call)
                continue
            if finding.outcome is not Outcome.FAILED:
                return None
            error = finding.detail
        return error


def store_probe(settings: Settings, health: HealthCache) -> ComponentProbe:
    """Return the probe of the object store: whether bundles can be stored now."""
    context = CheckContext(settings)
    # With owners' keys, each request checks the caller's own key when it creates the bucket.
    return _probe(STORE, ["available"] if context.uses_owner_keys else ["available", "key"], context, health)


def database_probe(settings: Settings, health: HealthCache) -> ComponentProbe:
    """Return the probe of the database: whether it answers a query."""
    return _probe(DATABASE, ["reachable"], CheckContext(settings), health)


def hypervisor_probe(settings: Settings, health: HealthCache) -> ComponentProbe:
    """Return the probe of the hypervisor: whether libvirt answers, or the folder of instances can be read."""
    context = CheckContext(settings)
    if settings.hypervisor == "libvirt":
        return _probe(HYPERVISOR, ["libvirt"], context, health)
    return ComponentProbe(HYPERVISOR, [_INSTANCE_DIR], context, health)


def _probe(component: str, names: Sequence[str], context: CheckContext, health: HealthCache) -> ComponentProbe:
    return ComponentProbe(component, [check for check in CHECKS if check.name in names], context, health)


def _check_instance_dir(context: CheckContext) -> str:
    folder = context.settings.effective_instance_dir
    if not folder.exists():
        raise CheckSkipped(f"{folder} does not exist: this machine has no instances")
    with os.scandir(folder) as entries:
        next(entries, None)
    return str(folder)


# Not a row of the doctor's table, which reads every file in the folder: too much work for each run of a probe.
_INSTANCE_DIR = Check(
    "host", "instance folder", "Opens the folder of the files that describe instances.",
    "Allow the service's user to read `instance_dir`.", _check_instance_dir,
)  # fmt: skip
