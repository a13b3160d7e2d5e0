"""Folders in buckets and on web servers; implements the protocols of `thrave.cli.folders`.

For a bucket Thrave uses the credentials, profile, region, endpoint and CA certificates that botocore finds, and the
proxy of the environment. Credentials are never sent to a web server, and redirects are not followed.
"""

from __future__ import annotations

import ipaddress
from contextlib import contextmanager
from datetime import UTC, datetime
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
from thrave.buckets.s3_objects import ListedObject, S3ObjectClient
from thrave.cli.folders import FileMissingError, FolderError, FolderRefusedError, ListedFile
from thrave.cli.interrupts import CallAbandonedError, abandon_calls_on_interrupt, call_with_timeout, check_interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_Result = TypeVar("_Result")

RETRY_TIMEOUT = 60.0  # seconds from a call's first failure to the last attempt
_MAX_CONNECT_ATTEMPTS = 2  # attempts to connect to a server that has not responded yet
_DEFAULT_REGION = "us-east-1"  # of S3, if the settings name none
CALL_TIMEOUT = 900.0  # seconds for one file, even if data arrives steadily


class S3Folder:
    """A folder of a bucket."""

    is_remote = True

    def __init__(self, objects: S3ObjectClient, bucket: str, folder: str, *, searched: str | None = None) -> None:
        """Use the keys of a bucket that begin with `folder/`; without a folder, the keys without a slash.

        Args:
            objects: The store.
            bucket: Any name that a URL can contain.
            folder: With or without slashes at its ends.
            searched: Where credentials were searched, if none were found.
        """
        self._objects = objects
        self._server = _Server(searched=searched)
        self._bucket = bucket
        self._folder = f"{folder.strip('/')}/" if folder.strip("/") else ""

    def display_name(self, filename: str) -> str:
        """See Folder."""
        return f"s3://{self._bucket}/{self._folder}{filename}"

    def read(self, filename: str, max_bytes: int) -> bytes:
        """See Folder."""
        return self._call(filename, lambda key: self._objects.get_range(self._bucket, key, 0, max_bytes + 1))

    def size(self, filename: str) -> int | None:
        """See Folder."""
        head = self._call(filename, lambda key: self._objects.head(self._bucket, key))
        return None if head is None else head.size

    def list_files(self, start: str) -> list[ListedFile]:
        """See WritableFolder. The whole listing has the time limit of one file."""
        found = self._call("", lambda folder: [*self._objects.list_objects(self._bucket, folder + start)])
        return [self._read_entry(listed) for listed in found if "/" not in listed.key.removeprefix(self._folder)]

    def _read_entry(self, listed: ListedObject) -> ListedFile:
        name = listed.key.removeprefix(self._folder)
        try:
            modified = datetime.fromisoformat(listed.last_modified)
            size = int(listed.size)
        except ValueError:
            raise FolderError(f"{self.display_name(name)}: the store's listing has no valid size and time") from None
        return ListedFile(name, size, modified if modified.tzinfo else modified.replace(tzinfo=UTC))

    def write(self, filename: str, data: bytes) -> None:
        """See WritableFolder."""
        self._call(filename, lambda key: self._objects.put(self._bucket, key, data))

    def remove(self, filenames: Iterable[str]) -> None:
        """See WritableFolder."""
        keys = [self._folder + filename for filename in filenames]
        self._call("", lambda _: self._objects.delete(self._bucket, keys))

    def _call(self, filename: str, call: Callable[[str], _Result]) -> _Result:
        return self._server.call(self.display_name(filename), lambda: call(self._folder + filename))


class WebFolder:
    """A folder of a web server."""

    is_remote = True

    def __init__(self, transport: HttpTransport, url: str) -> None:
        """Use connections to a server for the files below a URL."""
        self._transport = transport
        self._url = url.rstrip("/")
        self._server = _Server(is_web=True)

    def display_name(self, filename: str) -> str:
        """See Folder."""
        return f"{self._url}/{quote(filename, safe='')}"

    def read(self, filename: str, max_bytes: int) -> bytes:
        """See Folder."""
        url = self.display_name(filename)
        return self._server.call(url, lambda: self._transport.send("GET", url, {}, limit=max_bytes + 1)).body

    def size(self, filename: str) -> int | None:
        """See Folder."""
        url = self.display_name(filename)
        try:
            return self._server.call(url, lambda: self._transport.send("HEAD", url, {}, limit=0).content_length)
        except FileMissingError:
            return None


def web_folder(url: str) -> WebFolder:
    """Return the folder of a web server that a URL names.

    Raises:
        ValueError: The URL has a user, query or fragment, or is http:// to another machine.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"the address {parts.hostname or 'without host'} must not contain a user, a query or a #")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError(f"http:// is allowed only for this machine; use https:// for {parts.hostname}")
    abandon_calls_on_interrupt()
    endpoint = f"{parts.scheme}://{parts.netloc}"
    try:
        transport = HttpTransport(StoreConfig(endpoint=endpoint, proxy=_proxy(parts.scheme, parts.netloc)))
    except BucketError as error:
        raise ValueError(error.message) from None
    return WebFolder(transport, endpoint + quote(parts.path, safe="/%"))


def s3_folder(bucket: str, folder: str) -> S3Folder:
    """Return a folder of a bucket, with the endpoint and credentials of the user's AWS settings.

    Raises:
        ValueError: Invalid bucket name, or wrong settings.
    """
    from botocore.exceptions import BotoCoreError

    abandon_calls_on_interrupt()
    try:
        check_readable_bucket_name(bucket)
        connection = store_connection()
        searched = None if connection.credentials else _describe_credential_sources()
        return S3Folder(S3ObjectClient(connection), bucket, folder, searched=searched)
    except BotoCoreError as error:
        raise ValueError(str(error)) from None
    except BucketError as error:
        raise ValueError(f"s3://{bucket}: {error.message}") from None


def store_connection() -> StoreConfig:
    """Return endpoint, region and credentials for S3 from the user's AWS settings, as botocore reads them.

    Raises:
        botocore.exceptions.BotoCoreError: The settings contradict each other.
        StoreSettingError: The URL of the store or of the proxy cannot be used.
    """
    from botocore.session import get_session

    session = get_session()
    meta = session.create_client("s3").meta
    found = session.get_credentials()
    keys = found and found.get_frozen_credentials()
    ca = session.get_config_variable("ca_bundle")
    endpoint = urlsplit(meta.endpoint_url)
    return StoreConfig(
        endpoint=meta.endpoint_url,
        region=_DEFAULT_REGION if meta.region_name in {None, "aws-global"} else meta.region_name,
        credentials=Credentials(
            access_key_id=keys.access_key, secret_access_key=keys.secret_key, session_token=keys.token
        ) if keys else None,
        addressing="virtual" if (meta.config.s3 or {}).get("addressing_style") == "virtual" else "path",
        ca=Path(ca) if ca else None,
        proxy=_proxy(endpoint.scheme, endpoint.netloc),
    )  # fmt: skip


def _describe_credential_sources() -> str:
    """Return the places that botocore searches for credentials, as text."""
    from botocore.session import get_session

    session = get_session()
    file, profile = session.get_config_variable("credentials_file"), session.get_config_variable("profile") or "default"
    return (
        f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile '{profile}' in {file} and in the AWS configuration, "
        "and the metadata of the container or machine"
    )


def _proxy(scheme: str, netloc: str) -> str | None:
    """Return the proxy for a server from `https_proxy`, `http_proxy` or `all_proxy`; None if `no_proxy` names it."""
    host = urlsplit(f"//{netloc}").hostname or ""
    if proxy_bypass(netloc) or proxy_bypass(host):
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

    def __init__(self, *, is_web: bool = False, searched: str | None = None) -> None:
        """Call a store or a web server; `searched` as for S3Folder."""
        self._is_web = is_web
        self._searched = searched
        self._has_responded = False

    def call(self, name: str, call: Callable[[], _Result]) -> _Result:
        """Make a call about a file, with retries; `name` is its path or URL, for messages.

        A server that has never responded is tried twice; other failures are retried for `RETRY_TIMEOUT` seconds.

        Raises:
            FolderError: The call failed.
        """

        def attempt() -> _Result:
            try:
                result = call_with_timeout(call, CALL_TIMEOUT)
            except (UnreachableError, CallAbandonedError):
                raise
            except BucketError as error:
                self._has_responded = True
                if self._is_web and 300 <= error.status < 400:  # only S3 has temporary redirects
                    raise StoreError(error.code, error.status, error.message) from None
                raise
            self._has_responded = True
            return result

        unreachable = None if self._has_responded else _MAX_CONNECT_ATTEMPTS
        with _translate_errors(name, self._searched):
            return retry_store(attempt, RETRY_TIMEOUT, _report_retry, unreachable_attempts=unreachable)


def _report_retry(error: TransientError, seconds: float) -> None:
    check_interrupted()
    click.echo(f"thrave: {error}; retrying in {seconds:.1f} s", err=True)


@contextmanager
def _translate_errors(name: str, searched: str | None) -> Iterator[None]:
    """Translate errors of a store or a web server to FolderError."""
    try:
        yield
    except (NoSuchKey, NoSuchBucket) as error:
        raise FileMissingError(f"{name} does not exist: {error.message}") from error
    except UnreachableError as error:
        raise FolderError(f"{name}: {error}. Check the address and the network.") from error
    except WrongRegion as error:
        settings = "AWS_REGION, and AWS_ENDPOINT_URL_S3 if you use it"
        raise FolderError(f"{name} is in another region: {error.location}. Set {settings}.") from error
    except BucketError as error:
        if error.kind is Kind.KEY and searched is not None:
            raise FolderRefusedError(f"{name}: {error}. No credentials were found; tried {searched}.") from error
        if error.kind is Kind.KEY:
            raise FolderRefusedError(f"{name}: {error}") from error
        if 300 <= error.status < 400:
            raise FolderError(
                f"{name} is redirected, and redirects are not followed. Pass the new address: {error.message}"
            ) from error
        raise FolderError(f"{name}: {error}") from error
    except CallAbandonedError as error:
        raise FolderError(f"{name}: {error}") from error
