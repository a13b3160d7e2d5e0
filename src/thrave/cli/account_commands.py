"""`thrave account`: accounts and their access keys, on the machine that has the service's data directory.

A secret access key and a new private key are shown or written once, to who asked; neither can be had again.
"""

from __future__ import annotations

import base64
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.options import open_accounts, settings_option
from thrave.cli.output import key_document, key_documents, output_option, print_result, secrets_as_text, table
from thrave.cli.user_commands import user

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thrave.config import Settings
    from thrave.identity.accounts import AccessKey, Account

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def account() -> None:
    """Accounts, whose access keys sign requests and upload policies.

    \b
    Example:
      thrave account create alice --new-certificate ~/.thrave
    """


account.add_command(user)


@account.command()
@click.argument("name")
@click.option("--certificate", type=_FILE, help="X.509 certificate (PEM, RSA) whose owner may open the bundles.")
@click.option("--new-certificate", type=_FOLDER, metavar="DIR", help="Make one: cert-*.pem and pk-*.pem in DIR.")
@settings_option
@output_option
def create(settings: Settings, name: str, certificate: Path | None, new_certificate: Path | None, output: str) -> None:
    """Create an account with an access key, shown once.

    With a certificate the account's bundles can be opened with its private key, which the service never keeps. Without
    one only the service can open them.

    \b
    Example:
      thrave account create alice --certificate cert-HKZYKTAIG2ECMXYIBH3HXV4ZBEXAMPLE.pem
    """
    if certificate and new_certificate:
        raise click.UsageError("--certificate and --new-certificate exclude each other")
    with open_accounts(settings, make=True) as accounts, _certificate_files(name, certificate, new_certificate) as made:
        pem = made[0].read_text("utf-8", errors="replace") if made else None
        new, key = accounts.create(name, pem)
    document = {"accountId": new.account_id, "name": new.name, **key_document(key)}
    if new_certificate:
        document |= {"certificateFile": str(made[0]), "privateKeyFile": str(made[1])}
    print_result(output, {**document}, secrets_as_text(document))


@account.command("list")
@settings_option
@output_option
def list_(settings: Settings, output: str) -> None:
    """List the accounts and their access keys, without the secrets.

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
            " ".join(key.access_key_id for key in keys),
        )
        for found, keys in listed
    ]
    print_result(
        output,
        {"accounts": [_account_document(found, keys) for found, keys in listed]},
        table(("ACCOUNT", "NAME", "CERTIFICATE", "ACCESS KEYS"), rows),
    )


@account.group()
def key() -> None:
    """Access keys of an account: two at most, so that one can be replaced while the other works."""


@key.command("create")
@click.argument("account_id", metavar="ACCOUNT")
@settings_option
@output_option
def create_key(settings: Settings, account_id: str, output: str) -> None:
    """Give the account with the id ACCOUNT another access key, shown once.

    \b
    Example:
      thrave account key create 123456789012
    """
    with open_accounts(settings) as accounts:
        document = {"accountId": account_id, **key_document(accounts.create_key(account_id))}
    print_result(output, {**document}, secrets_as_text(document))


@key.command("import")
@click.argument("account_id", metavar="ACCOUNT")
@click.option(
    "--credentials", type=_FILE, required=True, help="A file as ~/.aws/credentials, mode 0600: its [default]."
)
@settings_option
@output_option
def import_key(settings: Settings, account_id: str, credentials: Path, output: str) -> None:
    """Give the account with the id ACCOUNT an access key that its store of buckets knows.

    Upload policies that are signed with it are good for that store, and the service acts there with it for the account.

    \b
    Example:
      thrave account key import 123456789012 --credentials alice.credentials
    """
    from thrave.drivers import read_credentials

    known = read_credentials(credentials)
    with open_accounts(settings) as accounts:
        key = accounts.import_key(account_id, known.access_key_id, known.secret_access_key)
    document = {"accountId": account_id, "accessKeyId": key.access_key_id}
    print_result(output, {**document}, f"imported {key.access_key_id}")


@key.command("delete")
@click.argument("access_key_id", metavar="KEY")
@settings_option
@output_option
def delete_key(settings: Settings, access_key_id: str, output: str) -> None:
    """Delete the access key with the id KEY; requests that it signs are refused within a second.

    \b
    Example:
      thrave account key delete AKIAIOSFODNN7EXAMPLE
    """
    with open_accounts(settings) as accounts:
        accounts.delete_key(access_key_id)
    print_result(output, {"accessKeyId": access_key_id}, f"deleted {access_key_id}")


@contextmanager
def _certificate_files(name: str, given: Path | None, folder: Path | None) -> Iterator[tuple[Path, ...]]:
    """The files of an account's certificate; new ones are taken away again if the account is not created."""
    if folder is None:
        yield (given,) if given else ()
        return
    made = _write_new_certificate(name, folder)
    try:
        yield made
    except Exception:
        for path in made:
            path.unlink()
        raise


def _write_new_certificate(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `cert-ID.pem` and `pk-ID.pem`, ID being the base32 of the certificate's SHA-1, in AWS's form."""
    from cryptography.hazmat.primitives.hashes import SHA1

    from thrave import files
    from thrave.identity.certificates import load_certificate, new_certificate

    certificate, private_key = new_certificate(name)
    certificate_id = base64.b32encode(load_certificate(certificate).fingerprint(SHA1())).decode()  # noqa: S303 (a name, no proof)
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"cert-{certificate_id}.pem", folder / f"pk-{certificate_id}.pem"
    for path, pem in zip(made, (certificate, private_key), strict=True):
        files.create_exclusive(path, pem.encode())
    return made


def _account_document(found: Account, keys: Sequence[AccessKey]) -> dict[str, object]:
    return {
        "accountId": found.account_id,
        "name": found.name,
        "createDate": found.create_date,
        "certificate": found.certificate,
        "accessKeys": key_documents(keys),
    }
