"""One HTTP request as it arrived, before anything in it is trusted.

Proves who is calling: the signature of a request, checked with the secret of the access key that it names.

Three ways of signing are understood: signature version 4 in the Authorization header, version 4 in the query string
(a presigned URL), and version 2 with HmacSHA256 in the parameters (clients of 2013 and before, libcloud, VM::EC2).
botocore.auth signs the received request again and the two signatures are compared in constant time. Closed here,
because botocore's signer is a client and does not check what a server must:

- the body must have the digest that a signed X-Amz-Content-SHA256 states (botocore takes the header's word);
- the request must be of the last 15 minutes, a presigned URL within its life of at most seven days;
- the host must be signed, and the date of the scope be the request's;
- an unknown key and a wrong signature cannot be told apart, by answer or by time: a secret is signed with either way.

What is signed is put into its canonical form once for a request, in time that is linear in its size; a secret costs an
HMAC or two. Whatever reading a request raises here is one of ours, `UnreadableRequest` at the worst.

Any region and service in the scope is accepted: old clients guess them from the host name (boto 2 signs for region `0`,
service `127` when told to use 127.0.0.1). Nothing here ever repeats an Authorization header, a signature or a secret.

Sources: AWS, "Signature Version 4 signing process" and "Signature Version 2 signing process"; AWS's own words for
incomplete signatures.
"""

import base64
import hmac
import ipaddress
import re
import secrets
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

from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import ProtocolError, join_forms, read_form
from thrave.identity.accounts import AccessKey, KeyCache

_MAX_HOST = 262  # characters: a name has 253 at most (RFC 1035), then a colon and a port


_NAMED = re.compile(r"([A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


_IPV6 = re.compile(r"\[([0-9A-Za-z:.%]+)\](?::([0-9]{1,5}))?")


_MAX_PORT = 65535


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
        """Read a Host header; None if it is not a host's name or address, with or without a port."""
        if len(text) > _MAX_HOST:
            return None
        found = _NAMED.fullmatch(text) or _IPV6.fullmatch(text)
        if found is None or int(found[2] or 0) > _MAX_PORT:
            return None
        if text.startswith("["):
            try:
                ipaddress.IPv6Address(found[1])
            except ValueError:
                return None
        return cls((f"[{found[1]}]" if text.startswith("[") else found[1]).lower(), found[2] or "")

    def __str__(self) -> str:
        """Return it as a URL has it."""
        return f"{self.name}:{self.port}" if self.port else self.name


@dataclass(frozen=True)
class Ec2Request:
    """One HTTP request, whole.

    Attributes:
        method: `GET` or `POST`.
        path: As received, without the query string.
        query: The query string as received.
        headers: Names in lower case with their values, in the order received.
        body: At most as long as the API's limit.
        source_ip: The address of the peer; None if it is not known.
        is_secure: Whether it came over TLS.
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
        """Bytes of all that may have to be decoded and signed again."""
        headers = sum(len(name) + len(value) for name, value in self.headers)
        return len(self.path) + len(self.query) + len(self.body) + headers

    @cached_property
    def form(self) -> dict[str, str]:
        """The parameters, of query string and body together.

        Raises:
            ProtocolError: They cannot be decoded, are too many, or one is given twice.
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
        """The Host header; None if it is missing or is not a host."""
        return Host.parse(self.header("host") or "")

    def header(self, name: str) -> str | None:
        """Return a header's value by its name in lower case: the first, should there be several; None if none."""
        return next((value for each, value in self.headers if each == name), None)


ALGORITHM = "AWS4-HMAC-SHA256"


SKEW = timedelta(minutes=15)


LONGEST_LIFE = timedelta(days=7)


MAX_SIGNED_HEADERS = 50  # SDKs sign fewer than ten


MAX_FIELD = 1024  # characters of a date, a credential or a signature


_AUTHORIZATION_PARTS = 16  # three are used


_AMZ_DATE = re.compile(r"[0-9]{8}T[0-9]{6}Z")


_AMZ_DATE_FORMAT = "%Y%m%dT%H%M%SZ"


# Signed with in place of the secret of a key that is unknown or inactive, so that the work is the same.
_NOBODYS_SECRET = secrets.token_urlsafe(30)


class UnreadableRequest(Exception):
    """Reading a request failed in a way that was not foreseen; the cause is in `__cause__`."""


class Signature(Protocol):
    """What a request says about its own signature, whichever way it is signed."""

    @property
    def way(self) -> str:
        """The way of signing, for people."""

    @property
    def access_key_id(self) -> str:
        """The key that it claims to be signed with."""

    @property
    def text(self) -> str:
        """The signature as received."""

    @property
    def signed_at(self) -> datetime:
        """The request's own time, or when it is to expire."""

    @property
    def canonical(self) -> str:
        """What was signed, in its canonical form. Made once, in time that is linear in the request's size."""

    def check_time(self, now: datetime) -> None:
        """Raise RequestExpired if the request is too old, or from the future."""

    def expected(self, secret: str) -> Iterable[str]:
        """Return the signatures of which the request may carry one, if the secret is the key's."""


def authenticate(
    request: Ec2Request,
    find_key: Callable[[str], AccessKey | None],
    recent: KeyCache,
    now: datetime,
    *,
    version_2: bool = True,
) -> AccessKey:
    """Prove a request's signature and return the key that signed it.

    Args:
        request: As received.
        find_key: Looks an access key up; None if there is none.
        recent: Keys that need not be looked up again. One that is not there is looked up, and so is one that is there
            and has not signed: a refusal takes the same work whether there is such a key or not.
        now: The time, aware.
        version_2: Whether signature version 2 is accepted.

    Raises:
        EC2Error: MissingParameter (no credentials at all), IncompleteSignature, InvalidParameterValue (a way of
            signing that is not accepted), RequestExpired, AuthFailure.
        ProtocolError: The parameters cannot be decoded.
        UnreadableRequest: Reading it failed in a way that was not foreseen.
    """
    with _only_our_errors():
        signature = _read_signature(request, version_2=version_2)
        signature.check_time(now)
        _ = signature.canonical
    for look_up in (recent.find, find_key):
        key = look_up(signature.access_key_id)
        if _has_made(key, signature):
            recent.remember(key)
            return key
    raise EC2Error("AuthFailure")


def read_signature(request: Ec2Request) -> Signature:
    """Read what a request says about its own signature, to report it; nothing of it is proved.

    Raises:
        As `authenticate`, but for RequestExpired.
    """
    with _only_our_errors():
        return _read_signature(request, version_2=True)


def _read_signature(request: Ec2Request, *, version_2: bool) -> Signature:
    _refuse_session_tokens(request)
    ways = {
        "header": request.header("authorization") is not None,
        "presigned": not request.query_form.keys().isdisjoint({"X-Amz-Algorithm", "X-Amz-Signature"}),
        "parameters": not request.form.keys().isdisjoint({"AWSAccessKeyId", "Signature"}),
    }
    match [way for way, used in ways.items() if used]:
        case ["header"]:
            return SignatureV4.of_header(request)
        case ["presigned"]:
            return SignatureV4.of_query(request)
        case ["parameters"]:
            if version_2:
                return SignatureV2.of_parameters(request)
            raise EC2Error("InvalidParameterValue", "This service accepts signature version 4 only.")
        case []:
            raise EC2Error("MissingParameter", name="AWSAccessKeyId")
    raise EC2Error("IncompleteSignature", reason="Only one way of signing may be used in a request.")


@contextmanager
def _only_our_errors() -> Iterator[None]:
    """Turn whatever a library raises over a stranger's request into an error of ours."""
    try:
        yield
    except (EC2Error, ProtocolError):
        raise
    except Exception as error:
        raise UnreadableRequest from error


def _has_made(key: AccessKey | None, signature: Signature) -> TypeGuard[AccessKey]:
    is_good = key is not None and key.status == "Active"
    expected = signature.expected(key.secret_access_key if key is not None and is_good else _NOBODYS_SECRET)
    return any(hmac.compare_digest(signature.text.encode(), each.encode()) for each in expected) and is_good


def _refuse_session_tokens(request: Ec2Request) -> None:
    given = request.header("x-amz-security-token") is not None
    if given or not request.form.keys().isdisjoint({"X-Amz-Security-Token", "SecurityToken"}):
        raise EC2Error("IncompleteSignature", reason="This service issues no session tokens: send none.")


@dataclass(frozen=True)
class SignatureV4:
    """A signature of version 4.

    Attributes:
        request: What is signed.
        access_key_id: The key that it claims to be signed with.
        date: Of the scope, YYYYMMDD.
        region: Of the scope; not compared with anything.
        service: Of the scope; not compared with anything.
        timestamp: The request's own, such as 20261123T082646Z.
        signed_headers: Names in lower case, at most `MAX_SIGNED_HEADERS`.
        text: The signature as received, hexadecimal.
        life: How long a presigned URL is good for; None in a header's signature.
    """

    request: Ec2Request
    access_key_id: str
    date: str
    region: str
    service: str
    timestamp: str
    signed_headers: frozenset[str]
    text: str = field(repr=False)
    life: timedelta | None = None

    @classmethod
    def of_header(cls, request: Ec2Request) -> "SignatureV4":
        """Read the Authorization header, whose parts may be separated by a comma with or without a space."""
        scheme, _, rest = (request.header("authorization") or "").partition(" ")
        if scheme != ALGORITHM:
            raise EC2Error("IncompleteSignature", reason=f"The Authorization header must begin with {ALGORITHM}.")
        parts = dict(_name_and_value(part) for part in rest.split(",", _AUTHORIZATION_PARTS))
        _require(parts, ("Credential", "SignedHeaders", "Signature"), "Authorization header requires '{}' parameter.")
        return cls._of(request, {**parts, "Date": _header_time(request)})

    @classmethod
    def of_query(cls, request: Ec2Request) -> "SignatureV4":
        """Read the X-Amz-… parameters of a presigned URL."""
        given = request.query_form.items()
        parts = {name.removeprefix("X-Amz-"): value for name, value in given if name.startswith("X-Amz-")}
        names = ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")
        _require(parts, names, "A presigned URL requires the parameter X-Amz-{}.")
        if parts["Algorithm"] != ALGORITHM:
            raise EC2Error("IncompleteSignature", reason=f"X-Amz-Algorithm must be {ALGORITHM}.")
        return cls._of(request, parts, _life(parts["Expires"]))

    @classmethod
    def _of(cls, request: Ec2Request, parts: Mapping[str, str], life: timedelta | None = None) -> "SignatureV4":
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
            life=life,
        )
        signature._check_cover()
        return signature

    def _check_cover(self) -> None:
        """Check that the signature covers what it must, whoever made it."""
        if "host" not in self.signed_headers:
            raise EC2Error("IncompleteSignature", reason="'Host' must be a 'SignedHeader' in the AWS Authorization.")
        _host(self.request)
        stated = self.request.header("x-amz-content-sha256") if "x-amz-content-sha256" in self.signed_headers else None
        body_differs = stated is not None and stated != sha256(self.request.body).hexdigest()
        if body_differs or self.date != self.timestamp[:8]:
            raise EC2Error("AuthFailure")

    @property
    def way(self) -> str:
        """The way of signing, for people."""
        return "version 4, header" if self.life is None else "version 4, presigned"

    @property
    def signed_at(self) -> datetime:
        """The request's own time."""
        return _amz_date(self.timestamp)

    def check_time(self, now: datetime) -> None:
        """Raise RequestExpired if the request is too old, or from the future."""
        if not now - (self.life or SKEW) <= self.signed_at <= now + SKEW:
            raise EC2Error("RequestExpired")

    @cached_property
    def canonical(self) -> str:
        """The canonical request, with the Host header as it arrived."""
        canonical: str = self._signer("").canonical_request(self._again)
        return canonical

    def expected(self, secret: str) -> Iterator[str]:
        """Yield the signatures that clients make: with the port in the host's name, and (Net::Amazon::EC2) without."""
        signer = self._signer(secret)
        yield signer.signature(signer.string_to_sign(self._again, self.canonical), self._again)
        if port := _host(self.request).port:
            given = " ".join((self.request.header("host") or "").split())
            # A header's line begins with its name, and no value holds the end of a line: this is the Host header's.
            lines = f"\nhost:{given}\n", f"\nhost:{given.removesuffix(f':{port}')}\n"
            yield signer.signature(signer.string_to_sign(self._again, self.canonical.replace(*lines, 1)), self._again)

    def _signer(self, secret: str) -> "_Signer":
        return _Signer(Credentials(self.access_key_id, secret), self.service, self.region)

    @cached_property
    def _again(self) -> AWSRequest:
        """The request as botocore would send it, with what the client has signed and nothing else."""
        again = AWSRequest(self.request.method, f"http://host{self.request.path}", data=self.request.body)
        again.params = [pair for pair in self.request.query_form.items() if pair[0] != "X-Amz-Signature"]
        again.context["timestamp"] = self.timestamp
        for name, value in self.request.headers:
            if name in self.signed_headers:
                again.headers.add_header(name, value)
        return again


class _Signer(SigV4Auth):  # type: ignore[misc]  # botocore ships no types
    """botocore's signer, made to sign the headers that the client signed and the body that arrived."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
        """Every header of the request: the others were left out (botocore's own would leave User-Agent out, too)."""
        return request.headers

    def payload(self, request: AWSRequest) -> str:
        """The digest of the body, hexadecimal."""
        return sha256(request.data).hexdigest()


@dataclass(frozen=True)
class SignatureV2:
    """A signature of version 2, over the parameters.

    Attributes:
        request: What is signed.
        access_key_id: The key that it claims to be signed with.
        text: The signature as received, base64.
    """

    request: Ec2Request
    access_key_id: str
    text: str = field(repr=False)

    @classmethod
    def of_parameters(cls, request: Ec2Request) -> "SignatureV2":
        """Read AWSAccessKeyId, Signature and the rest from the parameters."""
        form = request.form
        for name in ("AWSAccessKeyId", "Signature", "SignatureVersion", "SignatureMethod"):
            if name not in form:
                raise EC2Error("MissingParameter", name=name)
            if len(form[name]) > MAX_FIELD:
                raise EC2Error("InvalidParameterValue", f"Value for parameter {name} is invalid (too long).")
        for name, wanted in (("SignatureVersion", "2"), ("SignatureMethod", "HmacSHA256")):
            if form[name] != wanted:
                raise EC2Error("InvalidParameterValue", name=name, value=form[name])
        return cls(request, form["AWSAccessKeyId"], form["Signature"])

    def check_time(self, now: datetime) -> None:
        """Raise RequestExpired if the request is too old, or from the future."""
        form = self.request.form
        match ("Timestamp" in form, "Expires" in form):
            case (True, False):
                good = abs(now - _iso_time("Timestamp", form)) <= SKEW
            case (False, True):
                good = now <= _iso_time("Expires", form) <= now + LONGEST_LIFE
            case _:
                raise EC2Error("IncompleteSignature", reason="Give either Timestamp or Expires.")
        if not good:
            raise EC2Error("RequestExpired")

    @property
    def way(self) -> str:
        """The way of signing, for people."""
        return "version 2"

    @property
    def signed_at(self) -> datetime:
        """The request's own time, or when it is to expire."""
        return _iso_time("Timestamp" if "Timestamp" in self.request.form else "Expires", self.request.form)

    @cached_property
    def canonical(self) -> str:
        """The path and the sorted parameters; method and host are put before them."""
        _host(self.request)
        anonymous, path = SigV2Auth(Credentials("", "")), self.request.path
        parameters, _ = anonymous.calc_signature(
            AWSRequest(self.request.method, f"http://host{path}"), self.request.form
        )
        return f"{path}\n{parameters}"

    def expected(self, secret: str) -> Iterator[str]:
        """Yield the signatures that clients make: with the port in the host's name, and without it."""
        host = _host(self.request)
        for name in dict.fromkeys((str(host), host.name)):
            text = f"{self.request.method}\n{name}\n{self.canonical}".encode()
            yield base64.b64encode(hmac.digest(secret.encode(), text, "sha256")).decode()


def _host(request: Ec2Request) -> Host:
    if request.host is None:
        raise EC2Error("IncompleteSignature", reason="The Host header is missing or not a host's name.")
    return request.host


def _require(given: Mapping[str, str], names: tuple[str, ...], complaint: str) -> None:
    missing = [complaint.format(name) for name in names if not given.get(name)]
    if missing:
        raise EC2Error("IncompleteSignature", reason=" ".join(missing))


def _name_and_value(part: str) -> tuple[str, str]:
    name, _, value = part.strip().partition("=")
    return name, value


def _life(seconds: str) -> timedelta:
    if not re.fullmatch(r"[0-9]{1,6}", seconds) or not 1 <= int(seconds) <= LONGEST_LIFE.total_seconds():
        raise EC2Error("IncompleteSignature", reason="X-Amz-Expires must be a number of seconds from 1 to 604800.")
    return timedelta(seconds=int(seconds))


def _header_time(request: Ec2Request) -> str:
    """Return the request's time from X-Amz-Date, else from Date, in the form that is signed."""
    date = request.header("date")
    timestamp = request.header("x-amz-date") or date
    if timestamp is None:
        reason = "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
        raise EC2Error("IncompleteSignature", reason=reason)
    return timestamp if _AMZ_DATE.fullmatch(timestamp) else _from_http_date(timestamp)


def _from_http_date(text: str) -> str:
    try:
        return parsedate_to_datetime(text).astimezone(UTC).strftime(_AMZ_DATE_FORMAT)
    except (ValueError, OverflowError):
        reason = "The date must be in the form of ISO 8601, such as 20261123T082646Z."
        raise EC2Error("IncompleteSignature", reason=reason) from None


def _amz_date(timestamp: str) -> datetime:
    with suppress(ValueError):
        if _AMZ_DATE.fullmatch(timestamp):
            return datetime.fromisoformat(timestamp)
    raise EC2Error("IncompleteSignature", reason="The date must be in the form of ISO 8601, such as 20261123T082646Z.")


def _iso_time(name: str, form: Mapping[str, str]) -> datetime:
    try:
        moment = datetime.fromisoformat(form[name])
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise EC2Error("InvalidParameterValue", name=name, value=form[name]) from None
