"""What `thrave instance add` and `adopt` report about a root volume's image file. Nothing is stopped or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from thrave.compute.base import HypervisorDriver
    from thrave.compute.instance import Instance, VolumeFile
    from thrave.config import Settings


def check_image(settings: Settings, instances: HypervisorDriver, instance: Instance) -> list[str]:
    """Refuse an image of another format than the stated one; return warnings of everything else that prevents a bundle.

    A file that another instance uses is a warning: that instance may be removed or shut down before the first bundle.
    A task checks again, and refuses it then.

    Raises:
        click.UsageError: The image has another format.
    """
    from thrave.tasks.root_volume import check_root_volume
    from thrave.volumes.errors import VolumeError

    if instance.root_device_type != "instance-store":
        return []
    volume = instance.root_volume
    _check_format(volume)
    try:
        warned = check_root_volume(instances, instance.instance_id, volume, settings.image_dirs)
    except VolumeError as error:
        return [_cannot_be_bundled(str(error))]
    return [warning.text for warning in warned]


def warnings_of_image(settings: Settings, instances: HypervisorDriver, instance: Instance) -> list[str]:
    """Return the same warnings of a machine whose hypervisor states its disk and format: nothing is refused."""
    try:
        return check_image(settings, instances, instance)
    except click.UsageError as error:
        return [_cannot_be_bundled(error.message)]


def _cannot_be_bundled(reason: str) -> str:
    return f"it cannot be bundled as it is: {reason}"


def _check_format(volume: VolumeFile) -> None:
    from thrave.volumes.formats import FORMATS, apparent_format_of

    apparent = apparent_format_of(volume.path)
    if apparent is None and volume.format != "raw":
        raise click.UsageError(f"{volume.path} is no image of the format {volume.format}; a raw disk is --format raw")
    # A machine may encrypt its whole disk with LUKS itself: then the host has a raw disk that begins as LUKS does.
    if apparent in {None, volume.format} or (apparent == "luks" and volume.format == "raw"):
        return
    how = (
        f"give --format {apparent}"
        if apparent in FORMATS
        else "that format is not read: unpack or convert it (qemu-img convert)"
    )
    raise click.UsageError(f"{volume.path} is an image of the format {apparent}, not {volume.format}: {how}")
