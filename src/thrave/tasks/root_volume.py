"""Checks a task's root volume, and opens it with calls that can be abandoned.

A system call that waits for a disk cannot be interrupted, so the thread of a task's step reads nothing of a volume. If
the task is cancelled or stalls, a call that hangs is abandoned; the locks on the image are released and the programs
that have it open are ended (`volumes/base.py`), so that the machine can start. The bytes that are sealed are read by
the threads of `pipeline.py`. The checks read the image's metadata, no data of the guest.
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
from thrave.volumes.formats import VolumeMetadata, read_metadata
from thrave.volumes.image_chain import ImageWarning, OnWarning

CLOSE_TIMEOUT = 10.0  # seconds to close a volume after a failure


log = structlog.get_logger()


_Result = TypeVar("_Result")


class Opening(Protocol):
    """Opens a volume: `volumes.formats.open_volume` with its first arguments."""

    def __call__(
        self, *, on_warning: OnWarning, on_read: Callable[[], None], interruption: Interruption
    ) -> AbstractContextManager[Volume]:
        """Return a context manager that opens the volume."""


class VolumeReader:
    """An open volume, as a context manager.

    Args:
        opening: Opens it.
        monitor: Raises when the work has to stop.

    Attributes:
        warnings: Warnings about the image.
    """

    def __init__(self, opening: Opening, monitor: TaskMonitor) -> None:
        self.warnings: list[ImageWarning] = []
        self._monitor = monitor
        self._interruption = Interruption()
        self._opened = opening(
            on_warning=self.warnings.append, on_read=monitor.report_activity, interruption=self._interruption
        )
        self._abandoned = False
        self._volume: _KnownVolume | None = None

    @property
    def volume(self) -> Volume:
        """The volume. Its extents are known, so that only `read_into` waits for the disk."""
        assert self._volume is not None, "it is open"
        return self._volume

    def run(self, work: Callable[[Volume], _Result]) -> _Result:
        """Call `work` with the volume. Raises what it raises, or why the task has to stop."""
        return self._result_of(lambda: work(self.volume))

    def __enter__(self) -> Self:
        """Open it. Raises what that raises, or why the task has to stop."""
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
        """Close it. Raises VolumeChangedError if the block succeeded and the volume was changed meanwhile."""
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
            return self._monitor.wait_for_result(call)
        except BaseException as error:
            if call.is_running:
                self._abandon(call, error)
            raise

    def _abandon(self, call: Call[_Result], error: BaseException) -> None:
        """Release what keeps the machine from starting; close the volume when the call has returned."""
        self._abandoned = True
        log.warning("root volume does not respond, abandoned", error=str(error))
        try:
            Call("interrupt volume", self._interruption.request).wait(CLOSE_TIMEOUT)
        except NoThreadError:
            self._interruption.request()
        call.add_done_callback(lambda: self._opened.__exit__(type(error), error, error.__traceback__))


class _KnownVolume:
    """A volume whose extents were read before."""

    def __init__(self, volume: Volume, extents: Sequence[Extent]) -> None:
        self._volume = volume
        self._extents = extents
        self.size = volume.size
        self.prefetch = volume.prefetch
        self.read_into = volume.read_into
        self.close = volume.close

    def extents(self) -> Sequence[Extent]:
        return self._extents


def check_root_volume(
    instances: HypervisorDriver, instance_id: str, volume: VolumeFile, directories: Sequence[Path]
) -> Sequence[ImageWarning]:
    """Check a root volume whose machine may still run.

    Args:
        instances: The driver, which has all instances of the host.
        instance_id: The instance of the root volume.
        volume: The volume.
        directories: Folders for files that the image refers to, in addition to the image's own folder.

    Returns:
        Warnings about the image for its owner.

    Raises:
        VolumeSharedError: Another machine, which is not off, uses a file of the volume.
        VolumeError: The volume cannot be read as a disk.
    """
    metadata = read_metadata(volume.path, volume.format, directories=directories)
    users = find_users(instances, instance_id, metadata, directories)
    if users:
        raise VolumeSharedError(volume.path, users)
    return metadata.warnings


def find_users(
    instances: HypervisorDriver, instance_id: str, metadata: VolumeMetadata, directories: Sequence[Path]
) -> Sequence[str]:
    """Return which other machines that are not off use a file of a volume, as text for the operator.

    A file that both only read does not count, such as a template below the overlays of several machines: one of the two
    must write to it.
    """

    def is_same(other: VolumeFile) -> bool:
        try:
            others = read_metadata(other.path, other.format, directories=directories)
        except VolumeError:
            others = _topmost(other)
        return bool(metadata.files & others.written or metadata.written & others.files)

    return instances.find_users(is_same, except_instance=instance_id)


def _topmost(volume: VolumeFile) -> VolumeMetadata:
    """Return the file itself, for an image that cannot be read."""
    try:
        return read_metadata(volume.path, "raw")
    except VolumeError:
        return VolumeMetadata(frozenset(), frozenset(), ())
