"""`thrave account`: accounts and their access keys, on the machine that has the service's data directory.

A secret access key and a new private key are printed or written once; Thrave cannot show them again.
"""

from __future__ import annotations

import base64
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.identifiers import find_account
from thrave.cli.options import (
    ExistingPath,
    confirm_deletion,
    delete_access_key,
    open_accounts,
    open_identity,
    open_service,
    settings_option,
    yes_option,
)
from thrave.cli.output import (
    key_document,
    key_documents,
    key_ids,
    output_option,
    print_new_secret,
    print_result,
    table,
)
from thrave.cli.user_commands import user

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thrave.config import Settings
    from thrave.identity.accounts import AccessKey, Account

_FILE = ExistingPath(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_account = click.argument("account", metavar="ACCOUNT")


@click.group()
def account() -> None:
    """Manage accounts. Their access keys sign requests and upload policies.

    ACCOUNT is the id or name of an account, or the start of its id.

    \b
    Example:
      thrave account create alice --new-certificate ~/.thrave
    """


account.add_command(user)


@account.command()
@click.argument("name")
@click.option("--certificate", type=_FILE, help="X.509 certificate (PEM, RSA); its private key opens the bundles.")
@click.option(
    "--new-certificate",
    type=_FOLDER,
    metavar="DIR",
    help="Create a certificate and a private key: cert-*.pem and pk-*.pem in DIR.",
)
@settings_option
@output_option
def create(settings: Settings, name: str, certificate: Path | None, new_certificate: Path | None, output: str) -> None:
    """Create an account with an access key. The secret is shown once.

    With a certificate, its private key opens the account's bundles. The service never stores this private key. Without
    a certificate only the service can open the bundles.

    \b
    Example:
      thrave account create alice --certificate cert-HKZYKTAIG2ECMXYIBH3HXV4ZBEXAMPLE.pem
    """
    if certificate and new_certificate:
        raise click.UsageError("Pass either --certificate or --new-certificate.")
    with (
        open_accounts(settings, create=True) as accounts,
        _certificate_files(name, certificate, new_certificate) as paths,
    ):
        pem = paths[0].read_text("utf-8", errors="replace") if paths else None
        new, key = accounts.create(name, pem)
    document = {"accountId": new.account_id, "name": new.name, **key_document(key)}
    if new_certificate:
        document |= {"certificateFile": str(paths[0]), "privateKeyFile": str(paths[1])}
    print_new_secret(output, document)


@account.command("list")
@settings_option
@output_option
def list_(settings: Settings, output: str) -> None:
    """List accounts with their access keys, without the secrets.

    \b
    Example:
      thrave account list --output json
    """
    with open_accounts(settings) as accounts:
        listed = [(found, accounts.list_keys(found.account_id)) for found in accounts.list()]
    rows: list[tuple[str, ...]] = [
        (
            found.account_id,
            found.name,
            "yes" if found.certificate else "no",
            key_ids(keys),
        )
        for found, keys in listed
    ]
    print_result(
        output,
        {"accounts": [_account_document(found, keys) for found, keys in listed]},
        table(("ACCOUNT", "NAME", "CERTIFICATE", "ACCESS KEYS"), rows),
    )


@account.command()
@_account
@settings_option
@output_option
def show(settings: Settings, account: str, output: str) -> None:
    """Show the account with the id or name ACCOUNT, its access keys and users, without the secrets.

    \b
    Example:
      thrave account show alice
    """
    with open_identity(settings) as (accounts, users):
        found = find_account(accounts, account)
        keys, names = accounts.list_keys(found.account_id), [one.user_name for one in users.list(found.account_id)]
    rows: list[tuple[str, ...]] = [
        ("name", found.name),
        ("created", f"{found.create_date:%Y-%m-%dT%H:%M:%SZ}"),
        ("certificate", "yes" if found.certificate else "no"),
        *(("access key", f"{one.access_key_id} ({one.status})") for one in keys),
        *(("user", name) for name in names),
    ]
    document = {**_account_document(found, keys), "userNames": names}
    print_result(output, document, table(("ACCOUNT", found.account_id), rows))


@account.command()
@_account
@click.argument("name", metavar="NAME")
@settings_option
@output_option
def rename(settings: Settings, account: str, name: str, output: str) -> None:
    """Give the account with the id or name ACCOUNT the name NAME. Its id, keys and bundles do not change.

    \b
    Example:
      thrave account rename alice alice@example.com
    """
    with open_accounts(settings) as accounts:
        account_id = find_account(accounts, account).account_id
        renamed = accounts.rename(account_id, name)
    print_result(output, {"accountId": account_id, "name": renamed.name}, f"{account_id} is now {renamed.name}")


@account.command()
@_account
@yes_option
@settings_option
@output_option
def delete(settings: Settings, *, account: str, yes: bool, output: str) -> None:
    """Delete the account with the id or name ACCOUNT, its access keys and its users. Its bundles and buckets stay.

    Refused while the account has an instance, an unfinished task, or objects that a task must still delete.

    \b
    Example:
      thrave account delete alice
    """
    from thrave.identity.accounts import instance_conflict

    with open_service(settings) as components:
        found = find_account(components.accounts, account)
        confirm_deletion(f"the account {found.account_id} ({found.name}) with its access keys and users", yes=yes)
        for instance in components.instances.list(found.account_id):
            raise instance_conflict(found.account_id, instance.instance_id)
        components.accounts.delete(found.account_id)
    print_result(output, {"accountId": found.account_id, "name": found.name}, f"deleted {found.account_id}")


@account.group()
def key() -> None:
    """Manage the access keys of an account. Two at most, so that one can be replaced while the other works."""


@key.command("create")
@_account
@settings_option
@output_option
def create_key(settings: Settings, account: str, output: str) -> None:
    """Create an access key for the account with the id or name ACCOUNT. The secret is shown once.

    \b
    Example:
      thrave account key create 123456789012
    """
    with open_accounts(settings) as accounts:
        account_id = find_account(accounts, account).account_id
        document = {"accountId": account_id, **key_document(accounts.create_key(account_id))}
    print_new_secret(output, document)


@key.command("import", short_help="Import an access key of the object store for an account.")
@_account
@click.option(
    "--credentials",
    type=_FILE,
    required=True,
    help="File like ~/.aws/credentials, mode 0600; the profile [default] is read.",
)
@settings_option
@output_option
def import_key(settings: Settings, account: str, credentials: Path, output: str) -> None:
    """Import an access key that the object store knows, for the account with the id or name ACCOUNT.

    The store accepts upload policies that are signed with this key. The service uses the key there for the account.

    \b
    Example:
      thrave account key import 123456789012 --credentials alice.credentials
    """
    from thrave.drivers import read_credentials

    pair = read_credentials(credentials)
    with open_accounts(settings) as accounts:
        account_id = find_account(accounts, account).account_id
        key = accounts.import_key(account_id, pair.access_key_id, pair.secret_access_key)
    document = {"accountId": account_id, "accessKeyId": key.access_key_id}
    print_result(output, {**document}, f"imported {key.access_key_id}")


@key.command("delete")
@click.argument("access_key_id", metavar="KEY")
@yes_option
@settings_option
@output_option
def delete_key(settings: Settings, *, access_key_id: str, yes: bool, output: str) -> None:
    """Delete the access key with the id KEY. Requests that it signs are refused within one second.

    \b
    Example:
      thrave account key delete AKIAIOSFODNN7EXAMPLE
    """
    delete_access_key(settings, access_key_id, output, yes=yes)


@contextmanager
def _certificate_files(name: str, given: Path | None, folder: Path | None) -> Iterator[tuple[Path, ...]]:
    """The paths of an account's certificate and key. New files are deleted again if the block fails."""
    if folder is None:
        yield (given,) if given else ()
        return
    paths = _write_new_certificate(name, folder)
    try:
        yield paths
    except Exception:
        for path in paths:
            path.unlink()
        raise


def _write_new_certificate(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `cert-ID.pem` and `pk-ID.pem`. ID is the base32 of the certificate's SHA-1, as AWS names such files."""
    from cryptography.hazmat.primitives.serialization import Encoding

    from thrave import files
    from thrave.identity.certificates import load_certificate, new_certificate

    certificate, private_key = new_certificate(name)
    der = load_certificate(certificate).public_bytes(Encoding.DER)
    certificate_id = base64.b32encode(hashlib.sha1(der, usedforsecurity=False).digest()).decode()
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"cert-{certificate_id}.pem", folder / f"pk-{certificate_id}.pem"
    for path, pem in zip(paths, (certificate, private_key), strict=True):
        files.create_exclusive(path, pem.encode())
    return paths


def _account_document(found: Account, keys: Sequence[AccessKey]) -> dict[str, object]:
    return {
        "accountId": found.account_id,
        "name": found.name,
        "createDate": found.create_date,
        "certificate": found.certificate,
        "accessKeys": key_documents(keys),
    }
