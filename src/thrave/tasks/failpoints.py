"""The steps of a task that a crash can cut off: one table, and a way to have a crash right before or after one.

Whatever a task does that outlives its process stands in a block `with durable("part stored"):`. With the setting
`failpoint = "part stored, after"` the process kills itself (SIGKILL, as the kernel does when memory is short) as soon
as it has come there; with `"part stored, after, 3"` the third time. It is how the kill sweep of the tests comes to
each of these moments. Without the setting nothing here does anything.
"""

import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Literal, NamedTuple

Step = Literal[
    "record", "cancellation", "power noted", "sysprep sent", "shutdown sent", "power cut", "shutdown seen",
    "overlay noted", "root volume frozen", "volume opened", "sealing begun", "part sealed", "part stored",
    "part recorded", "sealing ended", "instance started", "side file stored", "earlier bundle noted",
    "manifest stored", "overlay merged", "earlier bundle removed", "record closed", "objects removed",
    "removal recorded", "task purged",
]  # fmt: skip


class Durable(NamedTuple):
    """A row of the table."""

    done: str
    """What the step does."""
    again: str
    """What is done about it when the task goes on after a crash."""


FAILPOINTS: Mapping[Step, Durable] = {
    "record": Durable(
        "The task is recorded and given to its host, in one transaction.",
        "Nothing, or all of it, was done; a caller who had no answer finds out by DescribeBundleTasks.",
    ),
    "cancellation": Durable("CancelBundleTask is recorded.", "As for the record."),
    "power noted": Durable(
        "The power state that the instance is to have in the end is recorded, before anything is done to it.",
        "It is noted once; what its owner asks later takes its place.",
    ),
    "sysprep sent": Durable(
        "The guest is asked to prepare itself for being copied, and to power off.",
        "It is asked again unless it is off.",
    ),
    "shutdown sent": Durable("The guest is asked to power off.", "It is asked again unless it is off."),
    "power cut": Durable(
        "The power of a deaf guest is cut, if the operator wants that.", "It is cut unless it is off."
    ),
    "shutdown seen": Durable("The instance is off; nobody needs to look after it.", "It is looked at again."),
    "overlay noted": Durable("What is going to be frozen is recorded.", "It is noted once."),
    "root volume frozen": Durable(
        "The instance's root volume has a copy-on-write overlay.", "It gets one unless it has it."
    ),
    "volume opened": Durable("The root volume is open, its size recorded.", "It is opened again."),
    "sealing begun": Durable("A new key is recorded, sealed by the vault.", "Without a stored part, there is another."),
    "part sealed": Durable(
        "A part is sealed, its object's key recorded, and what has been stored meanwhile.",
        "It is sealed again, to the same bytes.",
    ),
    "part stored": Durable("The bucket takes a part.", "A part that was not recorded is sent again."),
    "part recorded": Durable("The last parts are recorded as stored, with where sealing goes on.", "It goes on there."),
    "sealing ended": Durable("Manifest and side file are recorded.", "They are made again."),
    "instance started": Durable(
        "The instance is started, if its owner wants it to run.", "It is started unless it runs."
    ),
    "side file stored": Durable("The bucket takes the side file.", "It is sent again."),
    "earlier bundle noted": Durable(
        "The manifest that is about to be replaced, and the names of its bundle's parts, are recorded.",
        "The first that was recorded stays.",
    ),
    "manifest stored": Durable("The bucket takes the manifest.", "It is sent again."),
    "overlay merged": Durable("The overlay is merged into the root volume, and removed.", "It is merged again."),
    "earlier bundle removed": Durable(
        "The parts and the side file of a bundle that was replaced are deleted.", "They are deleted again."
    ),
    "record closed": Durable("The task is recorded as complete or failed.", "It is closed again, if it was not."),
    "objects removed": Durable("The objects of a task that has failed are deleted.", "They are deleted again."),
    "removal recorded": Durable("They are recorded as deleted.", "They are deleted again."),
    "task purged": Durable("Tasks that ended long ago are forgotten.", "They are forgotten later."),
}

_SETTING = re.compile(r"(?P<step>[a-z ]+), (?P<when>before|after)(?:, (?P<time>[1-9][0-9]*))?")


class _Crash:
    """The moment at which this process is to end."""

    def __init__(self) -> None:
        self.moment = ""
        self._times = count(1)
        self._last = 0

    def plan(self, moment: str, time: int) -> None:
        self._last = time
        self._times = count(1)
        self.moment = moment

    def come_to(self, moment: str) -> None:
        if moment == self.moment and next(self._times) == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


_crash = _Crash()


def crash_at(setting: str) -> None:
    """Have this process end by SIGKILL at a moment: `STEP, before` or `STEP, after`, perhaps with `, N`: the Nth time.

    Raises:
        ValueError: There is no such moment.
    """
    said = _SETTING.fullmatch(setting)
    if said is None or said["step"] not in FAILPOINTS:
        raise ValueError(
            f"{setting!r} is not `STEP, before` or `STEP, after`, STEP being one of: {', '.join(FAILPOINTS)}"
        )
    _crash.plan(f"{said['step']}, {said['when']}", int(said["time"] or 1))


def failpoint(step: Step) -> AbstractContextManager[None]:
    """The block does this step of a task, which outlives the process."""
    return _bracketed(step) if _crash.moment else nullcontext()


@contextmanager
def _bracketed(step: Step) -> Iterator[None]:
    _crash.come_to(f"{step}, before")
    yield
    _crash.come_to(f"{step}, after")
