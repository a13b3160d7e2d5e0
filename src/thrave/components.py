"""Objects that every process of the service shares: database, vault, task queue, object store, instances, identity.

Each is opened from the settings when it is first used. The first start (`Components.open`) creates the database, the
vault key and the service identity: all three or none, and none of them if another one exists. Processes on several
machines share the database. Each has a copy of the vault key and of the service identity in its data directory, and
cannot start with different ones.

    DataDirectoryError
    ├── DataDirectoryInUseError     another process runs the service on it
    └── DatabaseLostError           it has the vault key or identity of a database that is missing or empty
"""

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from thrave import files
from thrave.buckets.base import ObjectStore
from thrave.buckets.s3_client import Credentials
from thrave.buckets.s3_store import KeyOwner
from thrave.compute.base import HypervisorDriver
from thrave.config import Settings
from thrave.database import (
    STATEMENT_TIMEOUT,
    DatabaseReplacedError,
    access_key,
    begin_exclusive,
    display_name,
    explain,
    migrate,
    migrations,
    open_engine,
    vault_check,
)
from thrave.drivers import open_driver, open_store
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import ServiceIdentity
from thrave.identity.errors import ServiceIdentityError
from thrave.tasks.failpoints import set_failpoint
from thrave.tasks.lease import HostLease
from thrave.tasks.repository import TaskRepository
from thrave.vault import DecryptError, Vault, VaultKeyError

if TYPE_CHECKING:  # importing the engine (DBOS) takes longer than most commands take to run
    from thrave.tasks.engine import TaskQueue
    from thrave.tasks.hosts import HostRegistry

_CHECK_VALUE = b"thrave"
VAULT_CHECK_CONTEXT = "vault proof"
"""Context with which the check value is encrypted. Existing databases have it, so it must not change."""


class DataDirectoryError(Exception):
    """The data directory cannot be used."""


class DataDirectoryInUseError(DataDirectoryError):
    """Another process runs the service on the data directory."""


class DatabaseLostError(DataDirectoryError):
    """The vault key or the identity exists, but the database that belongs to them is missing or empty."""


@dataclass(frozen=True)
class Components:
    """The components of one process; each is opened when it is first used.

    Attributes:
        settings: Settings of the service.
        database_timeout: Seconds for one statement on a database server.
        on_replaced: Called when the database file was deleted or replaced; see `database.open_engine`.
        store: The object store in place of the one that the settings name.
    """

    settings: Settings
    database_timeout: float = STATEMENT_TIMEOUT
    on_replaced: Callable[[DatabaseReplacedError], None] | None = field(default=None, repr=False)
    store: ObjectStore | None = field(default=None, repr=False)

    @cached_property
    def database(self) -> sa.Engine:
        """The database, with the tables of this release."""
        return self._opened[0]

    @cached_property
    def vault(self) -> Vault:
        """Encrypts and decrypts the secrets in the database."""
        return self._opened[1]

    @cached_property
    def accounts(self) -> Accounts:
        """Accounts, and the access keys that sign requests."""
        return Accounts(self.database, self.vault)

    @cached_property
    def queues(self) -> "TaskQueue":
        """The task queue of each host."""
        from thrave.tasks.engine import TaskQueue  # noqa: PLC0415 (see the imports)

        return TaskQueue(self.settings.database)

    @cached_property
    def buckets(self) -> ObjectStore:
        """The object store for bundles."""
        return self.store or open_store(self.settings, self._find_owner)

    @cached_property
    def instances(self) -> HypervisorDriver:
        """The instances of this machine."""
        return open_driver(self.settings)

    @cached_property
    def service(self) -> ServiceIdentity:
        """The identity that signs manifests. Raises ServiceIdentityError if it is not the one of the database."""
        identity = ServiceIdentity.open(self.settings.directory.service)
        with self.database.begin() as connection:
            known = connection.execute(sa.select(vault_check.c.identity)).scalar_one()
        if identity.fingerprint != known:
            raise ServiceIdentityError(
                f"{self.settings.directory.service} has another service identity than the database. Copy service/ from "
                "the data directory of the process that was started first."
            )
        return identity

    @cached_property
    def hosts(self) -> "HostRegistry":
        """The hosts of the fleet and their leases."""
        from thrave.tasks.hosts import HostRegistry  # noqa: PLC0415 (see the imports)

        settings = self.settings
        return HostRegistry(
            self.database,
            self.records(),
            self.queues,
            heartbeat_interval=settings.heartbeat_interval,
            heartbeat_timeout=settings.heartbeat_timeout,
        )

    def records(self, lease: HostLease | None = None) -> TaskRepository:
        """Return the repository of bundle tasks; an agent passes its lease."""
        return TaskRepository(self.database, self.vault, lease)

    def open(self) -> None:
        """Open the database and the vault. The first time, create them and the service identity.

        Raises:
            DataDirectoryError: All users share the data directory.
            DatabaseLostError: There is a vault key or an identity, but no database.
            DatabaseUnusableError: The database cannot be opened, is damaged, or belongs to a newer release.
            VaultKeyError: The vault key cannot be used, or is not the one that encrypted the database's secrets.
            ServiceIdentityError: The identity cannot be created.
            OSError: The data directory or a file in it cannot be used.
        """
        _ = self.database

    @cached_property
    def _opened(self) -> tuple[sa.Engine, Vault]:
        settings = self.settings
        if settings.failpoint:
            set_failpoint(settings.failpoint)
        root = _create_data_dir(settings)
        with files.folder_lock(root), explain_database_errors(settings):
            restrict_access(settings)
            if _has_no_tables(settings):
                _check_no_files_of_a_lost_database(settings)
            database = open_engine(settings.database, timeout=self.database_timeout, on_replaced=self.on_replaced)
            migrate(database)
            return database, _open_vault(settings, database)

    def _find_owner(self, access_key_id: str) -> KeyOwner | None:
        key = self.accounts.find_key(access_key_id)
        if key is None or key.status != "Active":
            return None
        credentials = Credentials(access_key_id=key.access_key_id, secret_access_key=key.secret_access_key)
        return KeyOwner(key.account_id, credentials)


def open_components(settings: Settings) -> Components:
    """Open the database and the vault at once. Raises as `Components.open`."""
    components = Components(settings)
    components.open()
    return components


def lock_data_directory(settings: Settings) -> files.ProcessLock | None:
    """Lock the data directory until this process ends, so that no second service uses its SQLite database.

    With PostgreSQL nothing is locked: a lease in the database decides which agent works for a host.

    Returns:
        The lock, in which the address can be recorded; None with PostgreSQL.

    Raises:
        DataDirectoryInUseError: A service runs on it; the message names its process.
        DataDirectoryError: All users share the data directory.
        OSError: The lock file cannot be created.
    """
    if settings.database_url is not None:
        return None
    directory = settings.directory
    _create_data_dir(settings)
    try:
        return files.ProcessLock(directory.lock)
    except files.ProcessLockedError as error:
        raise DataDirectoryInUseError(
            f"{directory.root} is in use: {error} runs on it. Stop that process, or give another --data-dir."
        ) from None


def _create_data_dir(settings: Settings) -> Path:
    """Return the data directory; create it if it does not exist.

    Raises:
        DataDirectoryError: All users share the folder, such as /tmp. No other program could use it after
            `restrict_access`.
        OSError: It cannot be created.
    """
    root = settings.directory.root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if root.stat().st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH:
        raise DataDirectoryError(f"{root} is a folder that all users share. Give --data-dir a folder in it.")
    return root


def restrict_access(settings: Settings) -> None:
    """Remove the permissions of group and others from the data directory, and from its files and folders.

    This includes buckets: a bundle is given to other users with `thrave copy`.

    Raises:
        NotPrivateError: Other users have access to a file or folder in it, and this user may not change that.
    """
    directory = settings.directory
    with suppress(files.NotPrivateError):  # a data directory of another user keeps its mode: the owner decides
        files.restrict_to_owner(directory.root)
    database, buckets = directory.database_file, directory.buckets
    for path in (
        *(database.with_name(database.name + end) for end in ("", "-wal", "-shm")),
        directory.lock, directory.service, directory.locks,
        directory.instances, directory.instances / ".locks",
        buckets, buckets / ".owners", buckets / ".spool", *_folders(buckets),
    ):  # fmt: skip
        files.restrict_to_owner(path)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


@contextmanager
def explain_database_errors(settings: Settings) -> Iterator[None]:
    """Raise DatabaseUnusableError, whose message says what to do, for each error of the database."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise explain(error, settings.database) from error


def _has_no_tables(settings: Settings) -> bool:
    """Whether the database is missing or empty. Creates nothing."""
    if settings.database_url is None:
        file = settings.directory.database_file
        if not file.exists() or file.stat().st_size == 0:
            return True
    engine = open_engine(settings.database)
    try:
        with engine.connect() as connection:
            return migrations(connection)[0] is None
    finally:
        engine.dispose()


def _check_no_files_of_a_lost_database(settings: Settings) -> None:
    """Raise DatabaseLostError if a file exists that was created with the database."""
    directory = settings.directory
    paths = [directory.vault_key, directory.service]
    owners = directory.buckets / ".owners"
    if settings.database_url is None and owners.is_dir():
        paths += owners.iterdir()
    for path in paths:
        if path.exists():
            raise DatabaseLostError(
                f"The database {display_name(settings.database)} is missing or empty, but {path} exists, which was "
                "created with it. Restore the database from a backup. To start with a new one, use an empty data "
                "directory."
            )


def _open_vault(settings: Settings, database: sa.Engine) -> Vault:
    """Open the vault, and check with the database's check value that its key is the right one.

    The first process creates key and identity. The check value is committed last: after a crash before that, the next
    start uses the files that exist.
    """
    directory = settings.directory
    with database.begin() as connection:
        begin_exclusive(connection)
        encrypted = connection.execute(sa.select(vault_check.c.encrypted)).scalar()
        if encrypted is None and not _has_secrets(connection):
            vault = Vault.open_or_create(directory.vault_key)
        elif directory.vault_key.exists():
            vault = Vault.open(directory.vault_key)
        else:
            raise VaultKeyError(
                f"{directory.vault_key} is missing, and the database has secrets that were encrypted with it. Copy "
                "vault.key and service/ from a backup, or from the data directory of the process that was started "
                "first."
            )
        if encrypted is None:
            identity = ServiceIdentity.open_or_create(directory.service)
            row = {
                "id": 1,
                "encrypted": vault.encrypt(_CHECK_VALUE, context=VAULT_CHECK_CONTEXT),
                "identity": identity.fingerprint,
            }
            connection.execute(vault_check.insert(), row)
            return vault
    try:
        vault.decrypt(encrypted, context=VAULT_CHECK_CONTEXT)
    except DecryptError:
        raise VaultKeyError(
            f"{directory.vault_key} is not the key that encrypted the database's secrets. Copy vault.key and service/ "
            "from the data directory of the process that was started first."
        ) from None
    return vault


def _has_secrets(connection: sa.Connection) -> bool:
    return connection.execute(sa.select(access_key.c.access_key_id).limit(1)).first() is not None
