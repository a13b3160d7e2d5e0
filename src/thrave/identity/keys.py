"""Access keys as AWS makes them: an id that may be seen, and a secret that signs; and the user whose one may be.

The id begins with `AKIA` (a long-term key; AWS IAM's documentation, "unique identifiers") and has 16 more characters
of base32; the secret is 40 characters of base64's alphabet, 240 random bits. Nothing here is stored.
"""

import secrets
import string
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

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
