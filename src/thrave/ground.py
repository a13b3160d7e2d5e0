"""What every process of the service stands on: the database, the vault, the queues, the buckets and the identity.

Opened from the settings, and made where it is not there yet. Processes on several machines share the database; each has
a copy of the vault's key and of the service's identity in its own data directory, and is refused if it has others.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING

import sqlalchemy as sa

from thrave.buckets.buckets import Buckets
from thrave.buckets.connection import Credentials
from thrave.buckets.opening import open_buckets
from thrave.buckets.s3 import Holder
from thrave.compute.instances import Instances
from thrave.compute.opening import open_instances
from thrave.config import Settings
from thrave.database import TIMEOUT, migrate, open_engine, vault_proof
from thrave.identity.accounts import Accounts
from thrave.identity.service import ServiceIdentity
from thrave.tasks.crash_points import crash_at
from thrave.tasks.fence import Fence
from thrave.tasks.records import Records
from thrave.vault import SealError, Vault, VaultKeyError

if TYPE_CHECKING:  # the engine takes longer to import than most commands take to run
    from thrave.tasks.engine import Queues
    from thrave.tasks.hosts import Hosts

_PROOF = b"thrave"
PROOF_CONTEXT = "vault proof"


@dataclass(frozen=True)
class Ground:
    """The rooms that a process is put together from; each is opened when it is first asked for."""

    settings: Settings
    database: sa.Engine
    vault: Vault

    @cached_property
    def accounts(self) -> Accounts:
        """Who may sign requests."""
        return Accounts(self.database, self.vault)

    @cached_property
    def queues(self) -> "Queues":
        """Where tasks are handed to hosts."""
        from thrave.tasks.engine import Queues  # noqa: PLC0415 (see above)

        return Queues(self.settings.database)

    @cached_property
    def buckets(self) -> Buckets:
        """Where bundles go."""
        return open_buckets(self.settings, self._holder)

    @cached_property
    def instances(self) -> Instances:
        """The instances of this machine."""
        return open_instances(self.settings)

    @cached_property
    def service(self) -> ServiceIdentity:
        """Who signs manifests."""
        return ServiceIdentity.open_or_create(self.settings.directory.service)

    @cached_property
    def hosts(self) -> "Hosts":
        """The fleet."""
        from thrave.tasks.hosts import Hosts  # noqa: PLC0415 (see above)

        lost_after = timedelta(seconds=self.settings.host_lost_after)
        return Hosts(self.database, self.records(), self.queues, lost_after=lost_after)

    def records(self, fence: Fence | None = None) -> Records:
        """The bundle tasks; an agent gives its fence."""
        return Records(self.database, self.vault, fence)

    def _holder(self, access_key_id: str) -> Holder | None:
        key = self.accounts.find_key(access_key_id)
        if key is None or key.status != "Active":
            return None
        credentials = Credentials(access_key_id=key.access_key_id, secret_access_key=key.secret_access_key)
        return Holder(key.account_id, credentials)


def open_ground(settings: Settings, *, database_timeout: float = TIMEOUT) -> Ground:
    """Open the database and the vault in the data directory, making what is not there yet.

    Args:
        settings: Where they are.
        database_timeout: Seconds for one statement on a server.

    Raises:
        VaultKeyError: The vault's key cannot be used, or is not the one that the database's secrets were sealed with.
    """
    if settings.crash_at:
        crash_at(settings.crash_at)
    directory = settings.directory
    directory.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = open_engine(settings.database, timeout=database_timeout)
    migrate(database)
    vault = Vault.open_or_create(directory.vault_key)
    _prove(database, vault)
    return Ground(settings, database, vault)


def _prove(database: sa.Engine, vault: Vault) -> None:
    """See that the vault's key is the database's; the first one to come makes it so."""
    try:
        with database.begin() as connection:
            sealed = connection.execute(sa.select(vault_proof.c.sealed)).scalar()
            if sealed is None:
                proof = {"only": 1, "sealed": vault.seal(_PROOF, context=PROOF_CONTEXT)}
                connection.execute(vault_proof.insert(), proof)
            else:
                vault.unseal(sealed, context=PROOF_CONTEXT)
    except sa.exc.IntegrityError:  # another process was quicker
        _prove(database, vault)
    except SealError:
        raise VaultKeyError(
            "the database's secrets were sealed with another vault's key: copy vault.key and service/ "
            "from the data directory of the process that was started first"
        ) from None
