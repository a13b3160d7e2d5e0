"""Users below an account, and the policies that say what each may do.

A user has a name, at most two access keys (`Accounts.create_key`) and inline policies in IAM's JSON language. A policy
is stored only if every word of it is understood. `statements` gives a user's policies ready to be decided on; they are
compiled once for each version of them, and the version comes with the access key, so that a change counts as soon as
the key is looked up again (`recent.py`: within a second), in every process. What the policies permit is decided in
`decisions.py`.

Names and quotas are IAM's (IAM User Guide, "IAM and AWS STS quotas"): user names are told apart without case, and all
policies of a user together have at most 2048 characters.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain

import sqlalchemy as sa
import structlog

from thrave.database import account, iam_user, user_policy, utc_now
from thrave.identity.accounts import User, new_user_id
from thrave.identity.errors import (
    EntityAlreadyExists,
    LimitExceeded,
    MalformedPolicyDocument,
    NoSuchEntity,
    ValidationError,
)
from thrave.identity.policies import CHARACTERS, Statement, length, parse_policy

_NAME = re.compile(r"[A-Za-z0-9+=,.@_-]+")
_USER_NAME_CHARACTERS = 64
_POLICY_NAME_CHARACTERS = 128
_USERS_AT_HAND = 1024  # whose compiled policies are kept

log = structlog.get_logger()


class Users:
    """The users of every account. Safe to use from several threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._compiled = lru_cache(_USERS_AT_HAND)(self._compile)

    def create(self, account_id: str, user_name: str) -> User:
        """Create a user, who may do nothing yet.

        Args:
            account_id: The account.
            user_name: 1 to 64 characters of `A-Za-z0-9+=,.@_-`.

        Raises:
            ValidationError: The name may not be given.
            NoSuchEntity: There is no such account.
            EntityAlreadyExists: The account has a user of that name, perhaps in other case.
        """
        _check_name("A user's name", user_name, _USER_NAME_CHARACTERS)
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
        """The users of an account, by name."""
        query = sa.select(iam_user).where(iam_user.c.account_id == account_id).order_by(iam_user.c.user_name)
        with self._engine.connect() as connection:
            return [User(**row) for row in connection.execute(query).mappings()]

    def get(self, account_id: str, user_name: str) -> User:
        """A user by name.

        Raises:
            NoSuchEntity: There is no such user.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(iam_user).where(_named(account_id, user_name))).mappings().first()
        if row is None:
            raise _no_such_user(user_name)
        return User(**row)

    def delete(self, account_id: str, user_name: str) -> None:
        """Take a user away, with every access key and policy.

        Raises:
            NoSuchEntity: There is no such user.
        """
        with self._engine.begin() as connection:
            deleted = connection.execute(sa.delete(iam_user).where(_named(account_id, user_name)))
            if deleted.rowcount == 0:
                raise _no_such_user(user_name)

    def put_policy(self, account_id: str, user_name: str, policy_name: str, document: str) -> None:
        """Store a policy of a user, in place of one of the same name.

        Args:
            account_id: The account.
            user_name: The user.
            policy_name: 1 to 128 characters of `A-Za-z0-9+=,.@_-`.
            document: The policy, JSON.

        Raises:
            ValidationError: The policy may not have that name.
            MalformedPolicyDocument: The policy is not fully understood.
            NoSuchEntity: There is no such user.
            LimitExceeded: The user's policies would have too many characters.
        """
        _check_name("A policy's name", policy_name, _POLICY_NAME_CHARACTERS)
        parse_policy(document)
        with self._engine.begin() as connection:
            user_id = _note_change(connection, account_id, user_name)
            connection.execute(sa.delete(user_policy).where(_policy(user_id, policy_name)))
            new = {"user_id": user_id, "policy_name": policy_name, "document": document}
            connection.execute(sa.insert(user_policy).values(**new))
            if sum(map(length, _documents(connection, user_id).values())) > CHARACTERS:
                raise LimitExceeded(f"Maximum policy size of {CHARACTERS} bytes exceeded for user {user_name}")

    def delete_policy(self, account_id: str, user_name: str, policy_name: str) -> None:
        """Take a policy of a user away.

        Raises:
            NoSuchEntity: There is no such user or policy.
        """
        with self._engine.begin() as connection:
            user_id = _note_change(connection, account_id, user_name)
            deleted = connection.execute(sa.delete(user_policy).where(_policy(user_id, policy_name)))
            if deleted.rowcount == 0:
                raise _no_such_policy(policy_name)

    def policies(self, account_id: str, user_name: str) -> Mapping[str, str]:
        """The policies of a user, as they were given, by name.

        Raises:
            NoSuchEntity: There is no such user.
        """
        user = self.get(account_id, user_name)
        with self._engine.connect() as connection:
            return _documents(connection, user.user_id)

    def policy(self, account_id: str, user_name: str, policy_name: str) -> str:
        """A policy of a user, as it was given.

        Raises:
            NoSuchEntity: There is no such user or policy.
        """
        try:
            return self.policies(account_id, user_name)[policy_name]
        except KeyError:
            raise _no_such_policy(policy_name) from None

    def statements(self, user: User) -> tuple[Statement, ...]:
        """All statements of a user's policies, of the version that the user has or a later one."""
        return self._compiled(user)

    def _compile(self, user: User) -> tuple[Statement, ...]:
        with self._engine.connect() as connection:
            documents = _documents(connection, user.user_id)
        try:
            return tuple(chain.from_iterable(map(parse_policy, documents.values())))
        except MalformedPolicyDocument as error:  # changed behind our back, or stored by a release that understood more
            log.error("a user's policies are not understood: all is denied", user_id=user.user_id, reason=str(error))  # noqa: TRY400 (the reason says it all)
            return ()


def _note_change(connection: sa.Connection, account_id: str, user_name: str) -> str:
    """Give the user's policies another version, and the user's id."""
    changed = {iam_user.c.policy_version: iam_user.c.policy_version + 1}
    query = sa.update(iam_user).where(_named(account_id, user_name)).values(changed).returning(iam_user.c.user_id)
    user_id = connection.execute(query).scalar_one_or_none()
    if user_id is None:
        raise _no_such_user(user_name)
    return str(user_id)


def _documents(connection: sa.Connection, user_id: str) -> dict[str, str]:
    query = sa.select(user_policy).where(user_policy.c.user_id == user_id).order_by(user_policy.c.policy_name)
    return {row.policy_name: row.document for row in connection.execute(query)}


def _named(account_id: str, user_name: str) -> sa.ColumnElement[bool]:
    return sa.and_(iam_user.c.account_id == account_id, sa.func.lower(iam_user.c.user_name) == user_name.lower())


def _policy(user_id: str, policy_name: str) -> sa.ColumnElement[bool]:
    return sa.and_(user_policy.c.user_id == user_id, user_policy.c.policy_name == policy_name)


def _check_name(what: str, name: str, characters: int) -> None:
    if not _NAME.fullmatch(name) or len(name) > characters:
        raise ValidationError(f"{what} has 1 to {characters} characters of A-Z a-z 0-9 + = , . @ _ -")


def _no_such_user(user_name: str) -> NoSuchEntity:
    return NoSuchEntity(f"The user with name {user_name} cannot be found.")


def _no_such_policy(policy_name: str) -> NoSuchEntity:
    return NoSuchEntity(f"The user policy with name {policy_name} cannot be found.")
