"""A root volume, opened and looked at in calls that can be abandoned.

No system call that waits for a disk can be interrupted. So nothing of a volume is read in the thread of a task's step.
When the task is cancelled or nothing moves, a call that hangs is abandoned, and what would keep the machine from being
started is taken out of its way: the locks on the image, the programs that have it open (`volumes/base.py`).
Whoever is last closes the volume. The bytes that are sealed are read by the threads of `pipeline.py`.

What is looked at before anything is stopped for a root volume, and again before it is read.

That is its image's own words, and whether another machine has the same file. No data of a guest is read here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import structlog

from thrave.compute.base import HypervisorDriver
from thrave.compute.instance import VolumeFile
from thrave.concurrency import Call, CallTimeoutError, NoThreadError
from thrave.tasks.monitor import TaskMonitor
from thrave.volumes.base import Extent, Interruption, Volume
from thrave.volumes.errors import VolumeError, VolumeSharedError
from thrave.volumes.formats import Examined, examine
from thrave.volumes.image_chain import Warn, Warned

CLOSE_TIMEOUT = 10.0  # seconds to close a volume after a failure


log = structlog.get_logger()


_Result = TypeVar("_Result")


class Opening(Protocol):
    """Opens a volume: `volumes.opening.open_volume` with its first arguments."""

    def __call__(
        self, *, warn: Warn, moved: Callable[[], None], interruption: Interruption
    ) -> AbstractContextManager[Volume]:
        """Give the volume for the length of a block."""


class VolumeReader:
    """An open volume, as a context manager.

    Args:
        opening: Opens it.
        watch: Says when to stop.

    Attributes:
        warnings: What the image says of itself.
    """

    def __init__(self, opening: Opening, watch: TaskMonitor) -> None:
        self.warnings: list[Warned] = []
        self._watch = watch
        self._interruption = Interruption()
        self._opened = opening(warn=self.warnings.append, moved=watch.report_activity, interruption=self._interruption)
        self._abandoned = False
        self._volume: _KnownVolume | None = None

    @property
    def volume(self) -> Volume:
        """The volume. Its extents are known, so that only `read_into` waits for the disk."""
        assert self._volume is not None, "it is open"
        return self._volume

    def run(self, look: Callable[[Volume], _Result]) -> _Result:
        """Look at the volume. Raises what that raises, or why the work of the watch is to stop."""
        return self._result_of(lambda: look(self.volume))

    def __enter__(self) -> Self:
        """Open it. Raises what opening it raises, or why the work of the watch is to stop."""
        volume = self._result_of(self._opened.__enter__)
        try:
            self._volume = _KnownVolume(volume, self._result_of(volume.extents))
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it. Raises VolumeChangedError if nothing has failed, and it was changed meanwhile."""
        if self._abandoned:
            return
        if error is None:
            self._result_of(lambda: self._opened.__exit__(None, None, None))
            return

        def close() -> None:
            self._interruption.request()
            self._opened.__exit__(kind, error, trace)

        try:
            Call("close volume", close).result(CLOSE_TIMEOUT)
        except CallTimeoutError:
            log.warning("the root volume could not be closed in time", timeout=CLOSE_TIMEOUT)
        except NoThreadError:
            close()

    def _result_of(self, work: Callable[[], _Result]) -> _Result:
        call = Call("volume", work)
        try:
            return self._watch.wait_for(call)
        except BaseException as error:
            if call.is_running:
                self._abandon(call, error)
            raise

    def _abandon(self, call: Call[_Result], error: BaseException) -> None:
        """Have nothing of the volume in the machine's way; close it when the call has returned."""
        self._abandoned = True
        log.warning("a root volume that does not answer was abandoned", reason=str(error))
        try:
            Call("interrupt volume", self._interruption.request).wait(CLOSE_TIMEOUT)
        except NoThreadError:
            self._interruption.request()
        call.when_ended(lambda: self._opened.__exit__(type(error), error, error.__traceback__))


class _KnownVolume:
    """A volume whose extents were read."""

    def __init__(self, volume: Volume, extents: Sequence[Extent]) -> None:
        self._volume = volume
        self._extents = extents
        self.size = volume.size
        self.will_read = volume.will_read
        self.read_into = volume.read_into
        self.close = volume.close

    def extents(self) -> Sequence[Extent]:
        return self._extents


def check_root_volume(
    instances: HypervisorDriver, instance_id: str, volume: VolumeFile, directories: Sequence[Path]
) -> Sequence[Warned]:
    """Look at a root volume whose machine may still run.

    Args:
        instances: All of the host.
        instance_id: Whose root volume it is; that machine itself is no other.
        volume: The volume.
        directories: Where files may lie that its image refers to, besides the image's own folder.

    Returns:
        What the image says of itself that its owner should know.

    Raises:
        VolumeSharedError: Another machine, which is not off, has a file of it.
        VolumeError: It cannot be read as a disk.
    """
    examined = examine(volume.path, volume.format, directories=directories)
    users = find_users(instances, instance_id, examined, directories)
    if users:
        raise VolumeSharedError(volume.path, users)
    return examined.warnings


def find_users(
    instances: HypervisorDriver, instance_id: str, examined: Examined, directories: Sequence[Path]
) -> Sequence[str]:
    """Which other machines, not off, have a file of a volume, in the operator's words.

    A file that both only read, as a template below the overlays of several machines, is nobody's alone and does not
    count: one of them has to write to it.
    """

    def is_same(other: VolumeFile) -> bool:
        try:
            theirs = examine(other.path, other.format, directories=directories)
        except VolumeError:
            theirs = _topmost(other)
        return bool(examined.files & theirs.written or examined.written & theirs.files)

    return instances.find_users(is_same, except_instance=instance_id)


def _topmost(volume: VolumeFile) -> Examined:
    """Of an image that cannot be understood, the file itself."""
    try:
        return examine(volume.path, "raw")
    except VolumeError:
        return Examined(frozenset(), frozenset(), ())
