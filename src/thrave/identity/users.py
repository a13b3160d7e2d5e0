"""Users of accounts, and their policies, in the database.

A user has a name, at most two access keys (`Accounts.create_key`) and inline policies in IAM's JSON language. Names and
quotas are IAM's (IAM User Guide, "IAM and AWS STS quotas"): names ignore case, and all policies of a user together have
at most 2048 characters. `policies.py` parses policies and decides.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain

import sqlalchemy as sa
import structlog

from thrave.concurrency import utc_now
from thrave.database import account, iam_user, user_policy
from thrave.identity.accounts import User, new_user_id
from thrave.identity.errors import (
    EntityAlreadyExists,
    LimitExceeded,
    MalformedPolicyDocument,
    NoSuchEntity,
    ValidationError,
)
from thrave.identity.policies import MAX_CHARACTERS, Statement, count_characters, parse_policy

_NAME = re.compile(r"[A-Za-z0-9+=,.@_-]+")
_MAX_USER_NAME = 64  # characters
_MAX_POLICY_NAME = 128  # characters
_MAX_CACHED_USERS = 1024  # with parsed policies

log = structlog.get_logger()


class Users:
    """The users of all accounts. Safe for several threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        # Parsed once per version. The version comes with the access key, so a change takes effect in every process as
        # soon as the key is read again: within a second (`KeyCache`).
        self._cached_statements = lru_cache(_MAX_CACHED_USERS)(self._parse_policies)

    def create(self, account_id: str, user_name: str) -> User:
        """Create a user without permissions.

        Args:
            account_id: The account.
            user_name: 1 to 64 characters of `A-Za-z0-9+=,.@_-`.

        Raises:
            ValidationError: The name is not valid.
            NoSuchEntity: There is no such account.
            EntityAlreadyExists: The account has a user with that name; case is ignored.
        """
        _check_name("A user's name", user_name, _MAX_USER_NAME)
        user = User(
            user_id=new_user_id(),
            account_id=account_id,
            user_name=user_name,
            policy_version=0,
            create_date=utc_now(),
        )
        with self._engine.begin() as connection:
            if connection.execute(sa.select(account).where(account.c.account_id == account_id)).first() is None:
                raise NoSuchEntity(f"The account with id {account_id} cannot be found.")
            try:
                connection.execute(sa.insert(iam_user).values(**vars(user)))
            except sa.exc.IntegrityError:
                raise EntityAlreadyExists(f"User with name {user_name} already exists.") from None
        return user

    def list(self, account_id: str) -> Sequence[User]:
        """Return the users of an account, sorted by name."""
        query = sa.select(iam_user).where(iam_user.c.account_id == account_id).order_by(iam_user.c.user_name)
        with self._engine.connect() as connection:
            return [User(**row) for row in connection.execute(query).mappings()]

    def get(self, account_id: str, user_name: str) -> User:
        """Return a user by name.

        Raises:
            NoSuchEntity: There is no such user.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(iam_user).where(_has_name(account_id, user_name))).mappings().first()
        if row is None:
            raise _no_such_user(user_name)
        return User(**row)

    def delete(self, account_id: str, user_name: str) -> None:
        """Delete a user with all access keys and policies.

        Raises:
            NoSuchEntity: There is no such user.
        """
        with self._engine.begin() as connection:
            deleted = connection.execute(sa.delete(iam_user).where(_has_name(account_id, user_name)))
            if deleted.rowcount == 0:
                raise _no_such_user(user_name)

    def put_policy(self, account_id: str, user_name: str, policy_name: str, document: str) -> None:
        """Store a policy of a user, and replace one with the same name.

        Args:
            account_id: The account.
            user_name: The user.
            policy_name: 1 to 128 characters of `A-Za-z0-9+=,.@_-`.
            document: The policy, JSON.

        Raises:
            ValidationError: The policy's name is not valid.
            MalformedPolicyDocument: The policy has a part that is not supported.
            NoSuchEntity: There is no such user.
            LimitExceeded: The user's policies would have too many characters.
        """
        _check_name("A policy's name", policy_name, _MAX_POLICY_NAME)
        parse_policy(document)
        with self._engine.begin() as connection:
            user_id = _increase_version(connection, account_id, user_name)
            connection.execute(sa.delete(user_policy).where(_has_policy_name(user_id, policy_name)))
            new = {"user_id": user_id, "policy_name": policy_name, "document": document}
            connection.execute(sa.insert(user_policy).values(**new))
            if sum(map(count_characters, _read_documents(connection, user_id).values())) > MAX_CHARACTERS:
                raise LimitExceeded(f"Maximum policy size of {MAX_CHARACTERS} bytes exceeded for user {user_name}")

    def delete_policy(self, account_id: str, user_name: str, policy_name: str) -> None:
        """Delete a policy of a user.

        Raises:
            NoSuchEntity: There is no such user or policy.
        """
        with self._engine.begin() as connection:
            user_id = _increase_version(connection, account_id, user_name)
            deleted = connection.execute(sa.delete(user_policy).where(_has_policy_name(user_id, policy_name)))
            if deleted.rowcount == 0:
                raise _no_such_policy(policy_name)

    def policies(self, account_id: str, user_name: str) -> Mapping[str, str]:
        """Return the documents of a user's policies by name, as they were stored.

        Raises:
            NoSuchEntity: There is no such user.
        """
        user = self.get(account_id, user_name)
        with self._engine.connect() as connection:
            return _read_documents(connection, user.user_id)

    def policy(self, account_id: str, user_name: str, policy_name: str) -> str:
        """Return the document of a user's policy, as it was stored.

        Raises:
            NoSuchEntity: There is no such user or policy.
        """
        try:
            return self.policies(account_id, user_name)[policy_name]
        except KeyError:
            raise _no_such_policy(policy_name) from None

    def statements(self, user: User) -> tuple[Statement, ...]:
        """Return all statements of a user's policies, of `user.policy_version` or a later version."""
        return self._cached_statements(user)

    def _parse_policies(self, user: User) -> tuple[Statement, ...]:
        with self._engine.connect() as connection:
            documents = _read_documents(connection, user.user_id)
        try:
            return tuple(chain.from_iterable(map(parse_policy, documents.values())))
        except MalformedPolicyDocument as error:  # changed in the database, or stored by a newer version
            log.error("invalid user policy, all requests denied", user_id=user.user_id, reason=str(error))  # noqa: TRY400 (the reason is enough)
            return ()


def _increase_version(connection: sa.Connection, account_id: str, user_name: str) -> str:
    """Increase the version of a user's policies; return the user's id."""
    values = {iam_user.c.policy_version: iam_user.c.policy_version + 1}
    query = sa.update(iam_user).where(_has_name(account_id, user_name)).values(values).returning(iam_user.c.user_id)
    user_id = connection.execute(query).scalar_one_or_none()
    if user_id is None:
        raise _no_such_user(user_name)
    return str(user_id)


def _read_documents(connection: sa.Connection, user_id: str) -> dict[str, str]:
    query = sa.select(user_policy).where(user_policy.c.user_id == user_id).order_by(user_policy.c.policy_name)
    return {row.policy_name: row.document for row in connection.execute(query)}


def _has_name(account_id: str, user_name: str) -> sa.ColumnElement[bool]:
    return sa.and_(iam_user.c.account_id == account_id, sa.func.lower(iam_user.c.user_name) == user_name.lower())


def _has_policy_name(user_id: str, policy_name: str) -> sa.ColumnElement[bool]:
    return sa.and_(user_policy.c.user_id == user_id, user_policy.c.policy_name == policy_name)


def _check_name(subject: str, name: str, max_characters: int) -> None:
    if not _NAME.fullmatch(name) or len(name) > max_characters:
        raise ValidationError(f"{subject} has 1 to {max_characters} characters of A-Z a-z 0-9 + = , . @ _ -")


def _no_such_user(user_name: str) -> NoSuchEntity:
    return NoSuchEntity(f"The user with name {user_name} cannot be found.")


def _no_such_policy(policy_name: str) -> NoSuchEntity:
    return NoSuchEntity(f"The user policy with name {policy_name} cannot be found.")
