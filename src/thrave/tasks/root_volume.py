"""What is looked at before anything is stopped for a root volume, and again before it is read.

That is its image's own words, and whether another machine has the same file. No data of a guest is read here.
"""

from collections.abc import Sequence
from pathlib import Path

from thrave.compute.base import HypervisorDriver
from thrave.compute.instance import VolumeFile
from thrave.volumes.errors import VolumeError, VolumeSharedError
from thrave.volumes.formats import Examined, examine
from thrave.volumes.image_chain import Warned


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
    users = users_of(instances, instance_id, examined, directories)
    if users:
        raise VolumeSharedError(volume.path, users)
    return examined.warnings


def users_of(
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

    return instances.users_of(is_same, besides=instance_id)


def _topmost(volume: VolumeFile) -> Examined:
    """Of an image that cannot be understood, the file itself."""
    try:
        return examine(volume.path, "raw")
    except VolumeError:
        return Examined(frozenset(), frozenset(), ())
