"""What the commands on accounts and users share: the data directory's accounts, and how a new key is shown."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from thrave.cli.service import open_service

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from thrave.config import Settings
    from thrave.identity.accounts import AccessKey, Account, Accounts
    from thrave.identity.users import Users

_LABELS = {
    "accountId": "Account",
    "name": "Name",
    "userName": "User",
    "accessKeyId": "Access key",
    "secretAccessKey": "Secret access key",
    "certificateFile": "Certificate",
    "privateKeyFile": "Private key",
}


@contextmanager
def open_accounts(settings: Settings, *, make: bool = False) -> Iterator[Accounts]:
    """The accounts of a data directory, which is made only if the command may begin one."""
    with open_identity(settings, make=make) as (accounts, _):
        yield accounts


@contextmanager
def open_identity(settings: Settings, *, make: bool = False) -> Iterator[tuple[Accounts, Users]]:
    """The accounts and users of a data directory, which is made only if the command may begin one."""
    from thrave.identity.users import Users

    with open_service(settings, make=make) as ground:
        yield ground.accounts, Users(ground.database)


def find_account(accounts: Accounts, id_or_name: str) -> Account:
    """The account with an id, else the one with a name. Raises NoSuchEntity if there is none."""
    listed = accounts.list()
    for found in listed:
        if found.account_id == id_or_name:
            return found
    return next((found for found in listed if found.name == id_or_name), None) or accounts.get(id_or_name)


def key_document(key: AccessKey) -> dict[str, str]:
    """A new access key with its secret, which is not shown again."""
    return {"accessKeyId": key.access_key_id, "secretAccessKey": key.secret_access_key}


def key_documents(keys: Sequence[AccessKey]) -> list[dict[str, object]]:
    """Access keys without their secrets."""
    return [{"accessKeyId": key.access_key_id, "status": key.status, "createDate": key.create_date} for key in keys]


def secrets_as_text(document: Mapping[str, str]) -> str:
    """What holds a new secret, for people."""
    lines = [f"{label + ':':<20}{document[name]}" for name, label in _LABELS.items() if name in document]
    return "\n".join([*lines, "", "The secret access key is not shown again."])
