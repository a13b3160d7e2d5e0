"""Folders in buckets and on web servers; implements the protocols of `thrave.cli.folders`.

For a bucket Thrave uses the credentials, profile, region, endpoint and CA certificates that botocore finds, and the
proxy of the environment. Credentials are never sent to a web server, and redirects are not followed.
"""

from __future__ import annotations

import ipaddress
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import click

from thrave.buckets.base import check_readable_bucket_name
from thrave.buckets.errors import (
    BucketError,
    Kind,
    NoSuchBucket,
    NoSuchKey,
    StoreError,
    TransientError,
    UnreachableError,
    WrongRegion,
)
from thrave.buckets.retrying_store import retry_store
from thrave.buckets.s3_client import Credentials, HttpTransport, StoreConfig
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.cli.folders import FileMissingError, FolderError, FolderRefusedError
from thrave.cli.interrupts import CallGivenUpError, call_with_timeout, check_interrupted, give_up_on_interrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_Answer = TypeVar("_Answer")

RETRY_TIMEOUT = 60.0  # seconds from a call's first failure to the last attempt
_UNREACHABLE = 2  # attempts to connect to a server that has not responded yet
_DEFAULT_REGION = "us-east-1"  # of S3, if the settings name none
DEADLINE = 900.0  # seconds for one file, even if data arrives steadily


class S3Folder:
    """A folder of a bucket."""

    is_far = True

    def __init__(self, objects: S3ObjectClient, bucket: str, folder: str, *, keyless: str | None = None) -> None:
        """Use a store for the keys of a bucket that begin with `folder/`, or, if that is empty, have no slash.

        Args:
            objects: The store.
            bucket: Of any name that a URL can hold.
            folder: With slashes or without.
            keyless: Where credentials were looked for, if none were found.
        """
        self._objects = objects
        self._server = _Server(keyless=keyless)
        self._bucket = bucket
        self._folder = f"{folder.strip('/')}/" if folder.strip("/") else ""

    def where(self, filename: str) -> str:
        """See Folder."""
        return f"s3://{self._bucket}/{self._folder}{filename}"

    def read(self, filename: str, most: int) -> bytes:
        """See Folder."""
        return self._call(filename, lambda key: self._objects.get_range(self._bucket, key, 0, most + 1))

    def size(self, filename: str) -> int | None:
        """See Folder."""
        head = self._call(filename, lambda key: self._objects.head(self._bucket, key))
        return None if head is None else head.size

    def write(self, filename: str, data: bytes) -> None:
        """See WritableFolder."""
        self._call(filename, lambda key: self._objects.put(self._bucket, key, data))

    def remove(self, filenames: Iterable[str]) -> None:
        """See WritableFolder."""
        keys = [self._folder + filename for filename in filenames]
        self._call("", lambda _: self._objects.delete(self._bucket, keys))

    def _call(self, filename: str, call: Callable[[str], _Answer]) -> _Answer:
        return self._server.call(self.where(filename), lambda: call(self._folder + filename))


class WebFolder:
    """A folder of a web server."""

    is_far = True

    def __init__(self, transport: HttpTransport, url: str) -> None:
        """Use connections to a server for the files below a URL."""
        self._transport = transport
        self._url = url.rstrip("/")
        self._server = _Server(is_web=True)

    def where(self, filename: str) -> str:
        """See Folder."""
        return f"{self._url}/{quote(filename, safe='')}"

    def read(self, filename: str, most: int) -> bytes:
        """See Folder."""
        url = self.where(filename)
        return self._server.call(url, lambda: self._transport.send("GET", url, {}, limit=most + 1)).body

    def size(self, filename: str) -> int | None:
        """See Folder."""
        url = self.where(filename)
        try:
            return self._server.call(url, lambda: self._transport.send("HEAD", url, {}, limit=0).content_length)
        except FileMissingError:
            return None


def web_folder(url: str) -> WebFolder:
    """The folder of a web server.

    Raises:
        ValueError: The URL has a user, query or fragment, or is http:// to another machine.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"the address {parts.hostname or 'without host'} must not contain a user, a query or a #")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError(f"http:// is allowed only for this machine; use https:// for {parts.hostname}")
    give_up_on_interrupt()
    endpoint = f"{parts.scheme}://{parts.netloc}"
    try:
        transport = HttpTransport(StoreConfig(endpoint=endpoint, proxy=_proxy(parts.scheme, parts.netloc)))
    except BucketError as error:
        raise ValueError(error.message) from None
    return WebFolder(transport, endpoint + quote(parts.path, safe="/%"))


def s3_folder(bucket: str, folder: str) -> S3Folder:
    """A folder of a bucket, as the user's own AWS settings reach it.

    Raises:
        ValueError: No bucket can have that name, or the settings are wrong.
    """
    from botocore.exceptions import BotoCoreError

    give_up_on_interrupt()
    try:
        check_readable_bucket_name(bucket)
        connection = store_connection()
        keyless = None if connection.credentials else _places_of_credentials()
        return S3Folder(S3ObjectClient(connection), bucket, folder, keyless=keyless)
    except BotoCoreError as error:
        raise ValueError(str(error)) from None
    except BucketError as error:
        raise ValueError(f"s3://{bucket}: {error.message}") from None


def store_connection() -> StoreConfig:
    """The store that every AWS tool would call for S3 on this machine, and with which keys.

    Raises:
        botocore.exceptions.BotoCoreError: The user's settings contradict themselves.
        StoreSettingError: The URL of the store or of the proxy cannot be used.
    """
    from botocore.session import get_session

    session = get_session()
    meta = session.create_client("s3").meta
    found = session.get_credentials()
    keys = found and found.get_frozen_credentials()
    ca = session.get_config_variable("ca_bundle")
    where = urlsplit(meta.endpoint_url)
    return StoreConfig(
        endpoint=meta.endpoint_url,
        region=_DEFAULT_REGION if meta.region_name in {None, "aws-global"} else meta.region_name,
        credentials=Credentials(
            access_key_id=keys.access_key, secret_access_key=keys.secret_key, session_token=keys.token
        ) if keys else None,
        addressing="virtual" if (meta.config.s3 or {}).get("addressing_style") == "virtual" else "path",
        ca=Path(ca) if ca else None,
        proxy=_proxy(where.scheme, where.netloc),
    )  # fmt: skip


def _places_of_credentials() -> str:
    """Where credentials are looked for, for people."""
    from botocore.session import get_session

    session = get_session()
    file, profile = session.get_config_variable("credentials_file"), session.get_config_variable("profile") or "default"
    return (
        f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile '{profile}' in {file} and in the AWS configuration, "
        "and the metadata of the container or machine"
    )


def _proxy(scheme: str, where: str) -> str | None:
    """The proxy of the environment for a server: `https_proxy`, `http_proxy`, `all_proxy`; none for `no_proxy`."""
    host = urlsplit(f"//{where}").hostname or ""
    if proxy_bypass(where) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(scheme) or proxies.get("all") or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server:
    """Calls one server, retries temporary failures, and translates its errors."""

    def __init__(self, *, is_web: bool = False, keyless: str | None = None) -> None:
        """Call a store or a web server; `keyless` lists the places that were searched, if no credentials were found."""
        self._is_web = is_web
        self._keyless = keyless
        self._has_responded = False

    def call(self, where: str, call: Callable[[], _Answer]) -> _Answer:
        """Make a call about the file `where`, with retries.

        A server that has never responded is tried twice; other failures are retried for `RETRY_TIMEOUT` seconds.

        Raises:
            FolderError: The call failed.
        """

        def attempt() -> _Answer:
            try:
                answer = call_with_timeout(call, DEADLINE)
            except (UnreachableError, CallGivenUpError):
                raise
            except BucketError as error:
                self._has_responded = True
                if self._is_web and 300 <= error.status < 400:  # only S3 has temporary redirects
                    raise StoreError(error.code, error.status, error.message) from None
                raise
            self._has_responded = True
            return answer

        unreachable = None if self._has_responded else _UNREACHABLE
        with _faults(where, self._keyless):
            return retry_store(attempt, RETRY_TIMEOUT, _tell, unreachable_attempts=unreachable)


def _tell(error: TransientError, seconds: float) -> None:
    check_interrupted()
    click.echo(f"thrave: {error}; retrying in {seconds:.1f} s", err=True)


@contextmanager
def _faults(where: str, keyless: str | None) -> Iterator[None]:
    """Translate errors of a store or a web server to FolderError."""
    try:
        yield
    except (NoSuchKey, NoSuchBucket) as error:
        raise FileMissingError(f"{where} does not exist: {error.message}") from error
    except UnreachableError as error:
        raise FolderError(f"{where}: {error}. Check the address and the network.") from error
    except WrongRegion as error:
        settings = "AWS_REGION, and AWS_ENDPOINT_URL_S3 if you use it"
        raise FolderError(f"{where} is in another region: {error.location}. Set {settings}.") from error
    except BucketError as error:
        if error.kind is Kind.KEY and keyless is not None:
            raise FolderRefusedError(f"{where}: {error}. No credentials were found; tried {keyless}.") from error
        if error.kind is Kind.KEY:
            raise FolderRefusedError(f"{where}: {error}") from error
        if 300 <= error.status < 400:
            raise FolderError(
                f"{where} is redirected, and redirects are not followed. Pass the new address: {error.message}"
            ) from error
        raise FolderError(f"{where}: {error}") from error
    except CallGivenUpError as error:
        raise FolderError(f"{where}: {error}") from error
