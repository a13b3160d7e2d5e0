"""What is known to be wrong with a service that runs: the cheap checks, looked at when somebody asks for a bundle.

Nothing runs while nobody asks. A good result stands for a while, a bad one for a moment, so that a store that is back
is used at once; and a check that has failed is tried again before it counts, as a store may fail for a moment.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import structlog

from thrave.compute.base import HypervisorDriver
from thrave.compute.errors import InstanceError
from thrave.compute.instance import Instance
from thrave.concurrency import Call, CallTimeoutError
from thrave.config import Settings
from thrave.doctor import host_checks
from thrave.doctor.check_context import CheckContext
from thrave.doctor.check_table import CHECKS
from thrave.doctor.checks import Check, Finding, Outcome, run_check
from thrave.tasks.root_volume import check_root_volume
from thrave.volumes.errors import VolumeError

GOOD_FOR = 30.0  # seconds
BAD_FOR = 5.0  # seconds
_PATIENCE = 5.0  # seconds, for one check: a caller waits

log = structlog.get_logger()


class StandingChecks:
    """The cheap checks of one service; safe to use from several threads, of which one looks and the others wait."""

    def __init__(self, settings: Settings) -> None:
        self._subject = CheckContext(settings)
        self._checks = [replace(check, seconds=_PATIENCE) for check in CHECKS if check.name in _cheap(self._subject)]
        self._lock = threading.Lock()
        self._stands_until = 0.0
        self._trouble: str | None = None

    def store_trouble(self) -> str | None:
        """Why nothing can be stored now; None if no reason is known."""
        with self._lock:
            if time.monotonic() > self._stands_until:
                self._trouble = self._look()
                self._stands_until = time.monotonic() + (GOOD_FOR if self._trouble is None else BAD_FOR)
            return self._trouble

    def _look(self) -> str | None:
        for check in self._checks:
            finding = self._twice(check)
            if finding.outcome is Outcome.FAILED:
                log.warning("no bundle can be stored: `thrave doctor` says more", check=check.name, seen=finding.detail)
                return finding.detail
        return None

    def _twice(self, check: Check) -> Finding:
        # Not `retry`: a failed check is a result, no exception, and the caller of EC2 waits for the second attempt.
        finding = run_check(check, self._subject)
        return run_check(check, self._subject) if finding.outcome is Outcome.FAILED else finding


class VolumeChecks:
    """Root volumes of this machine, looked at when somebody asks for a bundle; safe to use from several threads.

    A disk may not answer at all: then the caller is told so after `_PATIENCE` seconds, and nobody else waits for it
    until it does.

    Args:
        instances: All of this machine, of which another may have the same file.
        directories: Where files may lie that an image refers to, besides its own folder.
    """

    def __init__(self, instances: HypervisorDriver, directories: Sequence[Path]) -> None:
        self._instances = instances
        self._directories = directories
        self._silent: dict[str, Call[_Trouble | InstanceError | None]] = {}

    def trouble(self, instance: Instance) -> str | None:
        """Why the root volume of an instance cannot be bundled, for its owner; None if nothing is known.

        Raises:
            InstanceError: The hypervisor does not tell who else has the file.
        """
        found: _Trouble | InstanceError | None = _Trouble("it does not answer", "its root volume does not answer")
        earlier = self._silent.get(instance.instance_id)
        if earlier is None or not earlier.is_running:
            look = Call("root volume", lambda: self._look(instance))
            try:
                found = look.result(_PATIENCE)
            except CallTimeoutError:
                self._silent[instance.instance_id] = look
        if isinstance(found, InstanceError):
            raise found
        if found is None:
            return None
        log.warning("an instance cannot be bundled", instance_id=instance.instance_id, seen=found.seen)
        return found.said

    def _look(self, instance: Instance) -> "_Trouble | InstanceError | None":
        try:
            fault = host_checks.bundling_fault(instance)
            if fault is not None:
                return _Trouble(fault, "its root volume cannot be read")
            check_root_volume(self._instances, instance.instance_id, instance.root_volume, self._directories)
        except VolumeError as error:
            return _Trouble(str(error), f"its root volume cannot be bundled: {error.public}")
        except InstanceError as error:
            return error
        except Exception:  # it must not end in silence
            log.exception("a look at a root volume failed")
            return _Trouble("the look at it failed", "its root volume cannot be read")
        return None


class _Trouble(NamedTuple):
    """What is wrong with a root volume, for the log and for its owner."""

    seen: str
    said: str


def _cheap(subject: CheckContext) -> set[str]:
    """With owners' keys, the store's word on the caller's own is asked for with each request (`create`) anyway."""
    return {"answers"} if subject.by_owners_key else {"answers", "key"}
