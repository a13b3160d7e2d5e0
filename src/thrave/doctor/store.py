"""Checks of the store as a whole: that it answers, TLS, its clock, and that it knows the key. Nothing is written."""

import shutil
import ssl
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPSConnection
from urllib.parse import SplitResult, urlsplit

from thrave.buckets.errors import BucketError
from thrave.buckets.s3_client import SMALL, Proxy
from thrave.database import utc_now
from thrave.doctor.errors import NotTried, Trouble
from thrave.doctor.subject import STORE_SECONDS, Subject

CLOCK_SECONDS = 15 * 60
"""How far the time of a signed request may be from the store's (AWS S3, RequestTimeTooSkewed)."""
LEAST_DAYS = 7
"""Of the store's certificate: fewer, and it may expire before somebody has renewed it."""
LEAST_FREE = 16 << 20
"""Bytes of a disk with bucket directories: with fewer not even the first part of a bundle is sure to fit."""


def answers(subject: Subject) -> str:
    """Ask a store for anything at all, unsigned; or see that a disk has room."""
    if subject.settings.store == "directory":
        return _room(subject)
    try:
        subject.transport.send("GET", subject.connection.url(), {}, limit=SMALL)
    except BucketError as error:
        if error.is_the_stores:
            raise
    return subject.connection.endpoint


def _room(subject: Subject) -> str:
    subject.buckets.owner(subject.bucket)
    folder = subject.settings.directory.buckets
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise Trouble(f"{folder} has {free >> 20} MiB left")
    return f"{folder}, {free >> 20} MiB free"


def tls(subject: Subject) -> str:
    """Shake hands as every request does, and see how long the certificate lives."""
    url = _s3(subject)
    if url.scheme != "https":
        raise NotTried("the store is called by plain HTTP")
    context = ssl.create_default_context(cafile=subject.connection.ca)
    host, port = url.hostname or "", url.port or 443
    line = HTTPSConnection(host, port, timeout=STORE_SECONDS, context=context)
    if subject.connection.proxy is not None:
        proxy = Proxy.read(subject.connection.proxy)
        through = urlsplit(proxy.url)
        if through.scheme == "https":
            raise NotTried("the proxy is called by TLS, too")
        line = HTTPSConnection(through.hostname or "", through.port or 80, timeout=STORE_SECONDS, context=context)
        line.set_tunnel(host, port, dict(proxy.headers))
    with closing(line):
        line.connect()
        secure = line.sock
        assert isinstance(secure, ssl.SSLSocket)
        certificate, version = secure.getpeercert() or {}, secure.version()
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    days = (until - utc_now()).days
    if days < LEAST_DAYS:
        raise Trouble(f"the certificate ends in {days} days, on {until:%Y-%m-%d}")
    return f"{version}, certificate for {days} days"


def key(subject: Subject) -> str:
    """List the buckets of the key with which requests are signed. A key that may not list them is known, too."""
    _s3(subject)
    _, may_list = _ask(subject)
    credentials = subject.holder.credentials if subject.by_owners_key else subject.connection.current_credentials()
    assert credentials is not None
    return credentials.access_key_id + ("" if may_list else ", which may not list its buckets")


def clock(subject: Subject) -> str:
    """Compare the time of an answer with ours."""
    _s3(subject)
    headers, _ = _ask(subject)
    said = headers.get("Date")
    if said is None:
        raise NotTried("the store does not tell its time")
    ahead = (parsedate_to_datetime(said) - utc_now()).total_seconds()
    if abs(ahead) > CLOCK_SECONDS:
        raise Trouble(f"{ahead:+.0f} s from ours")
    return f"{ahead:+.0f} s"


def _ask(subject: Subject) -> tuple[Mapping[str, str], bool]:
    """Send a signed request; return the headers of the answer, and whether the key may list its buckets."""
    try:
        return subject.requests.send("GET", None).headers, True
    except BucketError as error:
        if error.code not in ("AccessDenied", "MethodNotAllowed", "NotImplemented"):
            raise
        return error.headers, False


def _s3(subject: Subject) -> SplitResult:
    if subject.settings.store != "s3":
        raise NotTried("the store is a directory")
    return urlsplit(subject.connection.endpoint)
