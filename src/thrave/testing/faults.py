"""The faults that a test can inject into `ThraveService`: one table. `make docs` generates a page from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from thrave.concurrency import new_lock
from thrave.ec2.actions import ACTIONS
from thrave.ec2.errors import ERRORS
from thrave.tasks.errors import ERROR_CODES
from thrave.tasks.models import BundleTaskState

OBJECTS = ("part", "manifest", "side-file", "any")
"""Kinds of objects that a task stores."""

STATES = tuple(state.value for state in BundleTaskState)[:4]
"""States in which a task can wait or fail."""


class FaultDefinition(NamedTuple):
    """A row of the table."""

    options: Mapping[str, object]
    """Names of options with their defaults."""
    effect: str
    """What the service does."""
    result: str
    """What the code under test sees."""


FAULTS: Mapping[str, FaultDefinition] = {
    "throttle": FaultDefinition(
        {"action": "", "times": 1},
        "The request is refused: `RequestLimitExceeded`, status 503.",
        "SDKs retry.",
    ),
    "request-error": FaultDefinition(
        {"code": "InternalError", "action": "", "times": 0},
        "The request is refused with this error of the EC2 API.",
        "The error. SDKs retry status 500 and 503.",
    ),
    "response-lost": FaultDefinition(
        {"action": "", "times": 1},
        "The request is executed, but its response is `Unavailable`, status 503.",
        "SDKs retry. A repeated `BundleInstance` gets `BundlingInProgress`.",
    ),
    "task-fails": FaultDefinition(
        {"code": "Server.InternalError", "message": "Injected by a test.", "state": "bundling", "times": 1},
        "The task fails in this state with this error of bundle tasks, and is undone.",
        "State `failed` with the error. The instance runs, and no object remains.",
    ),
    "task-waits": FaultDefinition(
        {"state": "bundling"},
        "The task stays at the beginning of this state until the test ends or the task is cancelled.",
        "A task that does not finish.",
    ),
    "store-refuses": FaultDefinition(
        {"object": "any", "after": 0, "times": 0},
        "The store answers 403 AccessDenied to an upload.",
        "State `failed`, `Client.S3Error`.",
    ),
    "store-fails": FaultDefinition(
        {"object": "any", "after": 0, "times": 0},
        "The store answers 503 SlowDown to an upload. The task retries for one second.",
        "With `times=1` nothing but a delay. Without it: state `failed`, `Server.S3Error`.",
    ),
    "store-loses": FaultDefinition(
        {"object": "any", "after": 0, "times": 0},
        "The store confirms an upload, and does not keep the object.",
        "State `failed`, `Server.S3Error`; a lost manifest is not noticed.",
    ),
    "store-waits": FaultDefinition(
        {"object": "any", "after": 0},
        "An upload does not end until the test ends. The task can be cancelled.",
        "State `bundling` (for a manifest: `storing`), with progress that no longer increases.",
    ),
}

_ACTION_FAULTS = ("throttle", "request-error", "response-lost")
_CODES: Mapping[str, Mapping[str, object]] = {"request-error": ERRORS, "task-fails": ERROR_CODES}


@dataclass
class Fault:
    """An injected fault.

    Attributes:
        name: A key of `FAULTS`.
        options: Every option with its value.
        matched: Calls so far to which the fault applies, with those that `after` skips.
        injected: Calls that got the fault.
    """

    name: str
    options: Mapping[str, object]
    matched: int = 0
    injected: int = 0

    def take(self) -> bool:
        """Count a call; return whether the call gets the fault."""
        self.matched += 1
        times, after = self.options.get("times", 0), self.options.get("after", 0)
        assert isinstance(times, int)
        assert isinstance(after, int)
        has_fault = self.matched > after and (times == 0 or self.injected < times)
        self.injected += has_fault
        return has_fault


def new_fault(name: str, options: Mapping[str, object]) -> Fault:
    """Check and return a fault.

    Raises:
        ValueError: Unknown name, option or value.
    """
    if name not in FAULTS:
        raise ValueError(f"Unknown fault {name!r}. Faults: {', '.join(FAULTS)}.")
    known = FAULTS[name].options
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"Fault {name!r} has no option {option!r}. Options: {', '.join(known)}.")
        if type(value) is not type(known[option]) or (isinstance(value, int) and value < 0):
            kind = "a number, 0 or more" if isinstance(known[option], int) else "text"
            raise ValueError(f"Option {option!r} of fault {name!r} is {value!r}, and must be {kind}.")
        choices = {
            "action": ("", *ACTIONS),
            "code": tuple(_CODES.get(name, ())),
            "object": OBJECTS,
            "state": STATES if name == "task-waits" else STATES[1:],
        }.get(option, ())
        if choices and value not in choices:
            allowed = ", ".join(filter(None, choices))
            raise ValueError(f"Option {option!r} of fault {name!r} is {value!r}, and must be one of: {allowed}.")
    return Fault(name, {**known, **options})


@dataclass
class FaultList:
    """The faults of the service. Safe to use from several threads."""

    _faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Create the lock."""
        self._lock = new_lock()

    def add(self, fault: Fault) -> None:
        """Add a fault; faults apply in the order in which they were added."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def counts(self) -> dict[str, int]:
        """Return how often each fault was injected, by name."""
        with self._lock:
            counts: dict[str, int] = {}
            for fault in self._faults:
                counts[fault.name] = counts.get(fault.name, 0) + fault.injected
            return counts

    def take_for_action(self, action: str) -> Fault | None:
        """Return the fault that a request gets, and count it."""
        return self._take(lambda fault: fault.name in _ACTION_FAULTS and fault.options["action"] in ("", action))

    def take_for_object(self, kind: str) -> Fault | None:
        """Return the fault that the upload of an object gets, and count it."""
        return self._take(lambda fault: fault.options.get("object") in (kind, "any"))

    def take_failure(self, state: str) -> Fault | None:
        """Return the fault by which a task fails in a state, and count it."""
        return self._take(lambda fault: fault.name == "task-fails" and fault.options["state"] == state)

    def take_wait(self, state: str) -> Fault | None:
        """Return the fault by which a task waits in a state, and count it."""
        return self._take(lambda fault: fault.name == "task-waits" and fault.options["state"] == state)

    def _take(self, applies: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if applies(fault) and fault.take()), None)
