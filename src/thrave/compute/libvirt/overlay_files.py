"""The image files of overlays: created and merged with qemu-img while no QEMU has them open.

QEMU's image locks ensure that: qemu-img opens no image for writing that a guest or another qemu-img has open. Every
format is given to qemu-img, none is probed. Nothing here has information about domains.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from thrave import files, programs
from thrave.compute.errors import HypervisorError, ImageInUseError, LibraryNotInstalled
from thrave.compute.libvirt.domain_xml import DiskImage
from thrave.compute.progress_timeout import Pause, report_progress

_PACKAGE = "qemu-utils"
_DEFINITIONS = Path("/etc/libvirt/qemu")
_TIMEOUT = 7 * 86400.0  # seconds; merging a large overlay takes hours; the caller may end it at any time
_POLL_INTERVAL = 0.2  # seconds
_MAX_OUTPUT = 256 << 20  # bytes; for `qemu-img map` of an image with very many extents


def create(instance_id: str, overlay: Path, volume: DiskImage) -> None:
    """Create an empty overlay over a volume, replacing an existing file, and write it to the disk.

    The overlay gets the owner and mode of the volume, as far as this process has the permission.

    Raises:
        HypervisorError: The overlay cannot be created; with qemu-img's message.
    """
    _run(
        instance_id,
        ["create", "-q", "-f", "qcow2", "-b", str(volume.path), "-F", volume.format, str(overlay)],
        lambda _seconds: None,
    )
    with _os_errors_translated(instance_id, overlay):
        _copy_owner_and_mode(volume.path, overlay)
        with overlay.open("rb") as file:
            os.fsync(file.fileno())
        files.sync_folder(overlay.parent)


def commit(instance_id: str, overlay: Path, pause: Pause) -> None:
    """Write the content of an overlay into its volume. The overlay does not change, so this may be repeated.

    Raises:
        ImageInUseError: Another program has one of the images open.
        HypervisorError: The merge fails; with qemu-img's message.
    """
    _run(instance_id, ["commit", "-q", "-d", "-f", "qcow2", str(overlay)], pause)


def is_empty(instance_id: str, overlay: Path) -> bool:
    """Return whether an overlay contains no data. Raises as `commit`."""
    extents = _run(instance_id, ["map", "--output=json", "-f", "qcow2", str(overlay)], lambda _seconds: None)
    return not any(extent["depth"] == 0 and extent["present"] for extent in json.loads(extents))


def sync_definitions() -> None:
    """Write the folder of libvirt's definitions to the disk, if this process may.

    libvirt writes a new definition and renames it over the old one. Without this, a power failure may undo the rename.
    """
    with suppress(OSError):  # another libvirt than the system's, or no permission
        files.sync_folder(_DEFINITIONS)


def with_suffix(path: Path, suffix: str) -> Path:
    """Return the path with another suffix added to the name."""
    return path.with_name(f"{path.name}.{suffix}")


def exists(instance_id: str, path: Path) -> bool:
    """Return whether a file exists. Raises HypervisorError if that cannot be read."""
    with _os_errors_translated(instance_id, path):
        return path.exists()


def move(instance_id: str, path: Path, new_path: Path) -> None:
    """Rename a file within its folder, and write the folder to the disk. Raises HypervisorError."""
    with _os_errors_translated(instance_id, path):
        path.rename(new_path)
        files.sync_folder(new_path.parent)


def remove(instance_id: str, path: Path) -> None:
    """Remove a file if it exists. Raises HypervisorError."""
    with _os_errors_translated(instance_id, path), suppress(FileNotFoundError):
        path.unlink()
        files.sync_folder(path.parent)


@contextmanager
def _os_errors_translated(instance_id: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HypervisorError(instance_id, f"{path}: {os.strerror(error.errno or 0)}") from error


def _copy_owner_and_mode(volume: Path, overlay: Path) -> None:
    status = volume.stat()
    with suppress(PermissionError):  # libvirt changes the owner itself if it is configured to (dynamic_ownership)
        os.chown(overlay, status.st_uid, status.st_gid)
    overlay.chmod(stat.S_IMODE(status.st_mode))


def _run(instance_id: str, arguments: Sequence[str], pause: Pause) -> str:
    program = shutil.which("qemu-img")
    if program is None:
        raise LibraryNotInstalled("qemu-img", _PACKAGE)
    try:
        done = _run_to_end([program, *arguments], pause)
    except programs.ProgramError as error:
        raise HypervisorError(instance_id, str(error)) from error
    if done.status:
        raise _failure(instance_id, done.error_text)
    return done.text


def _run_to_end(argv: Sequence[str], pause: Pause) -> programs.FinishedProgram:
    running = programs.Program(argv, timeout=_TIMEOUT, max_output=_MAX_OUTPUT, max_memory=programs.MAX_MEMORY)
    counter = None
    try:
        while (finished := running.poll(_POLL_INTERVAL)) is None:
            before, counter = counter, running.io_counter
            if counter is None or counter != before:  # without a counter, only _TIMEOUT ends a program that hangs
                report_progress(pause)
            pause(0.0)
        return finished
    finally:
        running.kill()


def _failure(instance_id: str, err: str) -> HypervisorError:
    lines = err.strip().splitlines() or ["qemu-img failed without a message"]
    kind = ImageInUseError if '" lock' in err else HypervisorError
    return kind(instance_id, lines[0].removeprefix("qemu-img: ")[:300])
