"""Objects that every process of the service shares: database, vault, task queues, buckets, instances, identity.

Each is opened from the settings when it is first used. `Components.open` is the first start: it makes the database, the
vault's key and the service's identity, all three together or none, and never one of them beside others that are there
already. Processes on several machines share the database; each has a copy of the vault's key and of the service's
identity in its own data directory, and is refused if it has others.

    DataDirectoryError
    ├── DataDirectoryInUseError     a service runs on it
    └── DatabaseLostError           it has the files of a database that is missing or empty
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
    TIMEOUT,
    DatabaseReplacedError,
    access_key,
    explain,
    lock,
    migrate,
    migrations,
    open_engine,
    place,
    vault_check,
)
from thrave.drivers import open_driver, open_store
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import ServiceIdentity
from thrave.identity.errors import ServiceIdentityError
from thrave.tasks.failpoints import set_failpoint
from thrave.tasks.lease import Fence
from thrave.tasks.repository import TaskRepository
from thrave.vault import DecryptError, Vault, VaultKeyError

if TYPE_CHECKING:  # the engine takes longer to import than most commands take to run
    from thrave.tasks.engine import TaskQueue
    from thrave.tasks.hosts import HostRegistry

_PROOF = b"thrave"
PROOF_CONTEXT = "vault proof"


class DataDirectoryError(Exception):
    """The data directory cannot be used."""


class DataDirectoryInUseError(DataDirectoryError):
    """Another process runs the service on it."""


class DatabaseLostError(DataDirectoryError):
    """The vault's key or the identity is there, but the database that belongs to them is missing or empty."""


@dataclass(frozen=True)
class Components:
    """What a process is put together from; each part is opened when it is first used.

    Attributes:
        settings: Of the service.
        database_timeout: Seconds for one statement on a database server.
        replaced: Called when the database's file was deleted or replaced; see `database.open_engine`.
    """

    settings: Settings
    database_timeout: float = TIMEOUT
    replaced: Callable[[DatabaseReplacedError], None] | None = field(default=None, repr=False)

    @cached_property
    def database(self) -> sa.Engine:
        """The database, with the tables of this release."""
        return self._opened[0]

    @cached_property
    def vault(self) -> Vault:
        """What encrypts the secrets in the database."""
        return self._opened[1]

    @cached_property
    def accounts(self) -> Accounts:
        """Who may sign requests."""
        return Accounts(self.database, self.vault)

    @cached_property
    def queues(self) -> "TaskQueue":
        """Where tasks are handed to hosts."""
        from thrave.tasks.engine import TaskQueue  # noqa: PLC0415 (see above)

        return TaskQueue(self.settings.database)

    @cached_property
    def buckets(self) -> ObjectStore:
        """Where bundles go."""
        return open_store(self.settings, self._holder)

    @cached_property
    def instances(self) -> HypervisorDriver:
        """The instances of this machine."""
        return open_driver(self.settings)

    @cached_property
    def service(self) -> ServiceIdentity:
        """The identity that signs manifests: the database's. Raises ServiceIdentityError if there is another one."""
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
        """The fleet."""
        from thrave.tasks.hosts import HostRegistry  # noqa: PLC0415 (see above)

        settings = self.settings
        return HostRegistry(
            self.database,
            self.records(),
            self.queues,
            heartbeat_interval=settings.heartbeat_interval,
            heartbeat_timeout=settings.heartbeat_timeout,
        )

    def records(self, fence: Fence | None = None) -> TaskRepository:
        """The bundle tasks; an agent gives its fence."""
        return TaskRepository(self.database, self.vault, fence)

    def open(self) -> None:
        """Open the database and the vault; the first time, make them and the service's identity.

        Raises:
            DataDirectoryError: All users share the data directory.
            DatabaseLostError: There is a vault key or an identity, but no database.
            DatabaseUnusableError: The database cannot be opened, is damaged, or was made by a newer release.
            VaultKeyError: The vault's key cannot be used, or is not the one that encrypted the database's secrets.
            ServiceIdentityError: The identity cannot be made.
            OSError: The data directory or a file in it cannot be used.
        """
        _ = self.database

    @cached_property
    def _opened(self) -> tuple[sa.Engine, Vault]:
        settings = self.settings
        if settings.failpoint:
            set_failpoint(settings.failpoint)
        root = _root(settings)
        with files.locked_folder(root), explained(settings):
            close_to_others(settings)
            if _has_no_tables(settings):
                _refuse_to_begin_anew(settings)
            database = open_engine(settings.database, timeout=self.database_timeout, replaced=self.replaced)
            migrate(database)
            return database, _open_vault(settings, database)

    def _holder(self, access_key_id: str) -> KeyOwner | None:
        key = self.accounts.find_key(access_key_id)
        if key is None or key.status != "Active":
            return None
        credentials = Credentials(access_key_id=key.access_key_id, secret_access_key=key.secret_access_key)
        return KeyOwner(key.account_id, credentials)


def open_components(settings: Settings) -> Components:
    """Open the database and the vault at once. Raises as `Components.open`."""
    ground = Components(settings)
    ground.open()
    return ground


def hold_data_directory(settings: Settings) -> files.HeldFile | None:
    """Refuse a second service on one SQLite database, for as long as this process lives.

    Agents of a fleet need none of it: who works for a host is decided by a lease in PostgreSQL.

    Returns:
        The lock, into which the address can be written; None with PostgreSQL.

    Args:
        settings: Where they are.
        database_timeout: Seconds for one statement on a server.

    Raises:
        DataDirectoryInUseError: A service runs on it; the message names its process.
        DataDirectoryError: All users share it.
        OSError: The lock cannot be made.
    """
    if settings.database_url is not None:
        return None
    directory = settings.directory
    _root(settings)
    try:
        return files.HeldFile(directory.lock)
    except files.FileHeldError as error:
        raise DataDirectoryInUseError(
            f"{directory.root} is in use: {error} runs on it. Stop that process, or give another --data-dir."
        ) from None


def _root(settings: Settings) -> Path:
    """The data directory, made if it is missing.

    Raises:
        DataDirectoryError: It is a folder that all users share, as /tmp; closed to others, no program of theirs works.
        OSError: It cannot be made.
    """
    root = settings.directory.root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if root.stat().st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH:
        raise DataDirectoryError(f"{root} is a folder that all users share. Give --data-dir a folder in it.")
    return root


def close_to_others(settings: Settings) -> None:
    """Take the rights of group and others from the data directory and what lies in it.

    Buckets as well: a bundle is handed out by copying it (`thrave copy`). Only a data directory of another user keeps
    its mode, since its owner decides.

    Raises:
        OpenToOthersError: A file or folder in it is open to others, and this user may not change that.
    """
    directory = settings.directory
    with suppress(files.OpenToOthersError):
        files.close_to_others(directory.root)
    database, buckets = directory.database_file, directory.buckets
    for path in (
        *(database.with_name(database.name + end) for end in ("", "-wal", "-shm")),
        directory.lock, directory.service, directory.locks,
        directory.instances, directory.instances / ".locks",
        buckets, buckets / ".owners", buckets / ".spool", *_folders(buckets),
    ):  # fmt: skip
        files.close_to_others(path)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """Raise DatabaseUnusableError, with what to do, for whatever the database refuses."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise explain(error, settings.database) from error


def _has_no_tables(settings: Settings) -> bool:
    """Whether the database is missing or empty. Makes nothing."""
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


def _refuse_to_begin_anew(settings: Settings) -> None:
    directory = settings.directory
    made_with_it = [directory.vault_key, directory.service]
    if settings.database_url is None:
        made_with_it += _files(directory.buckets / ".owners")
    for path in made_with_it:
        if path.exists():
            raise DatabaseLostError(
                f"the database {place(settings.database)} is missing or empty, but {path} is there, which was made "
                "with it. Restore the database from a backup. To begin anew, use an empty data directory."
            )


def _files(folder: Path) -> list[Path]:
    return [*folder.iterdir()] if folder.is_dir() else []


def _open_vault(settings: Settings, database: sa.Engine) -> Vault:
    """The vault, whose key is proved to be the database's; the first process makes key and identity.

    The proof is committed last: a start that is cut off before goes on with the files that it has made.
    """
    directory = settings.directory
    with database.begin() as connection:
        lock(connection)
        sealed = connection.execute(sa.select(vault_check.c.encrypted)).scalar()
        if sealed is None and not _has_secrets(connection):
            vault = Vault.open_or_create(directory.vault_key)
        elif directory.vault_key.exists():
            vault = Vault.open(directory.vault_key)
        else:
            raise VaultKeyError(
                f"{directory.vault_key} is missing, and the database has secrets that were encrypted with it: copy "
                "vault.key and service/ from a backup, or from the data directory of the process that was started first"
            )
        if sealed is None:
            identity = ServiceIdentity.open_or_create(directory.service)
            proof = {
                "id": 1,
                "encrypted": vault.encrypt(_PROOF, context=PROOF_CONTEXT),
                "identity": identity.fingerprint,
            }
            connection.execute(vault_check.insert(), proof)
            return vault
    try:
        vault.decrypt(sealed, context=PROOF_CONTEXT)
    except DecryptError:
        raise VaultKeyError(
            f"{directory.vault_key} is not the key that the database's secrets were encrypted with: copy vault.key and "
            "service/ from the data directory of the process that was started first"
        ) from None
    return vault


def _has_secrets(connection: sa.Connection) -> bool:
    return connection.execute(sa.select(access_key.c.access_key_id).limit(1)).first() is not None
