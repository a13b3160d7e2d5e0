"""What the checks use: the components of a service, each opened when a check first needs it; and errors of checks.

Unlike `components.py` this module creates nothing: no data directory, no tables, no vault key. Test objects have a
prefix, and by default a bucket, that no bundle has.

    CheckError
    ├── CheckFailed     the check has failed
    └── CheckSkipped    nothing to check with these settings
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from thrave import files
from thrave.buckets.base import ObjectStore
from thrave.buckets.s3_client import Credentials, HttpTransport, SignedClient, StoreConfig
from thrave.buckets.s3_store import KeyOwner
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection
from thrave.concurrency import random_hex
from thrave.config import Settings
from thrave.database import open_engine
from thrave.drivers import open_libvirt_driver, open_store, store_config
from thrave.identity.accounts import AccessKey, Accounts, new_access_key_id, new_secret_access_key
from thrave.vault import Vault

if TYPE_CHECKING:
    from thrave.compute.libvirt.driver import LibvirtDriver


class CheckError(Exception):
    """A check has not passed; the message says why and contains no secret."""


class CheckFailed(CheckError):
    """The check has failed."""


class CheckSkipped(CheckError):
    """There is nothing to check with these settings."""


STORE_TIMEOUT = 10.0  # seconds without progress of one request to the store
_UNUSED_ACCOUNT_ID = "000000000000"


class CheckContext:
    """The components of one service. Call `close` at the end.

    Args:
        settings: Settings of the service.
        access_key_id: Key that owns the test bucket, if the store knows the accounts' keys. Default: the newest key.
        bucket: Bucket for test objects. Default: a new one.
    """

    def __init__(self, settings: Settings, *, access_key_id: str | None = None, bucket: str | None = None) -> None:
        self.settings = settings.model_copy(update={"s3_timeout": min(settings.s3_timeout, STORE_TIMEOUT)})
        self.prefix = f"thrave-doctor-{random_hex(8)}"
        self.bucket = bucket or self.prefix
        self.has_created_bucket = False
        self._access_key_id = access_key_id

    @property
    def uses_owner_keys(self) -> bool:
        """Whether the store knows the accounts' keys, and the accounts own the buckets there."""
        return self.settings.store == "s3" and self.settings.upload_credentials == "policy"

    @cached_property
    def database(self) -> sa.Engine:
        """The database, without migrating it."""
        try:
            url = sa.make_url(self.settings.database)
        except sa.exc.ArgumentError:  # its message quotes the URL, which may hold a password
            raise CheckFailed("the setting database_url is not the URL of a database") from None
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
            raise self._no_data()
        return open_engine(self.settings.database)

    @cached_property
    def vault(self) -> Vault:
        """The vault, if its key exists."""
        return Vault(files.read_private(self.settings.directory.vault_key))

    @cached_property
    def holder(self) -> KeyOwner:
        """Owner of the test bucket; a new random key if the service verifies policies itself."""
        if self._access_key_id is None and not self.uses_owner_keys:
            credentials = Credentials(access_key_id=new_access_key_id(), secret_access_key=new_secret_access_key())
            return KeyOwner(_UNUSED_ACCOUNT_ID, credentials)
        key = self._key()
        return KeyOwner(
            key.account_id,
            Credentials(access_key_id=key.access_key_id, secret_access_key=key.secret_access_key),
        )

    @cached_property
    def buckets(self) -> ObjectStore:
        """The object store, on behalf of `holder`."""
        if self.settings.store == "directory" and not self.settings.data_dir.exists():
            raise self._no_data()
        return open_store(self.settings, self._find_holder).on_behalf_of(self.holder.credentials.access_key_id)

    @cached_property
    def connection(self) -> StoreConfig:
        """Connection settings of an S3 store."""
        return store_config(self.settings)

    @cached_property
    def transport(self) -> HttpTransport:
        """HTTP connections to an S3 store."""
        return HttpTransport(self.connection)

    @cached_property
    def requests(self) -> SignedClient:
        """Requests to an S3 store, signed with the key that owns the buckets there."""
        key = self.holder.credentials if self.uses_owner_keys else self.connection.credentials
        return SignedClient(self.connection, self.transport, key)

    @cached_property
    def adopted(self) -> "LibvirtDriver":
        """The adopted domains."""
        return open_libvirt_driver(self.settings)

    @cached_property
    def hypervisor(self) -> LibvirtConnection:
        """The libvirt connection of the adopted domains, for queries that the driver does not make."""
        return LibvirtConnection(self.settings.libvirt_uri, DomainEvents())

    def close(self) -> None:
        """Close the connections to the database and libvirt, if they were opened."""
        opened = self.__dict__
        if "database" in opened:
            self.database.dispose()
        for name in {"adopted", "hypervisor"} & opened.keys():
            opened[name].close()

    def _no_data(self) -> CheckFailed:
        return CheckFailed(f"{self.settings.data_dir} is not a data directory; create one with `thrave account create`")

    def _find_holder(self, _access_key_id: str) -> KeyOwner:
        return self.holder

    def _key(self) -> AccessKey:
        accounts = Accounts(self.database, self.vault)
        if self._access_key_id is not None:
            key = accounts.find_key(self._access_key_id)
            if key is None or key.status != "Active":
                raise CheckFailed(f"the service has no active access key {self._access_key_id}")
            return key
        keys = [key for account in accounts.list() for key in accounts.list_keys(account.account_id)]
        active = [key for key in keys if key.status == "Active"]
        if not active:
            raise CheckFailed("no account has an active access key")
        return max(active, key=lambda key: key.create_date)
