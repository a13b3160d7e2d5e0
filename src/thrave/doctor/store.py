"""Checks of the store as a whole: that it answers, TLS, its clock, and that it knows the key. Nothing is written."""

import shutil
import socket
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, urlsplit

from thrave.buckets.errors import BucketError
from thrave.buckets.signing import SMALL
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
        subject.transport.send("GET", f"{subject.connection.endpoint.rstrip('/')}/", {}, limit=SMALL)
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
    if subject.connection.proxy is not None:
        raise NotTried("it lies behind a proxy")
    context = ssl.create_default_context(cafile=subject.connection.ca)
    host = url.hostname or ""
    with (
        socket.create_connection((host, url.port or 443), timeout=STORE_SECONDS) as line,
        context.wrap_socket(line, server_hostname=host) as secure,
    ):
        certificate, version = secure.getpeercert() or {}, secure.version()
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    days = (until - utc_now()).days
    if days < LEAST_DAYS:
        raise Trouble(f"the certificate ends in {days} days, on {until:%Y-%m-%d}")
    return f"{version}, certificate for {days} days"


def key(subject: Subject) -> str:
    """List the buckets of the key with which requests are signed."""
    _s3(subject)
    subject.requests.send("GET", None)
    credentials = subject.holder.credentials if subject.by_owners_key else subject.connection.credentials
    assert credentials is not None
    return credentials.access_key_id


def clock(subject: Subject) -> str:
    """Compare the time of an answer with ours."""
    _s3(subject)
    said = subject.requests.send("GET", None).headers.get("Date")
    if said is None:
        raise NotTried("the store does not tell its time")
    ahead = (parsedate_to_datetime(said) - utc_now()).total_seconds()
    if abs(ahead) > CLOCK_SECONDS:
        raise Trouble(f"{ahead:+.0f} s from ours")
    return f"{ahead:+.0f} s"


def _s3(subject: Subject) -> SplitResult:
    if subject.settings.store != "s3":
        raise NotTried("the store is a directory")
    return urlsplit(subject.connection.endpoint)
