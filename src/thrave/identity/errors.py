"""What can be wrong about accounts, users, keys and certificates, named as AWS IAM names it.

Each carries IAM's error code in `code`; the message says what to do. None ever holds a secret.

    IdentityError
    ├── NoSuchEntity            there is no such account, user, policy or access key
    ├── EntityAlreadyExists     the account's or user's name is taken
    ├── LimitExceeded           an account or user has at most two access keys, a user at most ten policies
    ├── ValidationError         a name that may not be given
    ├── MalformedPolicyDocument a policy that is not fully understood
    ├── MalformedCertificate    not a PEM X.509 certificate with an RSA key
    ├── MalformedPrivateKey     not an unencrypted PEM RSA private key
    └── ServiceIdentityError    the service's own key files cannot be used
"""

from typing import ClassVar


class IdentityError(Exception):
    """Something about an account, an access key or a certificate is wrong."""

    code: ClassVar[str] = "ServiceFailure"


class NoSuchEntity(IdentityError):
    """An account, user, policy or access key does not exist."""

    code = "NoSuchEntity"


class EntityAlreadyExists(IdentityError):
    """An account or user of that name exists."""

    code = "EntityAlreadyExists"


class LimitExceeded(IdentityError):
    """There are as many access keys or policies as there may be."""

    code = "LimitExceeded"


class ValidationError(IdentityError):
    """A value does not have the form that is asked for."""

    code = "ValidationError"


class MalformedPolicyDocument(IdentityError):
    """A policy is not of IAM's language, or says what cannot be evaluated here; the message says why."""

    code = "MalformedPolicyDocument"


class MalformedCertificate(IdentityError):
    """A certificate cannot be read, or is of a kind that bundles cannot be encrypted to."""

    code = "MalformedCertificate"


class MalformedPrivateKey(IdentityError):
    """A private key cannot be read, or is of a kind that cannot open bundles."""

    code = "InvalidKeyPair"


class ServiceIdentityError(IdentityError):
    """The service's own certificate or keys are missing in part, open to others, or do not belong together."""
