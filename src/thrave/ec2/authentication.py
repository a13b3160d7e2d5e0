"""Authentication of a request: the request as received, and the check of its signature.

`authenticate` accepts signature version 4 in the Authorization header or in the query string (a presigned URL), and
version 2 with HmacSHA256 in the parameters (clients of 2013 and before, libcloud, VM::EC2). botocore.auth signs the
received request again, and the two signatures are compared in constant time. Permissions are not checked here.
"""

# botocore's signer is a client. These checks of a server are ours:
# - A signed X-Amz-Content-SHA256 must be the digest of the body; botocore does not compare them.
# - The request must be at most 15 minutes old, or be a presigned URL that is valid for at most seven days.
# - The Host header must be signed, and the date of the scope must be the date of the request.
# - An unknown key and a wrong signature have the same response and take the same time.
#
# The canonical form is built once per request, in time linear in its size; each secret costs one or two HMACs.
# Any region and service in the scope is accepted: old clients guess them from the host name (boto 2 signs for region
# `0`, service `127` if its endpoint is 127.0.0.1). No message has an Authorization header, a signature or a secret.
#
# Sources: AWS, "Signature Version 4 signing process" and "Signature Version 2 signing process"; AWS's own messages for
# incomplete signatures.

import base64
import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple, Protocol, Self, TypeGuard

from botocore.auth import SigV2Auth, SigV4Auth
from botocore.awsrequest import AWSRequest, HTTPHeaders
from botocore.credentials import Credentials

from thrave.concurrency import random_hex
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import ProtocolError, join_forms, read_form
from thrave.identity.accounts import AccessKey, KeyCache

ALGORITHM = "AWS4-HMAC-SHA256"
MAX_CLOCK_SKEW = timedelta(minutes=15)
MAX_LIFETIME = timedelta(days=7)  # of a presigned URL
MAX_SIGNED_HEADERS = 50  # SDKs sign fewer than ten
MAX_FIELD = 1024  # characters of a date, a credential or a signature

_MAX_HOST = 262  # characters: a name has 253 at most (RFC 1035), then a colon and a port
_MAX_PORT = 65535
_HOST_NAME = re.compile(r"([A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_IPV6 = re.compile(r"\[([0-9A-Za-z:.%]+)\](?::([0-9]{1,5}))?")
_MAX_AUTHORIZATION_PARTS = 16  # three are used
_AMZ_DATE = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_AMZ_DATE_FORMAT = "%Y%m%dT%H%M%SZ"

# Used instead of the secret of a key that is unknown or inactive, so that the work is the same.
_DUMMY_SECRET = random_hex(20)


class Host(NamedTuple):
    """A Host header.

    Attributes:
        name: In lower case; an IPv6 address has its brackets.
        port: As digits; empty if none was given.
    """

    name: str
    port: str

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a Host header; None if it is not a host name or an IP address, with or without a port."""
        if len(text) > _MAX_HOST:
            return None
        found = _HOST_NAME.fullmatch(text) or _IPV6.fullmatch(text)
        if found is None or int(found[2] or 0) > _MAX_PORT:
            return None
        if text.startswith("["):
            try:
                ipaddress.IPv6Address(found[1])
            except ValueError:
                return None
        return cls((f"[{found[1]}]" if text.startswith("[") else found[1]).lower(), found[2] or "")

    def __str__(self) -> str:
        """Return name and port as in a URL."""
        return f"{self.name}:{self.port}" if self.port else self.name


@dataclass(frozen=True)
class Ec2Request:
    """One complete HTTP request as received; nothing in it is trusted.

    Attributes:
        method: `GET` or `POST`.
        path: As received, without the query string.
        query: The query string as received.
        headers: Names in lower case with their values, in the order received.
        body: At most as long as the API's limit.
        source_ip: Address of the client; None if unknown.
        is_secure: Whether the request came over TLS.
    """

    method: str
    path: str
    query: bytes = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes = field(repr=False)
    source_ip: str | None = None
    is_secure: bool = False

    @property
    def size(self) -> int:
        """Bytes that are decoded and signed again during authentication."""
        headers = sum(len(name) + len(value) for name, value in self.headers)
        return len(self.path) + len(self.query) + len(self.body) + headers

    @cached_property
    def form(self) -> dict[str, str]:
        """The parameters of query string and body together.

        Raises:
            ProtocolError: The parameters cannot be decoded, are too many, or one is given twice.
        """
        return join_forms(self.query_form, read_form(self.body)) if self.body else self.query_form

    @cached_property
    def query_form(self) -> dict[str, str]:
        """The parameters of the query string alone.

        Raises:
            ProtocolError: As for `form`.
        """
        return read_form(self.query)

    @cached_property
    def host(self) -> Host | None:
        """The Host header; None if it is missing or invalid."""
        return Host.parse(self.header("host") or "")

    def header(self, name: str) -> str | None:
        """Return the value of the first header with this lower-case name; None if there is none."""
        return next((value for other, value in self.headers if other == name), None)


class UnreadableRequest(Exception):
    """Reading a request failed with an unexpected exception, which is in `__cause__`."""


class Signature(Protocol):
    """The signature of a request, of any version. Nothing in it is verified yet."""

    @property
    def method(self) -> str:
        """The signing method, for the log."""

    @property
    def access_key_id(self) -> str:
        """The id of the key that the request claims to be signed with."""

    @property
    def text(self) -> str:
        """The signature as received."""

    @property
    def signed_at(self) -> datetime:
        """The request's own time, or the time when it expires."""

    @property
    def canonical(self) -> str:
        """The signed text in canonical form. Built once, in time linear in the request's size."""

    def check_time(self, now: datetime) -> None:
        """Raise RequestExpired if the request is too old, or from the future."""

    def compute_signatures(self, secret: str) -> Iterable[str]:
        """Return the valid signatures of this request with a secret; clients make one of them."""


def authenticate(
    request: Ec2Request,
    find_key: Callable[[str], AccessKey | None],
    key_cache: KeyCache,
    now: datetime,
    *,
    allow_signature_v2: bool = True,
    check_time: bool = True,
) -> AccessKey:
    """Verify a request's signature and return the key that made it.

    Args:
        request: The request as received.
        find_key: Reads an access key from the database; None if it does not exist.
        key_cache: Keys that signed a request recently.
        now: Current time, with a time zone.
        allow_signature_v2: Whether signature version 2 is accepted.
        check_time: Whether the request must be new. A test double whose clock a test sets accepts every time.

    Raises:
        EC2Error: MissingParameter (no credentials at all), IncompleteSignature, InvalidParameterValue (a signing method
            that is not accepted), RequestExpired, AuthFailure.
        ProtocolError: The parameters cannot be decoded.
        UnreadableRequest: Reading the request failed with an unexpected exception.
    """
    with _wrap_unexpected_errors():
        signature = _read_signature(request, allow_signature_v2=allow_signature_v2)
        if check_time:
            signature.check_time(now)
        _ = signature.canonical  # computed here, where an exception becomes UnreadableRequest
    # If a cached key did not sign, the database is read as well: a refusal takes the same work whether the key exists
    # or not.
    for find in (key_cache.find, find_key):
        key = find(signature.access_key_id)
        if _is_signed_with(key, signature):
            key_cache.add(key)
            return key
    raise EC2Error("AuthFailure")


def read_signature(request: Ec2Request) -> Signature:
    """Read the signature of a request for the log, without verifying it.

    Raises:
        As `authenticate`, without RequestExpired.
    """
    with _wrap_unexpected_errors():
        return _read_signature(request, allow_signature_v2=True)


def _read_signature(request: Ec2Request, *, allow_signature_v2: bool) -> Signature:
    has_token = request.header("x-amz-security-token") is not None
    if has_token or not request.form.keys().isdisjoint({"X-Amz-Security-Token", "SecurityToken"}):
        raise EC2Error("IncompleteSignature", reason="This service issues no session tokens: send none.")
    methods = {
        "header": request.header("authorization") is not None,
        "presigned": not request.query_form.keys().isdisjoint({"X-Amz-Algorithm", "X-Amz-Signature"}),
        "parameters": not request.form.keys().isdisjoint({"AWSAccessKeyId", "Signature"}),
    }
    match [method for method, is_used in methods.items() if is_used]:
        case ["header"]:
            return SignatureV4.from_header(request)
        case ["presigned"]:
            return SignatureV4.from_query(request)
        case ["parameters"]:
            if allow_signature_v2:
                return SignatureV2.from_parameters(request)
            raise EC2Error("InvalidParameterValue", "This service accepts signature version 4 only.")
        case []:
            raise EC2Error("MissingParameter", name="AWSAccessKeyId")
    raise EC2Error("IncompleteSignature", reason="Only one way of signing may be used in a request.")


@contextmanager
def _wrap_unexpected_errors() -> Iterator[None]:
    """Turn an exception of a library, which a hostile request may cause, into UnreadableRequest."""
    try:
        yield
    except (EC2Error, ProtocolError):
        raise
    except Exception as error:
        raise UnreadableRequest from error


def _is_signed_with(key: AccessKey | None, signature: Signature) -> TypeGuard[AccessKey]:
    is_active = key is not None and key.status == "Active"
    valid = signature.compute_signatures(key.secret_access_key if key is not None and is_active else _DUMMY_SECRET)
    return any(hmac.compare_digest(signature.text.encode(), text.encode()) for text in valid) and is_active


@dataclass(frozen=True)
class SignatureV4:
    """A signature of version 4.

    Attributes:
        request: The signed request.
        access_key_id: The id of the key that the request claims to be signed with.
        date: Date of the scope, YYYYMMDD.
        region: Region of the scope; not compared with anything.
        service: Service of the scope; not compared with anything.
        timestamp: The request's own time, such as 20261123T082646Z.
        signed_headers: Names in lower case, at most `MAX_SIGNED_HEADERS`.
        text: The signature as received, hexadecimal.
        lifetime: How long a presigned URL is valid; None for the Authorization header.
    """

    request: Ec2Request
    access_key_id: str
    date: str
    region: str
    service: str
    timestamp: str
    signed_headers: frozenset[str]
    text: str = field(repr=False)
    lifetime: timedelta | None = None

    @classmethod
    def from_header(cls, request: Ec2Request) -> "SignatureV4":
        """Read the Authorization header. Commas separate its parts, with or without a space."""
        scheme, _, rest = (request.header("authorization") or "").partition(" ")
        if scheme != ALGORITHM:
            raise EC2Error("IncompleteSignature", reason=f"The Authorization header must begin with {ALGORITHM}.")
        parts = {}
        for part in rest.split(",", _MAX_AUTHORIZATION_PARTS):
            name, _, value = part.strip().partition("=")
            parts[name] = value
        _require(parts, ("Credential", "SignedHeaders", "Signature"), "Authorization header requires '{}' parameter.")
        return cls._from_parts(request, {**parts, "Date": _header_time(request)})

    @classmethod
    def from_query(cls, request: Ec2Request) -> "SignatureV4":
        """Read the X-Amz-… parameters of a presigned URL."""
        parameters = request.query_form.items()
        parts = {name.removeprefix("X-Amz-"): value for name, value in parameters if name.startswith("X-Amz-")}
        names = ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")
        _require(parts, names, "A presigned URL requires the parameter X-Amz-{}.")
        if parts["Algorithm"] != ALGORITHM:
            raise EC2Error("IncompleteSignature", reason=f"X-Amz-Algorithm must be {ALGORITHM}.")
        seconds = parts["Expires"]
        if not re.fullmatch(r"[0-9]{1,6}", seconds) or not 1 <= int(seconds) <= MAX_LIFETIME.total_seconds():
            raise EC2Error("IncompleteSignature", reason="X-Amz-Expires must be a number of seconds from 1 to 604800.")
        return cls._from_parts(request, parts, timedelta(seconds=int(seconds)))

    @classmethod
    def _from_parts(
        cls, request: Ec2Request, parts: Mapping[str, str], lifetime: timedelta | None = None
    ) -> "SignatureV4":
        if any(len(parts[name]) > MAX_FIELD for name in ("Credential", "Date", "Signature")):
            raise EC2Error("IncompleteSignature", reason=f"A part of it is longer than {MAX_FIELD} characters.")
        if parts["SignedHeaders"].count(";") >= MAX_SIGNED_HEADERS:
            raise EC2Error("IncompleteSignature", reason=f"More than {MAX_SIGNED_HEADERS} headers are signed.")
        scope = parts["Credential"].rsplit("/", 4)
        if len(scope) != 5 or scope[4] != "aws4_request":
            raise EC2Error("IncompleteSignature", reason="Credential must be KEY/DATE/REGION/SERVICE/aws4_request.")
        signature = cls(
            request=request,
            access_key_id=scope[0],
            date=scope[1],
            region=scope[2],
            service=scope[3],
            timestamp=parts["Date"],
            # Some clients write a space after the semicolons; the canonical request never has one.
            signed_headers=frozenset(name.strip().lower() for name in parts["SignedHeaders"].split(";")),
            text=parts["Signature"],
            lifetime=lifetime,
        )
        signature._check_signed_content()
        return signature

    def _check_signed_content(self) -> None:
        """Check that the signature covers the host and the body, and that date and scope agree."""
        if "host" not in self.signed_headers:
            raise EC2Error("IncompleteSignature", reason="'Host' must be a 'SignedHeader' in the AWS Authorization.")
        _require_host(self.request)
        digest = self.request.header("x-amz-content-sha256") if "x-amz-content-sha256" in self.signed_headers else None
        body_differs = digest is not None and digest != sha256(self.request.body).hexdigest()
        if body_differs or self.date != self.timestamp[:8]:
            raise EC2Error("AuthFailure")

    @property
    def method(self) -> str:
        """The signing method, for the log."""
        return "version 4, header" if self.lifetime is None else "version 4, presigned"

    @property
    def signed_at(self) -> datetime:
        """The request's own time."""
        with suppress(ValueError):
            if _AMZ_DATE.fullmatch(self.timestamp):
                return datetime.fromisoformat(self.timestamp)
        raise _date_error()

    def check_time(self, now: datetime) -> None:
        """Raise RequestExpired if the request is too old, or from the future."""
        if not now - (self.lifetime or MAX_CLOCK_SKEW) <= self.signed_at <= now + MAX_CLOCK_SKEW:
            raise EC2Error("RequestExpired")

    @cached_property
    def canonical(self) -> str:
        """The canonical request, with the Host header as it arrived."""
        canonical: str = self._signer("").canonical_request(self._aws_request)
        return canonical

    def compute_signatures(self, secret: str) -> Iterator[str]:
        """Yield the valid signatures: with the port in the Host header, and without it (Net::Amazon::EC2)."""
        signer, aws_request = self._signer(secret), self._aws_request
        yield signer.signature(signer.string_to_sign(aws_request, self.canonical), aws_request)
        if port := _require_host(self.request).port:
            host = " ".join((self.request.header("host") or "").split())
            # Each header is a line that starts with its name, and no value has a line end: only the Host line fits.
            lines = f"\nhost:{host}\n", f"\nhost:{host.removesuffix(f':{port}')}\n"
            yield signer.signature(signer.string_to_sign(aws_request, self.canonical.replace(*lines, 1)), aws_request)

    def _signer(self, secret: str) -> "_ServerSigner":
        return _ServerSigner(Credentials(self.access_key_id, secret), self.service, self.region)

    @cached_property
    def _aws_request(self) -> AWSRequest:
        """The request in botocore's form, with only the headers that the client signed."""
        aws_request = AWSRequest(self.request.method, f"http://host{self.request.path}", data=self.request.body)
        aws_request.params = [pair for pair in self.request.query_form.items() if pair[0] != "X-Amz-Signature"]
        aws_request.context["timestamp"] = self.timestamp
        for name, value in self.request.headers:
            if name in self.signed_headers:
                aws_request.headers.add_header(name, value)
        return aws_request


class _ServerSigner(SigV4Auth):  # type: ignore[misc]  # botocore ships no types
    """botocore's signer, which signs here the headers that the client signed and the body as received."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
        """Return all headers: `_aws_request` has only signed ones (botocore's method would skip User-Agent, too)."""
        return request.headers

    def payload(self, request: AWSRequest) -> str:
        """Return the hexadecimal digest of the body."""
        return sha256(request.data).hexdigest()


@dataclass(frozen=True)
class SignatureV2:
    """A signature of version 2, over the parameters.

    Attributes:
        request: The signed request.
        access_key_id: The id of the key that the request claims to be signed with.
        text: The signature as received, base64.
    """

    request: Ec2Request
    access_key_id: str
    text: str = field(repr=False)

    @classmethod
    def from_parameters(cls, request: Ec2Request) -> "SignatureV2":
        """Read AWSAccessKeyId, Signature, SignatureVersion and SignatureMethod from the parameters."""
        form = request.form
        for name in ("AWSAccessKeyId", "Signature", "SignatureVersion", "SignatureMethod"):
            if name not in form:
                raise EC2Error("MissingParameter", name=name)
            if len(form[name]) > MAX_FIELD:
                raise EC2Error("InvalidParameterValue", f"Value for parameter {name} is invalid (too long).")
        for name, required in (("SignatureVersion", "2"), ("SignatureMethod", "HmacSHA256")):
            if form[name] != required:
                raise EC2Error("InvalidParameterValue", name=name, value=form[name])
        return cls(request, form["AWSAccessKeyId"], form["Signature"])

    def check_time(self, now: datetime) -> None:
        """Raise RequestExpired if the request is too old, or from the future."""
        form = self.request.form
        match ("Timestamp" in form, "Expires" in form):
            case (True, False):
                is_valid = abs(now - _iso_time("Timestamp", form)) <= MAX_CLOCK_SKEW
            case (False, True):
                is_valid = now <= _iso_time("Expires", form) <= now + MAX_LIFETIME
            case _:
                raise EC2Error("IncompleteSignature", reason="Give either Timestamp or Expires.")
        if not is_valid:
            raise EC2Error("RequestExpired")

    @property
    def method(self) -> str:
        """The signing method, for the log."""
        return "version 2"

    @property
    def signed_at(self) -> datetime:
        """The request's own time, or the time when it expires."""
        return _iso_time("Timestamp" if "Timestamp" in self.request.form else "Expires", self.request.form)

    @cached_property
    def canonical(self) -> str:
        """The path and the sorted parameters; `compute_signatures` puts method and host before them."""
        _require_host(self.request)
        # botocore sorts and encodes the parameters, without a secret; its signature is not used.
        signer, path = SigV2Auth(Credentials("", "")), self.request.path
        parameters, _ = signer.calc_signature(AWSRequest(self.request.method, f"http://host{path}"), self.request.form)
        return f"{path}\n{parameters}"

    def compute_signatures(self, secret: str) -> Iterator[str]:
        """Yield the valid signatures: with the port in the host name, and without it."""
        host = _require_host(self.request)
        for name in dict.fromkeys((str(host), host.name)):
            text = f"{self.request.method}\n{name}\n{self.canonical}".encode()
            yield base64.b64encode(hmac.digest(secret.encode(), text, "sha256")).decode()


def _require_host(request: Ec2Request) -> Host:
    if request.host is None:
        raise EC2Error("IncompleteSignature", reason="The Host header is missing or not a host's name.")
    return request.host


def _require(parts: Mapping[str, str], names: tuple[str, ...], template: str) -> None:
    missing = [template.format(name) for name in names if not parts.get(name)]
    if missing:
        raise EC2Error("IncompleteSignature", reason=" ".join(missing))


def _header_time(request: Ec2Request) -> str:
    """Return the request's time from X-Amz-Date, else from Date, in the format that is signed."""
    timestamp = request.header("x-amz-date") or request.header("date")
    if timestamp is None:
        reason = "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
        raise EC2Error("IncompleteSignature", reason=reason)
    if _AMZ_DATE.fullmatch(timestamp):
        return timestamp
    try:
        return parsedate_to_datetime(timestamp).astimezone(UTC).strftime(_AMZ_DATE_FORMAT)
    except (ValueError, OverflowError):
        raise _date_error() from None


def _date_error() -> EC2Error:
    reason = "The date must be in the form of ISO 8601, such as 20261123T082646Z."
    return EC2Error("IncompleteSignature", reason=reason)


def _iso_time(name: str, form: Mapping[str, str]) -> datetime:
    try:
        time = datetime.fromisoformat(form[name])
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise EC2Error("InvalidParameterValue", name=name, value=form[name]) from None
