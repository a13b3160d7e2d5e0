"""Checks a root volume when a client requests a bundle of it, before anything is stopped for the task."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from thrave.compute.base import HypervisorDriver
from thrave.compute.description_files import find_file_fault
from thrave.compute.errors import InstanceError
from thrave.compute.instance import Instance
from thrave.concurrency import Call, CallTimeoutError
from thrave.tasks.root_volume import check_root_volume
from thrave.volumes import image_chain, qemu_nbd
from thrave.volumes.errors import ToolNotInstalled, VolumeError
from thrave.volumes.formats import FORMATS, QEMU_FORMATS

CHECK_TIMEOUT = 5.0  # seconds: a client waits for the response

log = structlog.get_logger()


class _Problem(NamedTuple):
    """Why a root volume cannot be bundled."""

    internal: str
    """For the log."""
    public: str
    """For the owner of the instance; names no file of the host."""


class RootVolumeCheck:
    """Checks root volumes of this machine. Thread-safe.

    No result is kept: a volume may be repaired, or another machine may start to use it, between two requests. A disk
    may not respond at all. The request then fails after `CHECK_TIMEOUT` seconds, and later requests for the same
    instance fail at once until the disk responds.

    Args:
        instances: All instances of this machine; another one may use the same file.
        directories: Folders that may hold files to which an image refers, in addition to its own folder.
    """

    def __init__(self, instances: HypervisorDriver, directories: Sequence[Path]) -> None:
        self._instances = instances
        self._directories = directories
        self._hanging: dict[str, Call[_Problem | InstanceError | None]] = {}

    def find_problem(self, instance: Instance) -> str | None:
        """Return why the root volume of an instance cannot be bundled, for its owner; None if no reason is known.

        Raises:
            InstanceError: The hypervisor does not report which other instances use the file.
        """
        found: _Problem | InstanceError | None
        found = _Problem("the root volume does not respond", "its root volume does not respond")
        earlier = self._hanging.get(instance.instance_id)
        if earlier is None or not earlier.is_running:
            # A thread of its own: a system call that waits for a disk cannot be interrupted, only abandoned.
            check = Call("root volume", lambda: self._check(instance))
            try:
                found = check.result(CHECK_TIMEOUT)
            except CallTimeoutError:
                self._hanging[instance.instance_id] = check
        if isinstance(found, InstanceError):
            raise found
        if found is None:
            return None
        log.warning("instance cannot be bundled", instance_id=instance.instance_id, error=found.internal)
        return found.public

    def _check(self, instance: Instance) -> _Problem | InstanceError | None:
        try:
            fault = find_volume_fault(instance)
            if fault is not None:
                return _Problem(fault, "its root volume cannot be read")
            check_root_volume(self._instances, instance.instance_id, instance.root_volume, self._directories)
        except VolumeError as error:
            return _Problem(str(error), f"its root volume cannot be bundled: {error.public}")
        except InstanceError as error:
            return error
        except Exception:  # the thread would end without a result
            log.exception("root volume check failed", instance_id=instance.instance_id)
            return _Problem("the check failed", "its root volume cannot be read")
        return None


def find_volume_fault(instance: Instance) -> str | None:
    """Return why an instance's root volume cannot be read, image metadata aside; None if no reason is known."""
    volume = instance.root_volume
    if volume.format in QEMU_FORMATS:
        try:
            require_qemu()
        except ToolNotInstalled as error:
            return str(error)
    if volume.format not in FORMATS:
        return f"{volume.path}: unknown format {volume.format}"
    secret_fault = find_file_fault(volume.secret_file) if volume.secret_file else None
    return find_file_fault(volume.path) or secret_fault


def require_qemu() -> None:
    """Raise ToolNotInstalled if QEMU's image formats cannot be read."""
    for name in ("qemu-nbd", "qemu-img"):
        image_chain.find_program(name)
    qemu_nbd.load_binding()
