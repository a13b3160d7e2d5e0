"""What a bucket refuses, with S3's own codes, statuses and words.

Every error has S3's `code`, HTTP `status` and `message`; as text it reads `AccessDenied(403)- Invalid according to
Policy: …`, which is how EC2 put an error of S3 into a bundle task. None holds a key or a signature.

    BucketError
    ├── NoSuchBucket            404
    ├── NoSuchKey               404
    ├── BucketAlreadyExists     409  it is somebody else's
    ├── InvalidBucketName       400
    ├── InvalidArgument         400  a key or a form field that cannot be
    ├── InvalidPolicyDocument   400  the upload policy cannot be read
    ├── SignatureDoesNotMatch   403  the upload policy was not signed with this key
    ├── AccessDenied            403  the upload policy does not allow it
    ├── EntityTooSmall          400  smaller than the upload policy allows
    ├── EntityTooLarge          400  larger than the upload policy allows
    ├── InternalError           500  the disk failed (full, ...)
    └── StoreError              whatever else a store answers, with its own code, status and words
        └── TransientError      … that may be gone in a while: 503 SlowDown, a cut connection, no answer, lost bytes
"""

from collections.abc import Mapping


class BucketError(Exception):
    """An answer of S3 that is not success.

    Attributes:
        code: S3's error code.
        status: The HTTP status that S3 answers with.
        message: S3's message.
    """

    code: str
    status: int = 400

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}({self.status})- {self.message}"

    @property
    def is_the_stores(self) -> bool:
        """Whether the store has failed, or the way to it, so that no caller can mend it but the operator."""
        return self.status >= _STORES_OWN or self.code in _OF_CLOCKS


class NoSuchBucket(BucketError):  # noqa: N818 (S3's code, as are all below)
    """The bucket does not exist."""

    code = "NoSuchBucket"
    status = 404


class NoSuchKey(BucketError):  # noqa: N818
    """The bucket holds no object of that key."""

    code = "NoSuchKey"
    status = 404


class BucketAlreadyExists(BucketError):  # noqa: N818
    """The bucket's name is somebody else's."""

    code = "BucketAlreadyExists"
    status = 409

    def __init__(
        self,
        message: str = "The requested bucket name is not available. The bucket namespace is shared by all users of the "
        "system. Please select a different name and try again.",
    ) -> None:
        super().__init__(message)


class InvalidBucketName(BucketError):  # noqa: N818
    """The name is not one that a bucket can have."""

    code = "InvalidBucketName"


class InvalidArgument(BucketError):  # noqa: N818
    """A key, prefix or form field cannot be what it is."""

    code = "InvalidArgument"


class InvalidPolicyDocument(BucketError):  # noqa: N818
    """The upload policy is not one."""

    code = "InvalidPolicyDocument"

    def __init__(self, fault: str) -> None:
        super().__init__(f"Invalid Policy: {fault}")


class SignatureDoesNotMatch(BucketError):  # noqa: N818
    """The upload policy's signature was not made with the secret of that access key."""

    code = "SignatureDoesNotMatch"
    status = 403

    def __init__(self) -> None:
        super().__init__(
            "The request signature we calculated does not match the signature you provided. "
            "Check your key and signing method."
        )


class AccessDenied(BucketError):  # noqa: N818
    """The upload policy, or the store, does not allow this."""

    code = "AccessDenied"
    status = 403

    @classmethod
    def by_policy(cls, fault: str) -> "AccessDenied":
        """The upload policy does not allow this upload."""
        return cls(f"Invalid according to Policy: {fault}")


class EntityTooSmall(BucketError):  # noqa: N818
    """The object has fewer bytes than the upload policy allows."""

    code = "EntityTooSmall"

    def __init__(self, message: str = "Your proposed upload is smaller than the minimum allowed size") -> None:
        super().__init__(message)


class EntityTooLarge(BucketError):  # noqa: N818
    """The object has more bytes than the upload policy allows."""

    code = "EntityTooLarge"

    def __init__(self, message: str = "Your proposed upload exceeds the maximum allowed size") -> None:
        super().__init__(message)


class InternalError(BucketError):
    """The disk failed through no fault of the caller."""

    code = "InternalError"
    status = 500


class StoreError(BucketError):
    """An answer of a store that has no class of its own, in the store's words."""

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class TransientError(StoreError):
    """A failure that may be gone in a while: the same call may be made again."""

    @property
    def is_the_stores(self) -> bool:
        """It is, whatever its status: 400 stands for a body that came too slowly, or not whole."""
        return True


_STORES_OWN = 500  # HTTP statuses from here on are the store's own failures, no refusals
_OF_CLOCKS = frozenset({"RequestTimeTooSkewed"})  # the service's clock, or the store's
_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
# Of status 400 and 409: bytes that were slow to come or damaged on the way, and two that create a bucket at once.
_TRANSIENT_CODES = frozenset({"RequestTimeout", "BadDigest", "IncompleteBody", "OperationAborted"})
_OWN_CLASS: Mapping[str, type[BucketError]] = {
    kind.code: kind
    for kind in (
        NoSuchBucket, NoSuchKey, BucketAlreadyExists, InvalidBucketName, InvalidArgument, AccessDenied, EntityTooSmall,
        EntityTooLarge,
    )
}  # fmt: skip


def error_of_store(code: str, status: int, message: str) -> BucketError:
    """What a store answered, as an error of ours."""
    if status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        return TransientError(code, status, message)
    kind = _OWN_CLASS.get(code)
    return StoreError(code, status, message) if kind is None else kind(message)
