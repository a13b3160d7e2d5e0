"""A check, its outcome, and the function that runs one check within a time limit.

A check that hangs is abandoned in its thread. Of an unexpected error only the type is reported, since its message might
contain a secret.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

import sqlalchemy as sa

from thrave.buckets.errors import BucketError
from thrave.compute.errors import InstanceError
from thrave.concurrency import Call, CallTimeoutError, monotonic
from thrave.doctor.check_context import CheckContext, CheckFailed, CheckSkipped
from thrave.identity.errors import IdentityError
from thrave.vault import VaultError
from thrave.volumes.errors import VolumeError

_EXPECTED = (CheckFailed, BucketError, InstanceError, IdentityError, VaultError, VolumeError, OSError)


class Outcome(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    FAILED = "failed"
    WARNING = "warning"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """A row of the table of checks."""

    area: str
    name: str
    tries: str
    """What is checked, for the operator."""
    remedy: str
    """What to do when it fails."""
    run: Callable[[CheckContext], str] = field(repr=False)
    """Returns a detail for the operator; raises CheckFailed, CheckSkipped, or an error of the checked package."""
    needs: tuple[str, ...] = ()
    """Names of checks that must not have failed."""
    optional: bool = False
    """Whether tasks can do without it; then a failure is a warning."""
    seconds: float = 20.0
    """Time limit."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: Check
    outcome: Outcome
    detail: str
    is_blocking: bool = False
    """Whether checks that need this one are skipped."""


def run_check(check: Check, context: CheckContext, blocking: Collection[str] = ()) -> Finding:
    """Run one check within its time limit, unless it needs one of the checks named in `blocking`."""
    for name in check.needs:
        if name in blocking:
            return Finding(check, Outcome.SKIPPED, f"needs: {name}", is_blocking=True)
    started = monotonic()
    try:
        return Call(check.name, lambda: evaluate_check(check, context)).result(check.seconds)
    except CallTimeoutError:
        return Finding(check, Outcome.FAILED, f"no result after {monotonic() - started:.0f} s", is_blocking=True)


def evaluate_check(check: Check, context: CheckContext) -> Finding:
    """Run one check in this thread, without a time limit."""
    try:
        return Finding(check, Outcome.OK, check.run(context))
    except CheckSkipped as reason:
        return Finding(check, Outcome.SKIPPED, str(reason))
    except sa.exc.DBAPIError as error:
        detail = str(error.orig).strip()
    except _EXPECTED as error:
        detail = str(error)
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            detail = f"{error.filename}: {os.strerror(error.errno)}"
    except Exception as error:  # noqa: BLE001 (the other checks must run)
        detail = f"unexpected error: {type(error).__name__}"
    outcome = Outcome.WARNING if check.optional else Outcome.FAILED
    return Finding(check, outcome, " ".join(detail.split()), is_blocking=not check.optional)
