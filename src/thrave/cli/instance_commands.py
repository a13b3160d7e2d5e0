"""`thrave instance`: the machines of this host that can be bundled.

`add` and `remove` are for instances described by JSON files in the data directory, which can also be edited by hand.
`adopt` and `disown` are for libvirt domains: they change only the domain's metadata, and the domain keeps its state. No
command writes to a volume.
"""

from __future__ import annotations

import shlex
import string
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from thrave.cli.identifiers import find_account, find_instance_id
from thrave.cli.options import (
    ExistingPath,
    confirm_deletion,
    open_accounts,
    require_data_directory,
    settings_option,
    tags_option,
    yes_option,
)
from thrave.cli.output import output_option, print_instance, print_result, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from thrave.compute.base import HypervisorDriver
    from thrave.compute.directory_driver import DirectoryDriver
    from thrave.compute.instance import Instance, VolumeFile
    from thrave.compute.libvirt.driver import LibvirtDriver
    from thrave.config import Settings

_FILE = ExistingPath(dir_okay=False, readable=False, path_type=Path)  # the service reads it, perhaps as another user
_EXISTING_FILE = ExistingPath(dir_okay=False, path_type=Path)


class _ArgumentVector(click.ParamType[tuple[str, ...]]):
    """A command line, split into arguments here, so that no shell runs it."""

    name = "command"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the arguments. Fails if there are none, or if a quote is not closed."""
        try:
            arguments = shlex.split(str(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)
        return tuple(arguments) or self.fail("is empty", param, ctx)


_COMMAND = _ArgumentVector()
_Command = TypeVar("_Command", bound="Callable[..., None]")
_account_option = click.option(
    "--account", "account_id", required=True, metavar="ID", help="Account id or name of the owner."
)


def _of_instance(command: Callable[..., None]) -> Callable[..., None]:
    """Add the parameters of each command about one instance: INSTANCE, the settings and `--output`."""
    return click.argument("word", metavar="INSTANCE")(settings_option(output_option(command)))


def _root_device_type_option(default: str | None, description: str) -> Callable[[_Command], _Command]:
    return click.option(
        "--root-device-type",
        type=click.Choice(["instance-store", "ebs"]),
        default=default,
        show_default=default is not None,
        help=description,
    )


@click.group()
def instance() -> None:
    """Manage instances: the machines that can be bundled.

    INSTANCE is the id of an instance, its tag `Name`, or the start of its id.

    \b
    Example:
      thrave instance add --account 123456789012 --platform windows --root-volume /vm/win.raw
      thrave instance adopt win-web --account 123456789012
    """


@instance.command()
@_account_option
@click.option("--platform", type=click.Choice(["windows", "linux"]), required=True, help="EC2 bundles Windows only.")
@click.option(
    "--root-volume", type=_FILE, required=True, metavar="FILE", help="Image file or device of the disk that is bundled."
)
@click.option(
    "--format", "image_format", default="raw", show_default=True, help="Format of the root volume: raw, qcow2, …"
)
@click.option("--secret-file", type=_FILE, metavar="FILE", help="File with the passphrase of an encrypted root volume.")
@click.option(
    "--volume",
    "others",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Another disk, which is never bundled. Repeatable.",
)
@click.option("--id", "instance_id", metavar="i-…", help="Instance id.  [default: a new one]")
@click.option(
    "--host-id",
    metavar="ID",
    help="Host of the instance in a fleet.  [default: the setting host_id, else the host of the data directory]",
)
@_root_device_type_option("instance-store", "ebs: the root volume is on network storage.")
@click.option("--state", type=click.Choice(["running", "stopped"]), default="running", show_default=True)
@click.option("--stop-command", type=_COMMAND, help="Command that asks the guest to power off.")
@click.option(
    "--force-stop-command", type=_COMMAND, help="Command that cuts the power, for a guest that does not respond."
)
@click.option("--start-command", type=_COMMAND, help="Command that starts the machine.")
@click.option("--state-command", type=_COMMAND, help="Command that prints the state, as EC2 or virsh name it.")
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
    host_id: str | None,
    root_device_type: Literal["instance-store", "ebs"],
    state: str,
    stop_command: tuple[str, ...] | None,
    force_stop_command: tuple[str, ...] | None,
    start_command: tuple[str, ...] | None,
    state_command: tuple[str, ...] | None,
    tags: dict[str, str],
    output: str,
) -> None:
    """Add an instance that a file describes.

    Commands run without a shell, with the instance id in THRAVE_INSTANCE_ID. Pass --state-command if other programs can
    stop or start the machine, or if the machine needs time to power off: its output is then the state, in the terms of
    EC2 or of `virsh domstate`. Without it, the machine counts as off when the --stop-command has succeeded.

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

    described = _open_described(settings)
    _check_known_format(image_format)
    host_id = host_id or _default_host_id(settings)
    account_id = _find_account_id(settings, account_id)
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
        host=host_id,
    )
    check_volumes(new)
    warnings = _check_image(settings, described, new)
    described.add(new)
    print_instance(new, output, warnings)


@instance.command("list")
@settings_option
@output_option
def list_(settings: Settings, output: str) -> None:
    """List the instances of all accounts. Invalid descriptions are reported on stderr.

    \b
    Example:
      thrave instance list --output json
    """
    from thrave.compute.description_files import to_document
    from thrave.drivers import open_driver

    require_data_directory(settings)
    listed = open_driver(settings).list()
    rows: list[tuple[str, ...]] = [
        (found.instance_id, found.account_id, found.state, found.platform or "", found.root_device_type,
         str(found.root_volume.path))
        for found in listed
    ]  # fmt: skip
    header = ("INSTANCE", "ACCOUNT", "STATE", "PLATFORM", "ROOT DEVICE", "ROOT VOLUME")
    print_result(output, {"instances": [to_document(found) for found in listed]}, table(header, rows))


@instance.command("show")
@_of_instance
def show_(settings: Settings, word: str, output: str) -> None:
    """Show the instance with the id or name INSTANCE.

    \b
    Example:
      thrave instance show i-0123456789abcdef0
    """
    from thrave.compute.description_files import to_document
    from thrave.drivers import open_driver

    require_data_directory(settings)
    instances = open_driver(settings)
    found = instances.get(find_instance_id(instances, word))
    rows: list[tuple[str, ...]] = [
        ("account", found.account_id),
        *([("host", found.host)] if found.host else []),
        ("state", found.state),
        ("platform", found.platform or "linux"),
        ("root device", found.root_device_type),
        ("root volume", f"{found.root_volume.path} ({found.root_volume.format})"),
        *(("volume", f"{volume.path} ({volume.device_name})") for volume in found.volumes),
        *(("tag", f"{name} = {value}") for name, value in found.tags.items()),
    ]
    print_result(output, to_document(found), table(("INSTANCE", found.instance_id), rows))


@instance.command()
@_of_instance
@yes_option
def remove(settings: Settings, *, word: str, yes: bool, output: str) -> None:
    """Remove the description of the instance with the id or name INSTANCE. Its machine and volumes do not change.

    \b
    Example:
      thrave instance remove i-0123456789abcdef0
    """
    described = _open_described(settings)
    found = described.get(find_instance_id(described, word))
    instance_id = found.instance_id
    confirm_deletion(f"the description of the instance {instance_id} ({found.root_volume.path})", yes=yes)
    described.remove(instance_id)
    print_result(output, {"instanceId": instance_id}, f"removed {instance_id}")


@instance.command()
@_of_instance
def start(settings: Settings, word: str, output: str) -> None:
    """Start the instance with the id or name INSTANCE. Refused while its root volume is being bundled.

    \b
    Example:
      thrave instance start i-0123456789abcdef0
    """
    from thrave.drivers import open_driver

    require_data_directory(settings)
    instances = open_driver(settings)
    instance_id = find_instance_id(instances, word)
    instances.start(instance_id)
    print_instance(instances.get(instance_id), output)


@instance.command(short_help="Ask an instance to power off, and wait until it is off.")
@click.argument("word", metavar="INSTANCE")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait for the guest to power off.")
@settings_option
@output_option
def stop(settings: Settings, word: str, timeout: float, output: str) -> None:
    """Ask the instance with the id or name INSTANCE to power off, and wait until it is off. Never cuts the power.

    \b
    Example:
      thrave instance stop i-0123456789abcdef0
    """
    from thrave.compute.power import shut_down_guest
    from thrave.drivers import open_driver

    require_data_directory(settings)
    instances = open_driver(settings)
    instance_id = find_instance_id(instances, word)
    if shut_down_guest(instances, instance_id, timeout=timeout) != "stopped":
        raise click.ClickException(
            f"{instance_id} did not power off within {timeout:.0f} seconds. "
            "Shut it down in the guest, or pass a longer --timeout."
        )
    print_instance(instances.get(instance_id), output)


@instance.command(short_help="Register a libvirt domain as an instance of an account.")
@click.argument("domain", metavar="DOMAIN")
@_account_option
@click.option(
    "--platform",
    type=click.Choice(["windows"]),
    help="For a Windows domain without libosinfo metadata.  [default: from the metadata]",
)
@click.option("--root-device", metavar="TARGET", help="Disk that is bundled, such as vda.  [default: the boot disk]")
@_root_device_type_option(None, "ebs: the disk is on network storage.  [default: by the disk's source]")
@click.option(
    "--secret-file",
    type=_EXISTING_FILE,
    metavar="FILE",
    help="File with the passphrase of the disk, if the disk is encrypted.",
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
    """Register the libvirt domain with the name or UUID DOMAIN as an instance of an account.

    The instance id is derived from the domain's UUID and does not change. Adopting the domain again changes its
    properties. The service sees the instance at once. The domain may be running.

    \b
    Example:
      thrave instance adopt win-web --account 123456789012 --tag Name=web --config /etc/thrave/thrave.toml
    """
    instances = _open_adopted(settings)
    account_id = _find_account_id(settings, account_id)
    adopted = instances.adopt(
        domain,
        account_id=account_id,
        platform=platform,
        root_device=root_device,
        root_device_type=root_device_type,
        secret_file=secret_file and secret_file.absolute(),
        tags=tags,
    )
    print_instance(adopted, output, _image_warnings(settings, instances, adopted))


@instance.command(short_help="Remove a libvirt domain from its account.")
@_of_instance
@yes_option
def disown(settings: Settings, *, word: str, yes: bool, output: str) -> None:
    """Remove the libvirt domain with the instance id or name INSTANCE from its account. Domain and disks do not change.

    \b
    Example:
      thrave instance disown i-0123456789abcdef0
    """
    adopted = _open_adopted(settings)
    instance_id = find_instance_id(adopted, word)
    adopted.get_owner(instance_id)
    confirm_deletion(f"the account and the tags of the instance {instance_id} in its domain", yes=yes)
    adopted.disown(instance_id)
    print_result(output, {"instanceId": instance_id}, f"disowned {instance_id}")


def _open_described(settings: Settings) -> DirectoryDriver:
    """The instances described by files. Raises click's UsageError if the service uses libvirt domains."""
    from thrave.drivers import open_directory_driver

    require_data_directory(settings)
    if settings.hypervisor != "directory":
        raise click.UsageError(
            f"the instances here are {settings.hypervisor} domains (setting `hypervisor`): use `thrave instance adopt` "
            "and `thrave instance disown`"
        )
    return open_directory_driver(settings)


def _find_account_id(settings: Settings, id_or_name: str) -> str:
    with open_accounts(settings) as accounts:
        return find_account(accounts, id_or_name).account_id


def _default_host_id(settings: Settings) -> str | None:
    """The id of the host that a new instance belongs to; None without a fleet.

    Raises:
        click.UsageError: Hosts may share the instance folder, and no host id is known.
    """
    if settings.database_url is None:
        return None
    host_id = settings.known_host_id
    if host_id is None and settings.instance_dir is not None:
        raise click.UsageError("several hosts may share instance_dir: pass the host of this instance with --host-id")
    return host_id


def _check_known_format(image_format: str) -> None:
    from thrave.volumes.formats import FORMATS

    if image_format not in FORMATS:
        raise click.BadParameter(f"{image_format!r} is not one of {', '.join(FORMATS)}", param_hint="--format")


def _other_volumes(paths: Sequence[Path]) -> tuple[VolumeFile, ...]:
    """Other disks with EC2's device names for Windows, xvdb to xvdz."""
    from thrave.compute.instance import VolumeFile

    letters = string.ascii_lowercase[1:]
    if len(paths) > len(letters):
        raise click.BadParameter(f"at most {len(letters)} are possible", param_hint="--volume")
    return tuple(
        VolumeFile(path=path.absolute(), device_name=f"xvd{letter}")
        for path, letter in zip(paths, letters, strict=False)
    )


def _open_adopted(settings: Settings) -> LibvirtDriver:
    """The adopted libvirt domains. Raises click's UsageError if the service uses description files."""
    from thrave.drivers import open_libvirt_driver

    if settings.hypervisor != "libvirt":
        raise click.UsageError(
            'the instances here are described by files: set `hypervisor = "libvirt"`, or use `thrave instance add`'
        )
    return open_libvirt_driver(settings)


def _check_image(settings: Settings, instances: HypervisorDriver, instance: Instance) -> list[str]:
    """Return warnings about everything that prevents a bundle of this root volume.

    A file that another instance uses is a warning only: that instance may be removed or shut down before the first
    bundle. A task checks this again and refuses the file.

    Raises:
        click.UsageError: The image has another format than stated.
    """
    from thrave.tasks.root_volume import check_root_volume
    from thrave.volumes.errors import VolumeError

    if instance.root_device_type != "instance-store":
        return []
    volume = instance.root_volume
    _check_apparent_format(volume)
    try:
        warnings = check_root_volume(instances, instance.instance_id, volume, settings.image_dirs)
    except VolumeError as error:
        return [_not_bundleable(str(error))]
    return [warning.text for warning in warnings]


def _image_warnings(settings: Settings, instances: HypervisorDriver, instance: Instance) -> list[str]:
    """Return the same warnings for an adopted domain. A wrong format is a warning, since libvirt states it."""
    try:
        return _check_image(settings, instances, instance)
    except click.UsageError as error:
        return [_not_bundleable(error.message)]


def _not_bundleable(reason: str) -> str:
    return f"the instance cannot be bundled: {reason}"


def _check_apparent_format(volume: VolumeFile) -> None:
    from thrave.volumes.formats import FORMATS, guess_format

    apparent = guess_format(volume.path)
    if apparent is None and volume.format != "raw":
        raise click.UsageError(
            f"{volume.path} does not have the format {volume.format}. For a raw disk pass --format raw."
        )
    # A guest may encrypt its whole disk with LUKS: on the host this is a raw disk with a LUKS header.
    if apparent in {None, volume.format} or (apparent == "luks" and volume.format == "raw"):
        return
    remedy = (
        f"Pass --format {apparent}."
        if apparent in FORMATS
        else "Thrave does not read this format: unpack or convert the image (qemu-img convert)."
    )
    raise click.UsageError(f"{volume.path} has the format {apparent}, not {volume.format}. {remedy}")
