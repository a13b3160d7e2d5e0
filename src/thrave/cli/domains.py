"""`thrave instance adopt` and `disown`: which of libvirt's domains are instances, and whose.

What is said here is written into the domain's own metadata, where it stays with the domain. Nothing else of it is
changed, and it is neither stopped nor started.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from thrave.cli.identity import find_account, open_accounts
from thrave.cli.images import warnings_of_image
from thrave.cli.instance_words import show
from thrave.cli.output import emit, output_option
from thrave.cli.service import settings_option
from thrave.cli.tags import tags_option

if TYPE_CHECKING:
    from thrave.compute.libvirt.driver import LibvirtDriver
    from thrave.config import Settings


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
    emit(output, {"instanceId": instance_id}, f"disowned {instance_id}")


def _adopted(settings: Settings) -> LibvirtDriver:
    """The domains that are instances. Raises click's UsageError where the service does not look at those."""
    from thrave.drivers import open_adopted

    if settings.hypervisor != "libvirt":
        raise click.UsageError(
            'files describe the instances here: set `hypervisor = "libvirt"` first, or use `thrave instance add`'
        )
    return open_adopted(settings)
