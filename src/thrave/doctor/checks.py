"""A check, and what comes of it: ok, failed, lacking (some callers want it), or not tried.

A check has a time limit. One that hangs is left behind in its thread; a failure that nobody foresaw is told by its type
alone, for its words might hold a secret.
"""

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

import sqlalchemy as sa

from thrave.buckets.errors import BucketError
from thrave.compute.errors import InstanceError
from thrave.concurrency import Call, CallTimeoutError
from thrave.doctor.check_context import CheckContext, CheckFailed, CheckSkipped
from thrave.identity.errors import IdentityError
from thrave.vault import VaultError
from thrave.volumes.errors import VolumeError

_FORESEEN = (CheckFailed, BucketError, InstanceError, IdentityError, VaultError, VolumeError, OSError)


class Outcome(StrEnum):
    """What came of a check."""

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
    """What it tries."""
    remedy: str
    """What to do when it fails."""
    run: Callable[[CheckContext], str] = field(repr=False)
    """Gives what it has seen; raises what a room raises, Trouble, or NotTried."""
    needs: tuple[str, ...] = ()
    """Names of checks without which it cannot be tried."""
    optional: bool = False
    """Whether tasks run without it, if callers know."""
    seconds: float = 20.0
    """Its time limit."""


@dataclass(frozen=True)
class Finding:
    """What came of a check."""

    check: Check
    outcome: Outcome
    detail: str
    in_the_way: bool = False
    """Whether what needs it cannot be tried."""


def run_check(check: Check, subject: CheckContext, in_the_way: Collection[str] = ()) -> Finding:
    """Try one check, unless one that it needs is in the way."""
    for name in check.needs:
        if name in in_the_way:
            return Finding(check, Outcome.SKIPPED, f"needs: {name}", in_the_way=True)
    begun = time.monotonic()
    try:
        return Call(check.name, lambda: _tried(check, subject)).result(check.seconds)
    except CallTimeoutError:
        return Finding(check, Outcome.FAILED, f"not over after {time.monotonic() - begun:.0f} s", in_the_way=True)


def _tried(check: Check, subject: CheckContext) -> Finding:
    try:
        return Finding(check, Outcome.OK, check.run(subject))
    except CheckSkipped as reason:
        return Finding(check, Outcome.SKIPPED, str(reason))
    except sa.exc.DBAPIError as error:
        said = str(error.orig).strip()
    except _FORESEEN as error:
        said = str(error)
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            said = f"{error.filename}: {os.strerror(error.errno)}"
    except Exception as error:  # noqa: BLE001 (whatever it is, the other checks are worth trying)
        said = f"unforeseen: {type(error).__name__}"
    outcome = Outcome.WARNING if check.optional else Outcome.FAILED
    return Finding(check, outcome, " ".join(said.split()), in_the_way=not check.optional)
