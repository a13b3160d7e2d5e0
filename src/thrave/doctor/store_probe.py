"""Runs the cheap checks of the store in the background and records the result for requests (`health.py`)."""

from functools import partial

import structlog

from thrave.concurrency import Call, CallTimeoutError, monotonic, start_repeating
from thrave.config import Settings
from thrave.doctor.check_context import CheckContext
from thrave.doctor.check_table import CHECKS
from thrave.doctor.checks import Check, Finding, Outcome, evaluate_check
from thrave.health import STORE, HealthCache

GOOD_INTERVAL = 30.0  # seconds between two runs while the store can be used
BAD_INTERVAL = 1.0  # seconds between two runs while it cannot, so that a store that has recovered is used soon
CHECK_TIMEOUT = 5.0  # seconds for one attempt of one check
ATTEMPTS = 2  # a single failure may be transient
# A disk or a network file system may never respond. Then the probe waits for these calls and starts no further ones.
MAX_HANGING = 2
# One interval after a bad result, and two checks with all attempts: a bad result is older only if the probe does not
# run at all. A good result that is older has no effect.
MAX_AGE = BAD_INTERVAL + 2 * ATTEMPTS * CHECK_TIMEOUT

log = structlog.get_logger()


class StoreProbe:
    """Checks whether bundles can be stored now.

    Args:
        settings: Settings of the service.
        health: Receives the results.
    """

    def __init__(self, settings: Settings, health: HealthCache) -> None:
        self._health = health
        self._context = CheckContext(settings)
        # With owners' keys, each request checks the caller's own key when it creates the bucket.
        names = {"available"} if self._context.uses_owner_keys else {"available", "key"}
        self._checks = [check for check in CHECKS if check.name in names]
        self._hanging: list[Call[Finding]] = []

    def start(self) -> None:
        """Run now, and then in a thread at the interval that the last result demands."""
        start_repeating("store probe", BAD_INTERVAL, self.run_if_due)

    def run_if_due(self) -> None:
        """Run, unless the last result is good and younger than `GOOD_INTERVAL`."""
        last = self._health.last(STORE)
        if last is None or last.error is not None or monotonic() - last.time >= GOOD_INTERVAL:
            self.run()

    def run(self) -> None:
        """Run the checks up to the first that fails, and record the result."""
        last = self._health.last(STORE)
        error = next((error for check in self._checks if (error := self._find_error(check)) is not None), None)
        self._health.record(STORE, error)
        if error is not None and (last is None or last.error is None):
            log.warning("store unusable", error=error)
        elif error is None and last is not None and last.error is not None:
            log.info("store usable again")

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
