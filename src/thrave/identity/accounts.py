"""Access keys as AWS makes them: an id that may be seen, and a secret that signs; and the user whose one may be.

The id begins with `AKIA` (a long-term key; AWS IAM's documentation, "unique identifiers") and has 16 more characters
of base32; the secret is 40 characters of base64's alphabet, 240 random bits. Nothing here is stored.

Accounts and their access keys, kept in the database.

An account owns instances, bundle tasks and buckets; its access keys, and those of its users (`users.py`), sign requests
and upload policies. The names and limits are AWS IAM's (a unique name, at most two access keys each). A secret access
key is stored sealed by the vault, bound to its key's id and owner, and comes out only to check a signature: a stolen
database gives none away, and a sealed secret that somebody moved to another row, or a user's key that somebody made an
account's, does not open. Who may do what is not decided here.

Access keys that have just signed a request, so that a client's next one need not ask the database again.

A key is kept for less than a second, whatever it signs meanwhile: one that is deleted or made inactive in the database
stops working within a second, in every process. Only keys that have proved a signature are kept, and only so many:
a million unknown ones cost nothing here, and nobody learns from our haste whether a key exists.
"""

import re
import secrets
import string
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from thrave.database import access_key, account, iam_user, utc_now
from thrave.identity.certificates import certificate_pem, load_certificate
from thrave.identity.errors import EntityAlreadyExists, LimitExceeded, NoSuchEntity, ValidationError
from thrave.vault import Vault

_ID_ALPHABET = string.ascii_uppercase + "234567"


_SECRET_ALPHABET = string.ascii_letters + string.digits + "+/"


Status = Literal["Active", "Inactive"]


@dataclass(frozen=True, kw_only=True)
class User:
    """A user of an account.

    Attributes:
        user_id: Never given again, as a name may be.
        account_id: The account that the user acts for.
        user_name: Unique in the account, without regard to case.
        policy_version: Another number after every change of the user's policies.
        create_date: In UTC.
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
    """An access key of an account, or of a user of it; an inactive one must not be let in."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    account_id: str
    status: Status
    create_date: datetime
    user: User | None = None


def new_access_key_id() -> str:
    """Draw an access key id: `AKIA` and 16 characters, 80 random bits."""
    return "AKIA" + _draw(_ID_ALPHABET, 16)


def new_user_id() -> str:
    """Draw a user's id: `AIDA` and 16 characters."""
    return "AIDA" + _draw(_ID_ALPHABET, 16)


def new_secret_access_key() -> str:
    """Draw a secret access key of 40 characters, 240 random bits."""
    return _draw(_SECRET_ALPHABET, 40)


def new_account_id() -> str:
    """Draw an account id: 12 digits, the first not 0, so that nothing that takes it for a number cuts it short."""
    return str(secrets.randbelow(9 * 10**11) + 10**11)


def _draw(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


KEYS_PER_OWNER = 2  # IAM's quota "access keys per user"


_NOBODY = "access key of nobody"


_NAME = re.compile(r"[A-Za-z0-9+=,.@_-]{1,64}")  # as IAM's user names


_KEY_ID = re.compile(r"\w{3,32}", re.ASCII)


_SECRET = re.compile(r"[!-~]{8,128}")


@dataclass(frozen=True, kw_only=True)
class Account:
    """An account; `certificate` is PEM, and bundles of the account are also encrypted to it."""

    account_id: str
    name: str
    certificate: str | None
    create_date: datetime


class Accounts:
    """The accounts of this service. Safe to use from several threads and processes."""

    def __init__(self, engine: sa.Engine, vault: Vault) -> None:
        self._engine = engine
        self._vault = vault
        self._nobodys_secret = vault.encrypt(new_secret_access_key().encode(), context=_NOBODY)

    def create(self, name: str, certificate: str | None = None) -> tuple[Account, AccessKey]:
        """Create an account and its first access key.

        Args:
            name: 1 to 64 characters of `A-Za-z0-9+=,.@_-`, used by no other account.
            certificate: PEM X.509 certificate with an RSA key; its owner's private key will open the bundles.

        Raises:
            ValidationError: The name may not be given.
            EntityAlreadyExists: It is taken.
            MalformedCertificate: The certificate is not one that bundles can be encrypted to.
        """
        if not _NAME.fullmatch(name):
            raise ValidationError("An account's name has 1 to 64 characters of A-Z a-z 0-9 + = , . @ _ -")
        pem = None if certificate is None else certificate_pem(load_certificate(certificate))
        new = Account(account_id=new_account_id(), name=name, certificate=pem, create_date=utc_now())
        with self._engine.begin() as connection:
            try:
                connection.execute(sa.insert(account).values(**vars(new)))
            except sa.exc.IntegrityError:
                raise EntityAlreadyExists(f"Account with name {name} already exists.") from None
            return new, self._insert_key(connection, new.account_id, None, _new_pair())

    def list(self) -> Sequence[Account]:
        """All accounts, by name."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(account).order_by(account.c.name)).mappings()
            return [Account(**row) for row in rows]

    def get(self, account_id: str) -> Account:
        """The account with an id.

        Raises:
            NoSuchEntity: There is none.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(account).where(account.c.account_id == account_id)).mappings().first()
        if row is None:
            raise _no_such_account(account_id)
        return Account(**row)

    def create_key(self, account_id: str, user: User | None = None) -> AccessKey:
        """Give an account, or a user of it, another access key.

        Raises:
            NoSuchEntity: There is no such account, or no longer such a user.
            LimitExceeded: There are two.
        """
        return self._add_key(account_id, user, _new_pair())

    def import_key(self, account_id: str, access_key_id: str, secret_access_key: str) -> AccessKey:
        """Give an account an access key that it has elsewhere: one that the store of its buckets knows.

        Raises:
            ValidationError: No access key is like this.
            NoSuchEntity: There is no such account.
            EntityAlreadyExists: There is a key with that id.
            LimitExceeded: The account has two.
        """
        if not _KEY_ID.fullmatch(access_key_id) or not _SECRET.fullmatch(secret_access_key):
            raise ValidationError("An access key id has 3 to 32 characters of A-Z a-z 0-9 _, its secret 8 to 128")
        return self._add_key(account_id, None, (access_key_id, secret_access_key))

    def _add_key(self, account_id: str, user: User | None, pair: tuple[str, str]) -> AccessKey:
        count = sa.select(sa.func.count()).select_from(access_key).where(_owned_by(account_id, user))
        with self._engine.begin() as connection:
            _lock(connection, account_id)
            key = self._insert_key(connection, account_id, user, pair)
            if connection.execute(count).scalar_one() > KEYS_PER_OWNER:
                raise LimitExceeded(
                    f"Cannot exceed quota for AccessKeysPer{'User' if user else 'Account'}: {KEYS_PER_OWNER};"
                    " delete one first"
                )
            return key

    def delete_key(self, access_key_id: str) -> None:
        """Take an access key away for good.

        Raises:
            NoSuchEntity: There is no such key.
        """
        with self._engine.begin() as connection:
            deleted = connection.execute(sa.delete(access_key).where(access_key.c.access_key_id == access_key_id))
            if deleted.rowcount == 0:
                raise NoSuchEntity(f"The Access Key with id {access_key_id} cannot be found.")

    def list_keys(self, account_id: str, user: User | None = None) -> Sequence[AccessKey]:
        """The access keys of an account itself, or of a user of it, oldest first.

        Raises:
            SealError: A secret was sealed by another vault.
        """
        query = _KEYS.where(_owned_by(account_id, user)).order_by(access_key.c.create_date)
        with self._engine.connect() as connection:
            return [self._opened(row) for row in connection.execute(query).mappings()]

    def find_key(self, access_key_id: str) -> AccessKey | None:
        """The access key with an id, or None; an inactive one is found too.

        Raises:
            SealError: Its secret was sealed by another vault.
        """
        query = _KEYS.where(access_key.c.access_key_id == access_key_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:  # the same work, so that nobody can tell by the time
            self._vault.decrypt(self._nobodys_secret, context=_NOBODY)
            return None
        return self._opened(row)

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

    def _opened(self, row: sa.RowMapping) -> AccessKey:
        context = _context(row["access_key_id"], row["account_id"], row["user_id"])
        return AccessKey(
            access_key_id=row["access_key_id"],
            secret_access_key=self._vault.decrypt(row["encrypted_secret"], context=context).decode("ascii"),
            account_id=row["account_id"],
            status=row["status"],
            create_date=row["create_date"],
            user=None if row["user_id"] is None else _user(row),
        )


# An access key, with the user whose it is.
_KEYS = sa.select(
    access_key, iam_user.c.user_name, iam_user.c.policy_version, iam_user.c.create_date.label("user_create_date")
).select_from(access_key.outerjoin(iam_user, access_key.c.user_id == iam_user.c.user_id))


def _new_pair() -> tuple[str, str]:
    return new_access_key_id(), new_secret_access_key()


def _user(row: sa.RowMapping) -> User:
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
    # Two keys that are created at once must not both see room for one. (SQLite has no row locks, but one writer.)
    query = sa.select(account.c.account_id).where(account.c.account_id == account_id).with_for_update()
    if connection.execute(query).first() is None:
        raise _no_such_account(account_id)


def _no_such_account(account_id: str) -> NoSuchEntity:
    return NoSuchEntity(f"The account with id {account_id} cannot be found.")


def _context(access_key_id: str, account_id: str, user_id: str | None) -> str:
    owner = f"account {account_id}" if user_id is None else f"user {user_id} of account {account_id}"
    return f"access key {access_key_id} of {owner}"


LIFE = 0.9  # seconds; what is missing to one is for the thread that has read a key and is slow to remember it


LIMIT = 4096  # keys


class KeyCache:
    """The keys of the last moment, in memory. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, limit: int = LIMIT) -> None:
        """Keep at most `limit` keys, by a clock of seconds."""
        self._clock = clock
        self._limit = limit
        self._kept: dict[str, tuple[float, AccessKey]] = {}  # with the time until which it is good; the oldest first
        self._lock = threading.Lock()

    def find(self, access_key_id: str) -> AccessKey | None:
        """The key, if it was first remembered within the last moment."""
        kept = self._kept.get(access_key_id)
        return kept[1] if kept and self._clock() < kept[0] else None

    def remember(self, key: AccessKey) -> None:
        """Keep a key that has signed a request, as the database has just given it."""
        if self.find(key.access_key_id):
            return
        with self._lock:
            self._kept.pop(key.access_key_id, None)
            if len(self._kept) >= self._limit:
                del self._kept[next(iter(self._kept))]
            self._kept[key.access_key_id] = (self._clock() + LIFE, key)
