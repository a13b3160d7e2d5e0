"""Failpoints: named places at which a test can kill the process. `make docs` generates a page from the table.

Each write of a task to the database, the bucket or the hypervisor is in a block `with failpoint("part-stored"):`. With
the setting `failpoint = "part-stored, after"` the process kills itself (SIGKILL) at the end of that block; with
`"part-stored, after, 3"` at the end of its third execution. Without the setting a block has no effect.
"""

import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Literal, NamedTuple

FailpointName = Literal[
    "task-recorded", "cancellation-recorded", "power-state-recorded", "sysprep-requested", "shutdown-requested",
    "power-cut", "shutdown-recorded", "overlay-recorded", "overlay-created", "volume-size-recorded",
    "bundle-key-recorded", "part-claimed", "part-stored", "part-recorded", "documents-recorded", "instance-started",
    "side-file-stored", "earlier-bundle-recorded", "manifest-stored", "overlay-merged", "earlier-bundle-deleted",
    "task-ended", "objects-deleted", "deletion-recorded", "task-deleted",
]  # fmt: skip


class Failpoint(NamedTuple):
    """A row of the table."""

    action: str
    """What the block does."""
    after_crash: str
    """What happens if the process was killed in the block."""


FAILPOINTS: Mapping[FailpointName, Failpoint] = {
    "task-recorded": Failpoint(
        "The API records the task and enqueues it for its host, in one transaction.",
        "Both are recorded, or neither. A caller without a response can call DescribeBundleTasks.",
    ),
    "cancellation-recorded": Failpoint(
        "The API records CancelBundleTask.",
        "The cancellation is recorded, or not. A caller without a response can call DescribeBundleTasks.",
    ),
    "power-state-recorded": Failpoint(
        "The task records the power state that the instance must have after the task. The instance is still unchanged.",
        "The state is recorded once. A later request of the owner replaces it.",
    ),
    "sysprep-requested": Failpoint(
        "The guest gets the sysprep command, which powers it off.",
        "The request is repeated, unless the instance is off.",
    ),
    "shutdown-requested": Failpoint(
        "The guest gets a shutdown request.", "The request is repeated, unless the instance is off."
    ),
    "power-cut": Failpoint(
        "The task cuts the power of a guest that does not shut down, if `shutdown_timeout_action` is `power-off`.",
        "The power is cut, unless the instance is off.",
    ),
    "shutdown-recorded": Failpoint(
        "The task records that the instance is off; earlier shutdown requests need no power recovery any more.",
        "The power state is read again.",
    ),
    "overlay-recorded": Failpoint("The task records the overlay that it will create.", "The overlay is recorded once."),
    "overlay-created": Failpoint(
        "The root volume gets a copy-on-write overlay.", "The overlay is created, unless it exists."
    ),
    "volume-size-recorded": Failpoint(
        "The root volume is open, and the task records its size.", "The volume is opened again."
    ),
    "bundle-key-recorded": Failpoint(
        "The task records a new bundle key, encrypted by the vault.",
        "Sealing resumes with a recorded key; without one, another key is generated.",
    ),
    "part-claimed": Failpoint(
        "A part is sealed. The task claims its key in the bucket, and records the parts stored since the last record.",
        "The part is sealed again, to the same bytes.",
    ),
    "part-stored": Failpoint("The bucket stores a part.", "A part that is not recorded as stored is uploaded again."),
    "part-recorded": Failpoint(
        "The task records the last parts as stored, with the checkpoint from which sealing can resume.",
        "Sealing resumes at the last recorded checkpoint.",
    ),
    "documents-recorded": Failpoint(
        "The task records manifest and side file.", "Unless they are recorded, both are written again."
    ),
    "instance-started": Failpoint(
        "The instance is started, if its owner wants it to run.", "The instance is started, unless it runs."
    ),
    "side-file-stored": Failpoint("The bucket stores the side file.", "The side file is uploaded again."),
    "earlier-bundle-recorded": Failpoint(
        "The task records the manifest that it will replace, and the keys of that bundle's parts.",
        "The manifest that was recorded first stays recorded.",
    ),
    "manifest-stored": Failpoint("The bucket stores the manifest.", "The manifest is uploaded again."),
    "overlay-merged": Failpoint("The overlay is merged into the root volume and deleted.", "The merge is repeated."),
    "earlier-bundle-deleted": Failpoint(
        "The parts and the side file of a replaced bundle are deleted.", "They are deleted again."
    ),
    "task-ended": Failpoint(
        "The task is recorded as `complete` or `failed`.", "The end is recorded, unless it is recorded already."
    ),
    "objects-deleted": Failpoint("The objects of a failed task are deleted.", "They are deleted again."),
    "deletion-recorded": Failpoint("The task records that these objects are deleted.", "They are deleted again."),
    "task-deleted": Failpoint(
        "The rows of tasks that ended more than `task_retention_days` ago are deleted.", "They are deleted later."
    ),
}

_SETTING = re.compile(r"(?P<name>[a-z-]+), (?P<when>before|after)(?:, (?P<execution>[1-9][0-9]*))?")


class _Crash:
    """The place at which this process kills itself: `NAME, before` or `NAME, after`; empty: none."""

    def __init__(self) -> None:
        self.place = ""
        self._executions = count(1)
        self._last = 0

    def set(self, place: str, execution: int) -> None:
        self._last = execution
        self._executions = count(1)
        self.place = place

    def reach(self, place: str) -> None:
        if place == self.place and next(self._executions) == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


_crash = _Crash()


def set_failpoint(setting: str) -> None:
    """Make this process kill itself at a failpoint.

    Args:
        setting: `NAME, before` or `NAME, after`; with `, N` at the Nth execution of the block instead of the first.

    Raises:
        ValueError: There is no such failpoint.
    """
    match = _SETTING.fullmatch(setting)
    if match is None or match["name"] not in FAILPOINTS:
        raise ValueError(
            f"Invalid failpoint {setting!r}. Write `NAME, before` or `NAME, after`, optionally with `, N`. Names: "
            f"{', '.join(FAILPOINTS)}."
        )
    _crash.set(f"{match['name']}, {match['when']}", int(match["execution"] or 1))


def failpoint(name: FailpointName) -> AbstractContextManager[None]:
    """Return a context manager for the block that does what the table says for `name`."""
    return _failpoint(name) if _crash.place else nullcontext()


@contextmanager
def _failpoint(name: FailpointName) -> Iterator[None]:
    _crash.reach(f"{name}, before")
    yield
    _crash.reach(f"{name}, after")
