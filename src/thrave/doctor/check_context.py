"""What a check raises that finds something wrong, besides what the rooms themselves raise.

CheckError
├── Trouble     it was tried, and is not as it must be
└── NotTried    there is nothing to try: it does not concern this service

What the doctor looks at: a service as its settings say, its parts opened one by one as the checks ask for them.

Unlike the service (`components.py`) it makes nothing that is not there yet: no data directory, no tables, no vault's
key.
Objects of the trial have a prefix, and lie in a bucket, that no bundle has.
"""

import secrets
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from thrave import files
from thrave.buckets.base import ObjectStore
from thrave.buckets.s3_client import Credentials, HttpTransport, SignedClient, StoreConfig
from thrave.buckets.s3_store import KeyOwner
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection
from thrave.config import Settings
from thrave.database import open_engine
from thrave.drivers import open_adopted, open_store, store_connection
from thrave.identity.accounts import AccessKey, Accounts, new_access_key_id, new_secret_access_key
from thrave.vault import Vault

if TYPE_CHECKING:
    from thrave.compute.libvirt.driver import LibvirtDriver


class CheckError(Exception):
    """A check has not passed; the text says why and holds no secret."""


class CheckFailed(CheckError):
    """What was tried is not as it must be."""


class CheckSkipped(CheckError):
    """What would be tried is not there, and need not be."""


STORE_SECONDS = 10.0  # for which one request to the store may stand still


_NOBODYS_ACCOUNT = "000000000000"


class CheckContext:
    """One service; close it in the end.

    Args:
        settings: The service's.
        access_key_id: In whose name buckets are tried, where they are the accounts' own; the newest key by default.
        bucket: Where objects are tried; by default a new one.
    """

    def __init__(self, settings: Settings, *, access_key_id: str | None = None, bucket: str | None = None) -> None:
        self.settings = settings.model_copy(update={"s3_timeout": min(settings.s3_timeout, STORE_SECONDS)})
        self.prefix = f"thrave-doctor-{secrets.token_hex(8)}"
        self.bucket = bucket or self.prefix
        self.has_made_bucket = False
        self._access_key_id = access_key_id

    @property
    def by_owners_key(self) -> bool:
        """Whether the store knows the accounts' keys, and buckets are theirs there."""
        return self.settings.store == "s3" and self.settings.upload_credentials == "policy"

    @cached_property
    def database(self) -> sa.Engine:
        """The database, as it is."""
        try:
            url = sa.make_url(self.settings.database)
        except sa.exc.ArgumentError:  # whose own words quote the URL
            raise CheckFailed("the setting database_url is not a database's URL") from None
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
            raise self._no_data()
        return open_engine(self.settings.database)

    @cached_property
    def vault(self) -> Vault:
        """The vault, if its key is there."""
        return Vault(files.read_private(self.settings.directory.vault_key))

    @cached_property
    def holder(self) -> KeyOwner:
        """In whose name buckets are tried; where we judge policies ourselves, a key is made up for them."""
        if self._access_key_id is None and not self.by_owners_key:
            pair = Credentials(access_key_id=new_access_key_id(), secret_access_key=new_secret_access_key())
            return KeyOwner(_NOBODYS_ACCOUNT, pair)
        key = self._key()
        return KeyOwner(
            key.account_id,
            Credentials(access_key_id=key.access_key_id, secret_access_key=key.secret_access_key),
        )

    @cached_property
    def buckets(self) -> ObjectStore:
        """The store, in that name."""
        if self.settings.store == "directory" and not self.settings.data_dir.exists():
            raise self._no_data()
        return open_store(self.settings, self._find_holder).on_behalf_of(self.holder.credentials.access_key_id)

    @cached_property
    def connection(self) -> StoreConfig:
        """How an S3 store is called."""
        return store_connection(self.settings)

    @cached_property
    def transport(self) -> HttpTransport:
        """Connections to an S3 store."""
        return HttpTransport(self.connection)

    @cached_property
    def requests(self) -> SignedClient:
        """Requests to an S3 store, signed with the key whose the buckets are there."""
        key = self.holder.credentials if self.by_owners_key else self.connection.credentials
        return SignedClient(self.connection, self.transport, key)

    @cached_property
    def adopted(self) -> "LibvirtDriver":
        """The domains that are instances."""
        return open_adopted(self.settings)

    @cached_property
    def hypervisor(self) -> LibvirtConnection:
        """The libvirt that has them, for what the service never asks."""
        return LibvirtConnection(self.settings.libvirt_uri, DomainEvents())

    def close(self) -> None:
        """Let go of the database and of libvirt."""
        opened = self.__dict__
        if "database" in opened:
            self.database.dispose()
        for name in {"adopted", "hypervisor"} & opened.keys():
            opened[name].close()

    def _no_data(self) -> CheckFailed:
        return CheckFailed(f"{self.settings.data_dir} is no data directory yet; `thrave account create` begins one")

    def _find_holder(self, _access_key_id: str) -> KeyOwner:
        return self.holder

    def _key(self) -> AccessKey:
        accounts = Accounts(self.database, self.vault)
        if self._access_key_id is not None:
            key = accounts.find_key(self._access_key_id)
            if key is None or key.status != "Active":
                raise CheckFailed(f"the service holds no active access key {self._access_key_id}")
            return key
        keys = [key for account in accounts.list() for key in accounts.list_keys(account.account_id)]
        active = [key for key in keys if key.status == "Active"]
        if not active:
            raise CheckFailed("no account has an access key yet")
        return max(active, key=lambda key: key.create_date)
