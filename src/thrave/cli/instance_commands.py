"""What `thrave instance add` and `adopt` report about a root volume's image file. Nothing is stopped or written.

`thrave instance adopt` and `disown`: which of libvirt's domains are instances, and whose.

What is said here is written into the domain's own metadata, where it stays with the domain. Nothing else of it is
changed, and it is neither stopped nor started.

`thrave instance`: the machines of this host that can be bundled, whatever says which they are.

`add` and `remove` are for those that files describe: one JSON file each in the data directory, which may also be edited
by hand. Those of libvirt are adopted (`domains.py`). No command here touches a volume.
"""

from __future__ import annotations

import shlex
import string
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from thrave.cli.options import open_accounts, require_data_directory, settings_option, tags_option
from thrave.cli.output import find_account, output_option, print_result, show, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thrave.compute.base import HypervisorDriver
    from thrave.compute.directory_driver import DirectoryDriver
    from thrave.compute.instance import Instance, VolumeFile
    from thrave.compute.libvirt.driver import LibvirtDriver
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
    _check_apparent_format(volume)
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


def _check_apparent_format(volume: VolumeFile) -> None:
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


@click.command()
@click.argument("domain", metavar="DOMAIN")
@click.option("--account", "account_id", required=True, metavar="ID", help="The owner's account id or name.")
@click.option(
    "--platform", type=click.Choice(["windows"]), help="For a domain whose libosinfo metadata does not say it."
)
@click.option("--root-device", metavar="TARGET", help="The disk that is bundled, as vda.  [default: the one it boots]")
@click.option(
    "--root-device-type",
    type=click.Choice(["instance-store", "ebs"]),
    help="ebs: that disk is on network storage.  [default: by its source]",
)
@click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Holds the passphrase of that disk, if it is encrypted.",
)
@tags_option
@settings_option
@output_option
def adopt(
    settings: Settings,
    *,
    domain: str,
    account_id: str,
    platform: Literal["windows"] | None,
    root_device: str | None,
    root_device_type: Literal["instance-store", "ebs"] | None,
    secret_file: Path | None,
    tags: dict[str, str],
    output: str,
) -> None:
    """Make the libvirt domain with the name or UUID DOMAIN an instance of an account's, so that it can be bundled.

    Its id comes from its UUID and stays the same. Adopting it again changes what is said of it. The service sees it at
    once; the domain may be running.

    \b
    Example:
      thrave instance adopt win-web --account 123456789012 --tag Name=web --config /etc/thrave/thrave.toml
    """
    instances = _adopted(settings)
    with open_accounts(settings) as accounts:
        account_id = find_account(accounts, account_id).account_id
    adopted = instances.adopt(
        domain,
        account_id=account_id,
        platform=platform,
        root_device=root_device,
        root_device_type=root_device_type,
        secret_file=secret_file and secret_file.absolute(),
        tags=tags,
    )
    show(adopted, output, warnings_of_image(settings, instances, adopted))


@click.command()
@click.argument("instance_id", metavar="INSTANCE")
@settings_option
@output_option
def disown(settings: Settings, instance_id: str, output: str) -> None:
    """Let the domain of the id INSTANCE be no instance any more. The domain and its disks are left as they are.

    \b
    Example:
      thrave instance disown i-0123456789abcdef0
    """
    _adopted(settings).disown(instance_id)
    print_result(output, {"instanceId": instance_id}, f"disowned {instance_id}")


def _adopted(settings: Settings) -> LibvirtDriver:
    """The domains that are instances. Raises click's UsageError where the service does not look at those."""
    from thrave.drivers import open_adopted

    if settings.hypervisor != "libvirt":
        raise click.UsageError(
            'files describe the instances here: set `hypervisor = "libvirt"` first, or use `thrave instance add`'
        )
    return open_adopted(settings)


_FILE = click.Path(dir_okay=False, path_type=Path)


class _ArgumentVector(click.ParamType[tuple[str, ...]]):
    """A command as one would type it; taken apart at once, so that no shell is ever asked."""

    name = "command"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Give the words. Fails the command line if there are none, or a quote is not closed."""
        try:
            words = shlex.split(str(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)
        return tuple(words) or self.fail("is empty", param, ctx)


_COMMAND = _ArgumentVector()


@click.group()
def instance() -> None:
    """Instances: the machines that can be bundled.

    \b
    Example:
      thrave instance add --account 123456789012 --platform windows --root-volume /vm/win.raw
      thrave instance adopt win-web --account 123456789012
    """


instance.add_command(adopt)


instance.add_command(disown)


@instance.command()
@click.option("--account", "account_id", required=True, metavar="ID", help="The owner's account id or name.")
@click.option("--platform", type=click.Choice(["windows", "linux"]), required=True, help="EC2 bundles Windows only.")
@click.option("--root-volume", type=_FILE, required=True, metavar="FILE", help="The disk that is bundled.")
@click.option("--format", "image_format", default="raw", show_default=True, help="Of the root volume: raw, qcow2, …")
@click.option("--secret-file", type=_FILE, metavar="FILE", help="Holds the passphrase of an encrypted root volume.")
@click.option("--volume", "others", type=_FILE, multiple=True, metavar="FILE", help="Another disk; never bundled.")
@click.option("--id", "instance_id", metavar="i-…", help="Its id; a new one is made if none is given.")
@click.option(
    "--host",
    metavar="NAME",
    help="The host of a fleet that has it.  [default: the setting host_id, else the host of the data directory]",
)
@click.option(
    "--root-device-type",
    type=click.Choice(["instance-store", "ebs"]),
    default="instance-store",
    show_default=True,
    help="ebs: the root volume is on network storage.",
)
@click.option("--state", type=click.Choice(["running", "stopped"]), default="running", show_default=True)
@click.option("--stop-command", type=_COMMAND, help="Asks the guest to power off.")
@click.option("--force-stop-command", type=_COMMAND, help="Cuts its power, for a guest that does not hear.")
@click.option("--start-command", type=_COMMAND, help="Starts the machine.")
@click.option("--state-command", type=_COMMAND, help="Prints its state, in EC2's words or virsh's.")
@tags_option
@settings_option
@output_option
def add(
    settings: Settings,
    *,
    account_id: str,
    platform: str,
    root_volume: Path,
    image_format: str,
    secret_file: Path | None,
    others: tuple[Path, ...],
    instance_id: str | None,
    host: str | None,
    root_device_type: Literal["instance-store", "ebs"],
    state: str,
    stop_command: tuple[str, ...] | None,
    force_stop_command: tuple[str, ...] | None,
    start_command: tuple[str, ...] | None,
    state_command: tuple[str, ...] | None,
    tags: dict[str, str],
    output: str,
) -> None:
    """Describe a machine, so that it can be bundled.

    Commands are argument vectors; no shell sees them. Give a --state-command wherever the machine may be stopped or
    started by others, or takes its time to power off: what it prints (EC2's words, or those of `virsh domstate`) is
    then the state. Without one, a --stop-command that has succeeded means that the machine is off. Each command finds
    the instance's id in THRAVE_INSTANCE_ID.

    \b
    Example:
      thrave instance add --account 123456789012 --platform windows \\
        --root-volume /var/lib/libvirt/images/win.qcow2 --format qcow2 \\
        --stop-command "virsh shutdown win" --start-command "virsh start win" \\
        --state-command "virsh domstate win"
    """
    from thrave.compute.description_files import InstanceDescription, check_volumes
    from thrave.compute.directory_driver import new_instance_id
    from thrave.compute.instance import InstanceState, VolumeFile

    described = _described(settings)
    _check_known_format(image_format)
    host = host or _host_of_new(settings)
    with open_accounts(settings) as accounts:
        account_id = find_account(accounts, account_id).account_id
    new = InstanceDescription(
        instance_id=instance_id or new_instance_id(),
        account_id=account_id,
        platform="windows" if platform == "windows" else None,
        root_device_type=root_device_type,
        root_volume=VolumeFile(
            path=root_volume.absolute(),
            format=image_format,
            secret_file=secret_file and secret_file.absolute(),
        ),
        volumes=_other_volumes(others),
        state=InstanceState(state),
        stop_command=stop_command,
        force_stop_command=force_stop_command,
        start_command=start_command,
        state_command=state_command,
        tags=tags,
        host=host,
    )
    check_volumes(new)
    warnings = check_image(settings, described, new)
    described.add(new)
    show(new, output, warnings)


@instance.command("list")
@settings_option
@output_option
def list_(settings: Settings, output: str) -> None:
    """List the instances of all accounts; those that cannot be read are named on stderr.

    \b
    Example:
      thrave instance list --output json
    """
    from thrave.compute.description_files import document
    from thrave.drivers import open_driver

    require_data_directory(settings)
    listed = open_driver(settings).list()
    rows: list[tuple[str, ...]] = [
        (found.instance_id, found.account_id, found.state, found.platform or "", found.root_device_type,
         str(found.root_volume.path))
        for found in listed
    ]  # fmt: skip
    header = ("INSTANCE", "ACCOUNT", "STATE", "PLATFORM", "ROOT DEVICE", "ROOT VOLUME")
    print_result(output, {"instances": [document(found) for found in listed]}, table(header, rows))


@instance.command("show")
@click.argument("instance_id", metavar="INSTANCE")
@settings_option
@output_option
def show_(settings: Settings, instance_id: str, output: str) -> None:
    """Show the instance with the id INSTANCE.

    \b
    Example:
      thrave instance show i-0123456789abcdef0
    """
    from thrave.compute.description_files import document
    from thrave.drivers import open_driver

    require_data_directory(settings)
    found = open_driver(settings).get(instance_id)
    facts: list[tuple[str, ...]] = [
        ("account", found.account_id),
        *([("host", found.host)] if found.host else []),
        ("state", found.state),
        ("platform", found.platform or "linux"),
        ("root device", found.root_device_type),
        ("root volume", f"{found.root_volume.path} ({found.root_volume.format})"),
        *(("volume", f"{volume.path} ({volume.device_name})") for volume in found.volumes),
        *(("tag", f"{name} = {value}") for name, value in found.tags.items()),
    ]
    print_result(output, document(found), table(("INSTANCE", found.instance_id), facts))


@instance.command()
@click.argument("instance_id", metavar="INSTANCE")
@settings_option
@output_option
def remove(settings: Settings, instance_id: str, output: str) -> None:
    """Forget the instance with the id INSTANCE. Its machine and volumes are left as they are.

    \b
    Example:
      thrave instance remove i-0123456789abcdef0
    """
    _described(settings).remove(instance_id)
    print_result(output, {"instanceId": instance_id}, f"removed {instance_id}")


@instance.command()
@click.argument("instance_id", metavar="INSTANCE")
@settings_option
@output_option
def start(settings: Settings, instance_id: str, output: str) -> None:
    """Start the instance with the id INSTANCE. Refused while its root volume is being bundled.

    \b
    Example:
      thrave instance start i-0123456789abcdef0
    """
    from thrave.drivers import open_driver

    require_data_directory(settings)
    instances = open_driver(settings)
    instances.start(instance_id)
    show(instances.get(instance_id), output)


@instance.command()
@click.argument("instance_id", metavar="INSTANCE")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that the guest has to power off.")
@settings_option
@output_option
def stop(settings: Settings, instance_id: str, timeout: float, output: str) -> None:
    """Ask the instance with the id INSTANCE to power off, and wait until it has. Never cuts the power.

    \b
    Example:
      thrave instance stop i-0123456789abcdef0
    """
    from thrave.compute.power import power_off
    from thrave.drivers import open_driver

    require_data_directory(settings)
    instances = open_driver(settings)
    if power_off(instances, instance_id, grace=timeout) != "stopped":
        raise click.ClickException(f"{instance_id} did not power off within {timeout:.0f} seconds")
    show(instances.get(instance_id), output)


def _described(settings: Settings) -> DirectoryDriver:
    """The instances that files describe. Raises click's UsageError where the service does not look at those."""
    from thrave.drivers import open_described

    require_data_directory(settings)
    if settings.hypervisor != "directory":
        raise click.UsageError(
            f"instances are {settings.hypervisor}'s here (the setting `hypervisor`) and no file describes them: "
            "`thrave instance adopt` and `disown`"
        )
    return open_described(settings)


def _host_of_new(settings: Settings) -> str | None:
    """The host of a fleet that a new instance belongs to; None on one machine.

    Raises click's UsageError if hosts may share the folder, and none is known: then any of them might get the instance.
    """
    if settings.database_url is None:
        return None
    name = settings.known_host_id
    if name is None and settings.instance_dir is not None:
        raise click.UsageError("hosts may share the folder of instances: name the host that has this one with --host")
    return name


def _check_known_format(image_format: str) -> None:
    from thrave.volumes.formats import FORMATS

    if image_format not in FORMATS:
        raise click.BadParameter(f"{image_format!r} is none of {', '.join(FORMATS)}", param_hint="--format")


def _other_volumes(paths: Sequence[Path]) -> tuple[VolumeFile, ...]:
    """Disks as xvdb, xvdc, …: the names that EC2 gives Windows."""
    from thrave.compute.instance import VolumeFile

    letters = string.ascii_lowercase[1:]
    if len(paths) > len(letters):
        raise click.BadParameter(f"at most {len(letters)} can be given", param_hint="--volume")
    return tuple(
        VolumeFile(path=path.absolute(), device_name=f"xvd{letter}")
        for path, letter in zip(paths, letters, strict=False)
    )
