"""Accounts and access keys in the database, and a cache of access keys.

An account owns instances, bundle tasks and buckets. Its access keys and those of its users (`users.py`) sign requests
and upload policies. Names and limits are AWS IAM's. The vault encrypts each secret access key, bound to key id and
owner, so that a secret that is copied to another row cannot be decrypted. Permissions are in `policies.py`.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from thrave.concurrency import monotonic, new_lock, random_below, utc_now
from thrave.database import (
    access_key,
    account,
    bundle_part,
    bundle_task,
    iam_user,
    instance,
    task_in_progress,
    to_be_deleted,
)
from thrave.identity.certificates import certificate_pem, load_certificate
from thrave.identity.errors import DeleteConflict, EntityAlreadyExists, LimitExceeded, NoSuchEntity, ValidationError
from thrave.vault import Vault

MAX_KEYS_PER_OWNER = 2  # IAM's quota "access keys per user"

# A deleted or inactive key must stop working within a second, in every process. The rest of the second is for a thread
# that has read a key and adds it to the cache late.
CACHE_TIME = 0.9  # seconds
MAX_CACHED_KEYS = 4096

_ID_ALPHABET = string.ascii_uppercase + "234567"  # base32
_SECRET_ALPHABET = string.ascii_letters + string.digits + "+/"  # base64
_NAME = re.compile(r"[A-Za-z0-9+=,.@_-]{1,64}")  # as IAM's user names
_KEY_ID = re.compile(r"\w{3,32}", re.ASCII)
_SECRET = re.compile(r"[!-~]{8,128}")
# Context of the secret that is decrypted in place of the secret of an unknown key.
_DUMMY_CONTEXT = "access key of nobody"

Status = Literal["Active", "Inactive"]


@dataclass(frozen=True, kw_only=True)
class User:
    """A user of an account.

    Attributes:
        user_id: Unique id; unlike a name it is never used again.
        account_id: The user's account.
        user_name: Unique in the account, without regard to case.
        policy_version: Increases with every change of the user's policies.
        create_date: Time of creation in UTC.
    """

    user_id: str
    account_id: str
    user_name: str
    policy_version: int
    create_date: datetime

    @property
    def arn(self) -> str:
        """The user's Amazon Resource Name."""
        return f"arn:aws:iam::{self.account_id}:user/{self.user_name}"


@dataclass(frozen=True, kw_only=True)
class AccessKey:
    """An access key of an account, or of a user of the account. Requests of inactive keys must be refused."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    account_id: str
    status: Status
    create_date: datetime
    user: User | None = None


def new_access_key_id() -> str:
    """Generate an access key id: `AKIA` (a long-term key) and 16 characters, 80 random bits.

    Source: AWS IAM User Guide, "unique identifiers".
    """
    return "AKIA" + _random_text(_ID_ALPHABET, 16)


def new_user_id() -> str:
    """Generate a user id: `AIDA` and 16 characters."""
    return "AIDA" + _random_text(_ID_ALPHABET, 16)


def new_secret_access_key() -> str:
    """Generate a secret access key of 40 characters, 240 random bits."""
    return _random_text(_SECRET_ALPHABET, 40)


def new_account_id() -> str:
    """Generate an account id of 12 digits. The first is not 0, which programs that read a number would drop."""
    return str(random_below(9 * 10**11) + 10**11)


def _random_text(alphabet: str, length: int) -> str:
    return "".join(alphabet[random_below(len(alphabet))] for _ in range(length))


@dataclass(frozen=True, kw_only=True)
class Account:
    """An account. `certificate` is PEM; the account's bundles are also encrypted for it."""

    account_id: str
    name: str
    certificate: str | None
    create_date: datetime


class Accounts:
    """The accounts of this service. Safe for several threads and processes."""

    def __init__(self, engine: sa.Engine, vault: Vault) -> None:
        self._engine = engine
        self._vault = vault
        self._dummy_secret = vault.encrypt(new_secret_access_key().encode(), context=_DUMMY_CONTEXT)

    def create(self, name: str, certificate: str | None = None) -> tuple[Account, AccessKey]:
        """Create an account and its first access key.

        Args:
            name: 1 to 64 characters of `A-Za-z0-9+=,.@_-`, used by no other account.
            certificate: PEM X.509 certificate with an RSA key; its private key opens the account's bundles.

        Raises:
            ValidationError: The name is not valid.
            EntityAlreadyExists: Another account has the name.
            MalformedCertificate: Bundles cannot be encrypted for the certificate.
        """
        _check_name(name)
        pem = None if certificate is None else certificate_pem(load_certificate(certificate))
        new = Account(account_id=new_account_id(), name=name, certificate=pem, create_date=utc_now())
        with self._engine.begin() as connection:
            try:
                connection.execute(sa.insert(account).values(**vars(new)))
            except sa.exc.IntegrityError:
                raise _name_in_use(name) from None
            return new, self._insert_key(connection, new.account_id, None, _generate_key())

    def list(self) -> Sequence[Account]:
        """Return all accounts, sorted by name."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(account).order_by(account.c.name)).mappings()
            return [Account(**row) for row in rows]

    def get(self, account_id: str) -> Account:
        """Return the account with an id.

        Raises:
            NoSuchEntity: There is no such account.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(account).where(account.c.account_id == account_id)).mappings().first()
        if row is None:
            raise _no_such_account(account_id)
        return Account(**row)

    def rename(self, account_id: str, name: str) -> Account:
        """Give an account another name.

        Args:
            account_id: The account. Its id, keys, users, instances and bundles do not change.
            name: As for `create`.

        Raises:
            ValidationError: The name is not valid.
            NoSuchEntity: There is no such account.
            EntityAlreadyExists: Another account has the name.
        """
        _check_name(name)
        with self._engine.begin() as connection:
            _lock(connection, account_id)
            change = sa.update(account).where(account.c.account_id == account_id).values(name=name)
            try:
                connection.execute(change)
            except sa.exc.IntegrityError:
                raise _name_in_use(name) from None
        return self.get(account_id)

    def delete(self, account_id: str) -> None:
        """Delete an account with its access keys and users. Its buckets and the records of ended tasks stay.

        Raises:
            NoSuchEntity: There is no such account.
            DeleteConflict: The account has an unfinished task, objects that a task must still delete, or an instance
                that a host has reported.
        """
        of_account = sa.or_(bundle_task.c.account_id == account_id, bundle_task.c.owner_id == account_id)
        has_orphans = sa.exists().where(bundle_part.c.bundle_id == bundle_task.c.bundle_id, to_be_deleted)
        tasks = sa.select(bundle_task.c.bundle_id).where(of_account, sa.or_(task_in_progress, has_orphans)).limit(1)
        instances = sa.select(instance.c.instance_id).where(instance.c.account_id == account_id).limit(1)
        with self._engine.begin() as connection:
            _lock(connection, account_id)
            if (task := connection.execute(tasks).scalar()) is not None:
                raise DeleteConflict(
                    f"The account {account_id} is in use by task {task}: it is unfinished, or objects of it must still "
                    "be deleted with the account's key. Wait, or cancel the task first (thrave task cancel)."
                )
            if (instance_id := connection.execute(instances).scalar()) is not None:
                raise instance_conflict(account_id, instance_id)
            for table in (access_key, iam_user, account):
                connection.execute(sa.delete(table).where(table.c.account_id == account_id))

    def key_ids(self) -> Sequence[str]:
        """Return the ids of all access keys of accounts and users."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(access_key.c.access_key_id)).scalars().all()

    def create_key(self, account_id: str, user: User | None = None) -> AccessKey:
        """Create an access key for an account, or for a user of the account.

        Raises:
            NoSuchEntity: The account does not exist, or the user was deleted.
            LimitExceeded: The account or user already has two keys.
        """
        return self._add_key(account_id, user, _generate_key())

    def import_key(self, account_id: str, access_key_id: str, secret_access_key: str) -> AccessKey:
        """Add an existing access key, which the object store of the account's buckets has, to an account.

        Raises:
            ValidationError: Id or secret is not valid.
            NoSuchEntity: There is no such account.
            EntityAlreadyExists: There is a key with that id.
            LimitExceeded: The account already has two keys.
        """
        if not _KEY_ID.fullmatch(access_key_id) or not _SECRET.fullmatch(secret_access_key):
            raise ValidationError("An access key id has 3 to 32 characters of A-Z a-z 0-9 _, its secret 8 to 128")
        return self._add_key(account_id, None, (access_key_id, secret_access_key))

    def _add_key(self, account_id: str, user: User | None, pair: tuple[str, str]) -> AccessKey:
        count = sa.select(sa.func.count()).select_from(access_key).where(_owned_by(account_id, user))
        with self._engine.begin() as connection:
            _lock(connection, account_id)
            key = self._insert_key(connection, account_id, user, pair)
            if connection.execute(count).scalar_one() > MAX_KEYS_PER_OWNER:
                raise LimitExceeded(
                    f"Cannot exceed quota for AccessKeysPer{'User' if user else 'Account'}: {MAX_KEYS_PER_OWNER};"
                    " delete one first"
                )
            return key

    def delete_key(self, access_key_id: str) -> None:
        """Delete an access key.

        Raises:
            NoSuchEntity: There is no such key.
        """
        with self._engine.begin() as connection:
            deleted = connection.execute(sa.delete(access_key).where(access_key.c.access_key_id == access_key_id))
            if deleted.rowcount == 0:
                raise NoSuchEntity(f"The Access Key with id {access_key_id} cannot be found.")

    def list_keys(self, account_id: str, user: User | None = None) -> Sequence[AccessKey]:
        """Return the access keys of an account itself, or of one user, oldest first.

        Raises:
            DecryptError: A secret was encrypted by another vault.
        """
        query = _KEYS.where(_owned_by(account_id, user)).order_by(access_key.c.create_date)
        with self._engine.connect() as connection:
            return [self._decrypt_key(row) for row in connection.execute(query).mappings()]

    def find_key(self, access_key_id: str) -> AccessKey | None:
        """Return the access key with an id, also an inactive one; None if there is none.

        Raises:
            DecryptError: The secret was encrypted by another vault.
        """
        query = _KEYS.where(access_key.c.access_key_id == access_key_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:  # the same work, so that the time does not show whether the key exists
            self._vault.decrypt(self._dummy_secret, context=_DUMMY_CONTEXT)
            return None
        return self._decrypt_key(row)

    def _insert_key(
        self, connection: sa.Connection, account_id: str, user: User | None, pair: tuple[str, str]
    ) -> AccessKey:
        access_key_id, secret_access_key = pair
        key = AccessKey(
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            account_id=account_id,
            status="Active",
            create_date=utc_now(),
            user=user,
        )
        user_id = None if user is None else user.user_id
        context = _context(key.access_key_id, account_id, user_id)
        row = {
            "access_key_id": key.access_key_id,
            "account_id": account_id,
            "user_id": user_id,
            "encrypted_secret": self._vault.encrypt(key.secret_access_key.encode(), context=context),
            "status": key.status,
            "create_date": key.create_date,
        }
        try:
            connection.execute(sa.insert(access_key).values(**row))
        except sa.exc.IntegrityError:
            if user is None:
                raise EntityAlreadyExists(f"Access Key with id {access_key_id} already exists.") from None
            raise NoSuchEntity("The user who was to have the access key was deleted.") from None
        return key

    def _decrypt_key(self, row: sa.RowMapping) -> AccessKey:
        context = _context(row["access_key_id"], row["account_id"], row["user_id"])
        return AccessKey(
            access_key_id=row["access_key_id"],
            secret_access_key=self._vault.decrypt(row["encrypted_secret"], context=context).decode("ascii"),
            account_id=row["account_id"],
            status=row["status"],
            create_date=row["create_date"],
            user=None if row["user_id"] is None else _to_user(row),
        )


# Access keys with their users.
_KEYS = sa.select(
    access_key, iam_user.c.user_name, iam_user.c.policy_version, iam_user.c.create_date.label("user_create_date")
).select_from(access_key.outerjoin(iam_user, access_key.c.user_id == iam_user.c.user_id))


def _generate_key() -> tuple[str, str]:
    return new_access_key_id(), new_secret_access_key()


def _to_user(row: sa.RowMapping) -> User:
    return User(
        user_id=row["user_id"],
        account_id=row["account_id"],
        user_name=row["user_name"],
        policy_version=row["policy_version"],
        create_date=row["user_create_date"],
    )


def _owned_by(account_id: str, user: User | None) -> sa.ColumnElement[bool]:
    by_user = access_key.c.user_id.is_(None) if user is None else access_key.c.user_id == user.user_id
    return sa.and_(access_key.c.account_id == account_id, by_user)


def _lock(connection: sa.Connection, account_id: str) -> None:
    # Of two keys that are created at once, the second must see the first. (SQLite has no row locks, but one writer.)
    query = sa.select(account.c.account_id).where(account.c.account_id == account_id).with_for_update()
    if connection.execute(query).first() is None:
        raise _no_such_account(account_id)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValidationError("An account's name has 1 to 64 characters of A-Z a-z 0-9 + = , . @ _ -")


def _name_in_use(name: str) -> EntityAlreadyExists:
    return EntityAlreadyExists(f"Account with name {name} already exists.")


def instance_conflict(account_id: str, instance_id: str) -> DeleteConflict:
    """Return the error for an account that cannot be deleted because of an instance."""
    return DeleteConflict(
        f"The account {account_id} has the instance {instance_id}. Remove its instances first (thrave instance remove "
        "or disown)."
    )


def _no_such_account(account_id: str) -> NoSuchEntity:
    return NoSuchEntity(f"The account with id {account_id} cannot be found.")


def _context(access_key_id: str, account_id: str, user_id: str | None) -> str:
    owner = f"account {account_id}" if user_id is None else f"user {user_id} of account {account_id}"
    return f"access key {access_key_id} of {owner}"


class KeyCache:
    """Access keys that signed a request recently, so that the next request need not read the database. Thread-safe.

    Only keys with a verified signature are added, so unknown keys cost no memory, and the response time does not show
    whether a key exists. Using a key does not extend its time in the cache.

    Args:
        clock: Monotonic time in seconds.
        max_keys: Maximum number of keys.
    """

    def __init__(self, clock: Callable[[], float] = monotonic, *, max_keys: int = MAX_CACHED_KEYS) -> None:
        self._clock = clock
        self._max_keys = max_keys
        self._entries: dict[str, tuple[float, AccessKey]] = {}  # id to expiry and key, oldest first
        self._lock = new_lock()

    def find(self, access_key_id: str) -> AccessKey | None:
        """Return the key if it was added less than `CACHE_TIME` ago."""
        entry = self._entries.get(access_key_id)
        return entry[1] if entry and self._clock() < entry[0] else None

    def add(self, key: AccessKey) -> None:
        """Add a key that has signed a request and was just read from the database."""
        if self.find(key.access_key_id):
            return
        with self._lock:
            self._entries.pop(key.access_key_id, None)
            if len(self._entries) >= self._max_keys:
                del self._entries[next(iter(self._entries))]
            self._entries[key.access_key_id] = (self._clock() + CACHE_TIME, key)
