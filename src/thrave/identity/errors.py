"""Errors of accounts, users, keys and certificates, with the names and codes of AWS IAM.

`code` has IAM's error code, the message says what to do. No message contains a secret.

    IdentityError
    ├── NoSuchEntity            the account, user, policy or access key does not exist
    ├── EntityAlreadyExists     an account or user has the name already
    ├── DeleteConflict          the account has an instance or an unfinished task
    ├── LimitExceeded           an account or user has at most two access keys, a user at most ten policies
    ├── ValidationError         a name or value is not valid
    ├── MalformedPolicyDocument a part of the policy is not supported
    ├── MalformedCertificate    not a PEM X.509 certificate with an RSA key
    ├── MalformedPrivateKey     not an unencrypted PEM RSA private key
    └── ServiceIdentityError    the service's own key files cannot be used
"""

from typing import ClassVar


class IdentityError(Exception):
    """An error of accounts, access keys or certificates."""

    code: ClassVar[str] = "ServiceFailure"


class NoSuchEntity(IdentityError):
    """An account, user, policy or access key does not exist."""

    code = "NoSuchEntity"


class EntityAlreadyExists(IdentityError):
    """An account or user with the name exists."""

    code = "EntityAlreadyExists"


class DeleteConflict(IdentityError):
    """An account cannot be deleted while it has instances or unfinished tasks."""

    code = "DeleteConflict"


class LimitExceeded(IdentityError):
    """There are as many access keys or policies as the quota allows."""

    code = "LimitExceeded"


class ValidationError(IdentityError):
    """A value does not have the required form."""

    code = "ValidationError"


class MalformedPolicyDocument(IdentityError):
    """A policy is not valid in IAM's language, or has a part that is not supported; the message says which."""

    code = "MalformedPolicyDocument"


class MalformedCertificate(IdentityError):
    """A certificate cannot be read, or bundles cannot be encrypted for its key."""

    code = "MalformedCertificate"


class MalformedPrivateKey(IdentityError):
    """A private key cannot be read, or cannot open bundles."""

    code = "InvalidKeyPair"


class ServiceIdentityError(IdentityError):
    """The service's certificate or keys are missing, readable by other users, or do not belong together."""
