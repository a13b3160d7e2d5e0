"""Cheap checks of a running service, made when a client requests a bundle: the store, and the root volume.

Nothing runs without a request. A good result of the store's checks is kept for `GOOD_FOR` seconds and a bad one for
`BAD_FOR`, so that a store that has recovered is used soon. A failed check is repeated once before it counts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import structlog

from thrave.compute.base import HypervisorDriver
from thrave.compute.errors import InstanceError
from thrave.compute.instance import Instance
from thrave.concurrency import Call, CallTimeoutError, monotonic, new_lock
from thrave.config import Settings
from thrave.doctor import host_checks
from thrave.doctor.check_context import CheckContext
from thrave.doctor.check_table import CHECKS
from thrave.doctor.checks import Check, Finding, Outcome, run_check
from thrave.tasks.root_volume import check_root_volume
from thrave.volumes.errors import VolumeError

GOOD_FOR = 30.0  # seconds for which a good result is used
BAD_FOR = 5.0  # seconds for which a bad result is used
_TIMEOUT = 5.0  # seconds for one check, since a client waits for the response

log = structlog.get_logger()


class StandingChecks:
    """The cheap checks of the store. Safe for several threads: one checks, the others wait for the result."""

    def __init__(self, settings: Settings) -> None:
        self._context = CheckContext(settings)
        cheap = _cheap_checks(self._context)
        self._checks = [replace(check, seconds=_TIMEOUT) for check in CHECKS if check.name in cheap]
        self._lock = new_lock()
        self._valid_until = 0.0
        self._trouble: str | None = None

    def store_trouble(self) -> str | None:
        """Why no bundle can be stored now, for a client; None if no reason is known."""
        with self._lock:
            if monotonic() > self._valid_until:
                self._trouble = self._run_checks()
                self._valid_until = monotonic() + (GOOD_FOR if self._trouble is None else BAD_FOR)
            return self._trouble

    def _run_checks(self) -> str | None:
        for check in self._checks:
            finding = self._run_twice(check)
            if finding.outcome is Outcome.FAILED:
                log.warning("store unusable", check=check.name, error=finding.detail)
                return finding.detail
        return None

    def _run_twice(self, check: Check) -> Finding:
        # Not `retry`: a failed check is a result, no exception, and a client waits for the second attempt.
        finding = run_check(check, self._context)
        return run_check(check, self._context) if finding.outcome is Outcome.FAILED else finding


class VolumeChecks:
    """Checks a root volume of this machine when a client requests a bundle of it. Safe for several threads.

    A disk may not respond at all. The request then fails after `_TIMEOUT` seconds, and later requests for the same
    instance fail at once until the disk responds.

    Args:
        instances: All instances of this machine; another one may use the same file.
        directories: Folders that may hold files to which an image refers, in addition to its own folder.
    """

    def __init__(self, instances: HypervisorDriver, directories: Sequence[Path]) -> None:
        self._instances = instances
        self._directories = directories
        self._hanging: dict[str, Call[_VolumeTrouble | InstanceError | None]] = {}

    def trouble(self, instance: Instance) -> str | None:
        """Why the root volume of an instance cannot be bundled, for its owner; None if no reason is known.

        Raises:
            InstanceError: The hypervisor does not report which other instances use the file.
        """
        found: _VolumeTrouble | InstanceError | None
        found = _VolumeTrouble("the root volume does not respond", "its root volume does not respond")
        earlier = self._hanging.get(instance.instance_id)
        if earlier is None or not earlier.is_running:
            check = Call("root volume", lambda: self._check(instance))
            try:
                found = check.result(_TIMEOUT)
            except CallTimeoutError:
                self._hanging[instance.instance_id] = check
        if isinstance(found, InstanceError):
            raise found
        if found is None:
            return None
        log.warning("instance cannot be bundled", instance_id=instance.instance_id, error=found.internal)
        return found.public

    def _check(self, instance: Instance) -> "_VolumeTrouble | InstanceError | None":
        try:
            fault = host_checks.bundling_fault(instance)
            if fault is not None:
                return _VolumeTrouble(fault, "its root volume cannot be read")
            check_root_volume(self._instances, instance.instance_id, instance.root_volume, self._directories)
        except VolumeError as error:
            return _VolumeTrouble(str(error), f"its root volume cannot be bundled: {error.public}")
        except InstanceError as error:
            return error
        except Exception:  # the thread would end without a result
            log.exception("root volume check failed", instance_id=instance.instance_id)
            return _VolumeTrouble("the check failed", "its root volume cannot be read")
        return None


class _VolumeTrouble(NamedTuple):
    """Why a root volume cannot be bundled."""

    internal: str
    """For the log."""
    public: str
    """For the owner of the instance; names no file of the host."""


def _cheap_checks(context: CheckContext) -> set[str]:
    """Names of the checks; with owners' keys, each request checks the caller's own key when it creates the bucket."""
    return {"available"} if context.uses_owner_keys else {"available", "key"}
