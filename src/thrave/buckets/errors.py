"""Errors of object stores: S3's codes, statuses and messages, and one table that says who must act on each.

`str(error)` is `AccessDenied(403)- Invalid according to Policy: …`, as EC2 writes an error of S3 into a bundle task. An
error without a response of the store (refused connection, invalid setting) has status 0 and only its message. No error
contains a secret key, a signature or a proxy's password.

    BucketError
    ├── NoSuchBucket            404
    ├── NoSuchKey               404
    ├── BucketAlreadyExists     409  the bucket belongs to another account
    ├── InvalidBucketName       400
    ├── InvalidArgument         400  a key or a form field that is not valid
    │   └── StoreSettingError     0  a setting of the store, or a file that it names, cannot be used
    ├── InvalidPolicyDocument   400  the upload policy cannot be read
    ├── SignatureDoesNotMatch   403  the upload policy was not signed with this key
    ├── AccessDenied            403  the upload policy, or the store, does not allow it
    ├── EntityTooSmall          400  smaller than the upload policy allows
    ├── EntityTooLarge          400  larger than the upload policy allows
    ├── InternalError           500  the disk of a directory store failed (full, ...)
    └── StoreError              any other error that a store returns
        ├── WrongRegion         the bucket is in another region
        └── TransientError      a retry may succeed: 503 SlowDown, lost connection, no response, damaged bytes
            └── UnreachableError  no connection could be made: refused, no such host name, no route
                └── NoConnectionError  all connections of this process were in use for too long
"""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import NamedTuple

from thrave.concurrency import utc_now


class Kind(StrEnum):
    """Who must act on an error of a store."""

    KEY = "access key"
    REQUEST = "request"
    SETTING = "setting"
    LIMIT = "limit"
    REGION = "region"
    TRANSIENT = "transient"


KINDS: Mapping[Kind, str] = {
    Kind.KEY: "The owner of the access key that signed the request: the key is unknown, or lacks a permission.",
    Kind.REQUEST: "The caller: the bucket, the object or the upload policy is not valid.",
    Kind.SETTING: "The operator: a setting does not fit the store, or the store lacks a required feature.",
    Kind.LIMIT: "The operator of the store, or the owner of the bucket: a quota is used up, or a lock is set.",
    Kind.REGION: "The operator changes the region, or the caller uses another bucket: the bucket is in another region.",
    Kind.TRANSIENT: "No action: Thrave sends the same request again, and it may succeed.",
}
"""Who must act for each kind, and why."""


class Row(NamedTuple):
    """A row of `TABLE`."""

    kind: Kind
    meaning: str
    remedy: str = ""
    """What to do, in one sentence; empty if the meaning says it."""
    code: str = ""
    """For a status: code of a response that has none, such as the response to HEAD."""


_AGAIN = "Thrave sends the request again, for `s3_retry_timeout` seconds."
_GRANT = "Grant the permissions that are listed in docs/reference/store-rights.md, or use another key."
_S3_REGION = "Set `s3_region` to the region of the store (Ceph: of its zone group), and `s3_endpoint` to match."
_QUOTA = "Raise the quota or the limit of the store, or remove what is no longer needed."

TABLE: Mapping[str | int, Row] = {
    # Codes, which decide before statuses do. The key:
    "AccessDenied": Row(Kind.KEY, "The access key may not do this.", _GRANT),
    "AccountProblem": Row(Kind.KEY, "The account of the key has been suspended.", "Ask the operator of the store."),
    "AllAccessDisabled": Row(Kind.KEY, "All access has been disabled.", "Ask the operator of the store."),
    "ExpiredToken": Row(Kind.KEY, "Temporary credentials have expired.", "Renew the credentials."),
    "InvalidAccessKeyId": Row(Kind.KEY, "The store does not know the access key.", "Use a key that the store knows."),
    "InvalidToken": Row(Kind.KEY, "The session token is not valid.", "Renew the credentials."),
    "NotSignedUp": Row(Kind.KEY, "The account of the key may not use the store.", "Ask the operator of the store."),
    "SignatureDoesNotMatch": Row(
        Kind.KEY, "The signature was made with another secret, or changed on the way.",
        "Compare the secret access key; check for a proxy that changes headers.",
    ),
    "TokenRefreshRequired": Row(Kind.KEY, "Temporary credentials have expired.", "Renew the credentials."),
    "UserSuspended": Row(Kind.KEY, "The user of the key has been suspended (Ceph).", "Ask the operator of the store."),
    # The request:
    "BucketAlreadyExists": Row(Kind.REQUEST, "The name of the bucket is taken.", "Choose another name."),
    "BucketAlreadyOwnedByYou": Row(Kind.REQUEST, "The bucket exists and is the key's own."),
    "BucketNotEmpty": Row(Kind.REQUEST, "The bucket is not empty."),
    "EntityTooLarge": Row(Kind.REQUEST, "The object is larger than the upload policy, or the store, allows."),
    "EntityTooSmall": Row(Kind.REQUEST, "The object is smaller than the upload policy allows."),
    "InvalidArgument": Row(Kind.REQUEST, "A name, key or form field is not acceptable."),
    "InvalidBucketName": Row(Kind.REQUEST, "A bucket cannot have this name.", "Choose another name."),
    "InvalidPolicyDocument": Row(Kind.REQUEST, "The upload policy is not valid."),
    "InvalidRange": Row(Kind.REQUEST, "The range begins after the end of the object."),
    "KeyTooLongError": Row(Kind.REQUEST, "The key of the object is too long."),
    "NoSuchBucket": Row(Kind.REQUEST, "The bucket does not exist."),
    "NoSuchKey": Row(Kind.REQUEST, "The object does not exist."),
    "PreconditionFailed": Row(Kind.REQUEST, "The object exists already, or has changed."),
    # The settings:
    "CertificateNotTrusted": Row(
        Kind.SETTING, "The certificate of the store, or of the proxy, is not trusted.",
        "Set `s3_ca_file` to the certificates that sign it, or correct the host name in `s3_endpoint`.",
    ),
    "IllegalLocationConstraintException": Row(Kind.SETTING, "The store does not create buckets there.", _S3_REGION),
    "InvalidLocationConstraint": Row(Kind.SETTING, "The store has no such region.", _S3_REGION),
    "InvalidRegionName": Row(Kind.SETTING, "The store has no such region.", _S3_REGION),
    "InvalidSetting": Row(Kind.SETTING, "A setting of the store, or a file that it names, cannot be used."),
    "MethodNotAllowed": Row(
        Kind.SETTING, "The store does not allow this method here.",
        "Check that `s3_endpoint` is the URL of an S3 API, and `s3_addressing_style`.",
    ),
    "NotImplemented": Row(
        Kind.SETTING, "The store lacks a feature.", "`thrave doctor` names the feature; use another store, or `upload`."
    ),
    "ProxyAuthenticationRequired": Row(
        Kind.SETTING, "The proxy requires another user and password.", "Put them into the URL of the proxy: `s3_proxy`."
    ),
    "ProxyRefused": Row(
        Kind.SETTING, "The proxy refuses the request.",
        "Allow the store in the proxy, or change `s3_proxy`.",
    ),
    "RequestTimeTooSkewed": Row(
        Kind.SETTING, "The clocks of the host and the store differ by more than 15 minutes.",
        "Have both clocks set by NTP.",
    ),
    "UnexpectedResponse": Row(
        Kind.SETTING, "The response is not one of S3.", "Check that `s3_endpoint` is the URL of an S3 API."
    ),
    # A limit of the store:
    "InvalidBucketState": Row(Kind.LIMIT, "The state of the bucket does not allow this."),
    "InvalidObjectState": Row(Kind.LIMIT, "The object is archived.", "Restore it first."),
    "ObjectLocked": Row(Kind.LIMIT, "A retention lock is set.", "Take the lock off, or use another bucket."),
    "QuotaExceeded": Row(Kind.LIMIT, "A quota is used up.", _QUOTA),
    "StorageFull": Row(Kind.LIMIT, "The store is full (MinIO).", _QUOTA),
    "TooManyBuckets": Row(Kind.LIMIT, "The owner of the key may not have more buckets.", _QUOTA),
    "XMinioStorageFull": Row(Kind.LIMIT, "The store is full (MinIO).", _QUOTA),
    # The region:
    "AuthorizationHeaderMalformed": Row(Kind.REGION, "The request was signed for another region.", _S3_REGION),
    "PermanentRedirect": Row(Kind.REGION, "The bucket is at another endpoint.", _S3_REGION),
    # May pass:
    "BadDigest": Row(Kind.TRANSIENT, "The store received other bytes than were sent.", _AGAIN),
    "ConnectTimeout": Row(Kind.TRANSIENT, "No connection within `s3_timeout` seconds.", _AGAIN),
    "ConnectionLost": Row(Kind.TRANSIENT, "The connection was cut, or the response was not complete.", _AGAIN),
    "ConnectionRefused": Row(Kind.TRANSIENT, "Nothing listens there, or there is no route.", _AGAIN),
    "IncompleteBody": Row(Kind.TRANSIENT, "The store received fewer bytes than were announced.", _AGAIN),
    "NameNotResolved": Row(Kind.TRANSIENT, "The host name of the store or of the proxy does not resolve.", _AGAIN),
    "NoConnection": Row(
        Kind.TRANSIENT,
        "All connections to the store were in use for `s3_timeout` seconds.",
        "A task waits for one until `stall_timeout` ends it; this does not count as `s3_retry_timeout`.",
    ),
    "NoResponse": Row(
        Kind.TRANSIENT,
        "No byte was sent or received for `s3_timeout` seconds, or a request or a response took twenty times as long.",
        _AGAIN,
    ),
    "OperationAborted": Row(Kind.TRANSIENT, "Another request on the bucket is in progress.", _AGAIN),
    "ProxyFailed": Row(Kind.TRANSIENT, "The proxy cannot reach the store just now.", _AGAIN),
    "ProxyUnreachable": Row(Kind.TRANSIENT, "There is no connection to the proxy.", _AGAIN),
    "Redirect": Row(Kind.TRANSIENT, "A temporary redirect.", _AGAIN),
    "RequestTimeout": Row(Kind.TRANSIENT, "The store did not receive the request in time.", _AGAIN),
    "RequestThrottled": Row(Kind.TRANSIENT, "Too many requests.", _AGAIN),
    "ServiceUnavailable": Row(Kind.TRANSIENT, "The store is busy or not available.", _AGAIN),
    "SlowDown": Row(Kind.TRANSIENT, "Too many requests.", _AGAIN),
    "TemporaryRedirect": Row(Kind.TRANSIENT, "A temporary redirect: the bucket has just been created.", _AGAIN),
    "TLSFailure": Row(Kind.TRANSIENT, "The TLS handshake failed.", _AGAIN),
    "Throttling": Row(Kind.TRANSIENT, "Too many requests.", _AGAIN),
    "ThrottlingException": Row(Kind.TRANSIENT, "Too many requests.", _AGAIN),
    "TooManyRequests": Row(Kind.TRANSIENT, "Too many requests.", _AGAIN),
    # Statuses, of codes that are not listed above.
    301: Row(Kind.SETTING, "Another server redirects requests.", "Set `s3_endpoint` to that URL.", "MovedPermanently"),
    302: Row(Kind.SETTING, "Another server redirects requests.", "Set `s3_endpoint` to that URL.", "Found"),
    303: Row(Kind.SETTING, "Another server redirects requests.", "Set `s3_endpoint` to that URL.", "SeeOther"),
    307: Row(Kind.TRANSIENT, "A temporary redirect.", _AGAIN, "TemporaryRedirect"),
    308: Row(Kind.SETTING, "Another server redirects requests.", "Set `s3_endpoint` to that URL.", "MovedPermanently"),
    400: Row(Kind.REQUEST, "The store does not accept the request.", "", "BadRequest"),
    401: Row(Kind.KEY, "The access key is not accepted.", _GRANT, "AccessDenied"),
    402: Row(Kind.LIMIT, "The store requires a payment.", "Ask the operator of the store.", "PaymentRequired"),
    403: Row(Kind.KEY, "The access key may not do this.", _GRANT, "AccessDenied"),
    404: Row(Kind.REQUEST, "There is no such bucket or object.", "", "NoSuchKey"),
    405: Row(
        Kind.SETTING, "The store does not allow this method here.", "Check `s3_endpoint` and `s3_addressing_style`.",
        "MethodNotAllowed",
    ),
    407: Row(
        Kind.SETTING, "The proxy requires another user and password.",
        "Put them into the URL of the proxy: `s3_proxy`.",
        "ProxyAuthenticationRequired",
    ),
    408: Row(Kind.TRANSIENT, "The store did not receive the request in time.", _AGAIN, "RequestTimeout"),
    409: Row(Kind.TRANSIENT, "Another request on the bucket is in progress.", _AGAIN, "OperationAborted"),
    411: Row(
        Kind.SETTING, "A server between Thrave and the store removes the length of the request.",
        "Check the proxies between Thrave and the store.", "MissingContentLength",
    ),
    412: Row(Kind.REQUEST, "The object exists already, or has changed.", "", "PreconditionFailed"),
    413: Row(
        Kind.SETTING, "A server before the store does not take so long a request.",
        "Raise its limit to more than a part of a bundle has (nginx: `client_max_body_size`).", "RequestTooLong",
    ),
    414: Row(
        Kind.SETTING, "A server before the store does not take so long a URL.",
        "Raise its limit (nginx: `large_client_header_buffers`).", "URITooLong",
    ),
    416: Row(Kind.REQUEST, "The range begins after the end of the object.", "", "InvalidRange"),
    421: Row(Kind.TRANSIENT, "The request reached another server than the store.", _AGAIN, "MisdirectedRequest"),
    423: Row(Kind.LIMIT, "A lock is set.", "Take the lock off, or use another bucket.", "ObjectLocked"),
    425: Row(Kind.TRANSIENT, "The request came too early.", _AGAIN, "TooEarly"),
    426: Row(
        Kind.SETTING, "The store requires another protocol.", "Check whether `s3_endpoint` must have https.",
        "UpgradeRequired",
    ),
    429: Row(Kind.TRANSIENT, "Too many requests.", _AGAIN, "TooManyRequests"),
    431: Row(
        Kind.SETTING, "A server before the store does not take so long headers.",
        "Raise its limit (nginx: `large_client_header_buffers`).", "RequestHeaderTooLarge",
    ),
    500: Row(Kind.TRANSIENT, "The store failed.", _AGAIN, "InternalError"),
    501: Row(
        Kind.SETTING, "The store lacks a feature.",
        "`thrave doctor` names the feature; use another store, or `upload`.", "NotImplemented",
    ),
    502: Row(Kind.TRANSIENT, "A gateway received no valid response from the store.", _AGAIN, "BadGateway"),
    503: Row(Kind.TRANSIENT, "The store is busy or not available.", _AGAIN, "SlowDown"),
    504: Row(Kind.TRANSIENT, "A gateway received no response from the store in time.", _AGAIN, "GatewayTimeout"),
    505: Row(
        Kind.SETTING, "The store does not support HTTP/1.1.", "Check `s3_endpoint`, and the proxy in between.",
        "HTTPVersionNotSupported",
    ),
    506: Row(Kind.SETTING, "The store is misconfigured.", "Ask the operator of the store.", "VariantAlsoNegotiates"),
    507: Row(Kind.LIMIT, "The store is full.", _QUOTA, "InsufficientStorage"),
    508: Row(Kind.SETTING, "The store redirects in a circle.", "Ask the operator of the store.", "LoopDetected"),
    509: Row(Kind.TRANSIENT, "The bandwidth is used up for a while.", _AGAIN, "BandwidthLimitExceeded"),
    510: Row(Kind.SETTING, "The store requires an extension of HTTP.", "Ask the operator of the store.", "NotExtended"),
    511: Row(
        Kind.SETTING, "The network requires a login first.", "Log in to the network, or set `s3_proxy`.",
        "NetworkAuthenticationRequired",
    ),
    520: Row(Kind.TRANSIENT, "A gateway received an unknown error from the store.", _AGAIN, "InternalError"),
    521: Row(Kind.TRANSIENT, "A gateway cannot connect to the store.", _AGAIN, "InternalError"),
    522: Row(Kind.TRANSIENT, "A gateway's connection to the store timed out.", _AGAIN, "InternalError"),
    523: Row(Kind.TRANSIENT, "A gateway cannot reach the store.", _AGAIN, "InternalError"),
    524: Row(Kind.TRANSIENT, "A gateway received no response from the store in time.", _AGAIN, "InternalError"),
    529: Row(Kind.TRANSIENT, "The store is overloaded.", _AGAIN, "SlowDown"),
    # The first digits of all other statuses.
    "3xx": Row(Kind.SETTING, "Another server redirects requests.", "Set `s3_endpoint` to that URL.", "Redirected"),
    "4xx": Row(Kind.REQUEST, "The store does not accept the request.", "", "BadRequest"),
    "5xx": Row(Kind.TRANSIENT, "The store, or a gateway before it, failed.", _AGAIN, "InternalError"),
}  # fmt: skip
"""Every known error: who must act, and how. The code decides; without one the status, then the status class.

Source: AWS S3 API Reference, "Error responses"; RFC 9110; for 520 to 529 the documentation of Cloudflare."""


def find_row(code: str, status: int) -> Row:
    """Return the row for a code; for an unknown code the row of the status, or of the status class."""
    return TABLE.get(code) or TABLE.get(status) or TABLE.get(f"{status // 100}xx") or TABLE["4xx"]


class BucketError(Exception):
    """An error response of S3, or a missing response.

    Attributes:
        code: S3's error code, or one of ours from `TABLE`.
        status: HTTP status; 0 without a response.
        message: S3's message, or ours.
        headers: Headers of the store's response; empty without a response.
        access_key_id: The key that signed the request; None if the request had no signature of a key.
    """

    code: str
    status: int = 400
    headers: Mapping[str, str] = {}
    access_key_id: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}({self.status})- {self.message}" if self.status else self.message

    @property
    def kind(self) -> Kind:
        """Who must act."""
        return find_row(self.code, self.status).kind

    @property
    def remedy(self) -> str:
        """What to do; empty if the message says it."""
        return find_row(self.code, self.status).remedy

    @property
    def is_store_failure(self) -> bool:
        """Whether the operator must act or a retry may succeed; False if caller or key owner must act."""
        return self.kind not in (Kind.KEY, Kind.REQUEST)


class NoSuchBucket(BucketError):
    """The bucket does not exist."""

    code = "NoSuchBucket"
    status = 404


class NoSuchKey(BucketError):
    """The bucket has no object with that key."""

    code = "NoSuchKey"
    status = 404


class BucketAlreadyExists(BucketError):
    """Another account owns the bucket with that name."""

    code = "BucketAlreadyExists"
    status = 409

    def __init__(
        self,
        message: str = "The requested bucket name is not available. The bucket namespace is shared by all users of the "
        "system. Please select a different name and try again.",
    ) -> None:
        super().__init__(message)


class InvalidBucketName(BucketError):
    """The bucket name is not valid."""

    code = "InvalidBucketName"


class InvalidArgument(BucketError):
    """A key, prefix or form field is not valid."""

    code = "InvalidArgument"


class StoreSettingError(InvalidArgument):
    """A setting of the store, or a file that it names, cannot be used; the message names the setting."""

    code = "InvalidSetting"
    status = 0


class InvalidPolicyDocument(BucketError):
    """The upload policy is not valid."""

    code = "InvalidPolicyDocument"

    def __init__(self, fault: str) -> None:
        super().__init__(f"Invalid Policy: {fault}")


class SignatureDoesNotMatch(BucketError):
    """The upload policy's signature was not made with the secret of that access key."""

    code = "SignatureDoesNotMatch"
    status = 403

    def __init__(self) -> None:
        super().__init__(
            "The request signature we calculated does not match the signature you provided. "
            "Check your key and signing method."
        )


class AccessDenied(BucketError):
    """The upload policy, or the store, does not allow this."""

    code = "AccessDenied"
    status = 403

    @classmethod
    def by_policy(cls, fault: str) -> "AccessDenied":
        """Create the error of an upload that the upload policy does not allow."""
        return cls(f"Invalid according to Policy: {fault}")


class EntityTooSmall(BucketError):
    """The object has fewer bytes than the upload policy allows."""

    code = "EntityTooSmall"

    def __init__(self, message: str = "Your proposed upload is smaller than the minimum allowed size") -> None:
        super().__init__(message)


class EntityTooLarge(BucketError):
    """The object has more bytes than the upload policy allows."""

    code = "EntityTooLarge"

    def __init__(self, message: str = "Your proposed upload exceeds the maximum allowed size") -> None:
        super().__init__(message)


class InternalError(BucketError):
    """The disk of a directory store failed."""

    code = "InternalError"
    status = 500

    @property
    def kind(self) -> Kind:
        """The operator must act: waiting does not repair a disk."""
        return Kind.SETTING


class StoreError(BucketError):
    """An error without its own class, with the store's code and message."""

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class WrongRegion(StoreError):
    """The bucket is in another region, or at another endpoint, than the configured one.

    Attributes:
        region: Region that the store names; None if it names none.
        endpoint: Host that the store names; None if it names none.
    """

    def __init__(self, code: str, status: int, message: str, *, region: str | None, endpoint: str | None) -> None:
        super().__init__(code, status, message)
        self.region = region
        self.endpoint = endpoint

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.location})"

    @property
    def location(self) -> str:
        """Where the bucket is, for a message."""
        named = [f"region {self.region}" if self.region else "", f"endpoint {self.endpoint}" if self.endpoint else ""]
        return ", ".join(filter(None, named)) or "the store does not name the region"

    @property
    def kind(self) -> Kind:
        """The operator or the caller must act."""
        return Kind.REGION


class TransientError(StoreError):
    """A failure after which the same request may succeed."""

    @property
    def kind(self) -> Kind:
        """No action for any status; 400, for example, can mean that a body was too slow or incomplete."""
        return Kind.TRANSIENT

    @property
    def retry_after(self) -> float:
        """Seconds to wait before the next attempt, from the response's `Retry-After`; 0 without one."""
        text = self.headers.get("Retry-After", "").strip()
        if re.fullmatch(r"[0-9]{1,9}", text):
            return float(text)
        try:
            retry_at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):  # OverflowError: a year of 20 digits
            return 0.0
        now = utc_now() if retry_at.tzinfo else utc_now().replace(tzinfo=None)
        return max(0.0, (retry_at - now).total_seconds())


class UnreachableError(TransientError):
    """No connection could be made to the store or the proxy, so that no request was sent."""


class NoConnectionError(UnreachableError):
    """Every connection of this process to the store was in use for too long. The store has not failed."""


_ERROR_CLASSES: Mapping[str, type[BucketError]] = {
    error_class.code: error_class
    for error_class in (
        NoSuchBucket, NoSuchKey, BucketAlreadyExists, InvalidBucketName, InvalidArgument, AccessDenied, EntityTooSmall,
        EntityTooLarge,
    )
}  # fmt: skip


def error_from_response(code: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> BucketError:
    """Create the error for a store's response.

    Args:
        code: The store's code; empty if the response has none.
        status: Status of the response.
        message: The store's message.
        headers: Headers of the response.
    """
    row = find_row(code, status)
    code = code or row.code
    error: BucketError
    if row.kind is Kind.TRANSIENT:
        error = TransientError(code, status, message)
    elif code in _ERROR_CLASSES:
        error = _ERROR_CLASSES[code](message)
    else:
        error = StoreError(code, status, message)
    error.headers = headers or {}
    return error
