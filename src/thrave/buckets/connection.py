"""How to reach an S3-compatible store, and with which key; and the URLs of its buckets and objects.

Plain data. Nothing here opens a connection or reads the environment.
"""

import base64
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

from thrave.buckets.errors import StoreSettingError
from thrave.buckets.naming import check_key, check_readable_bucket_name
from thrave.config import normal_endpoint

Addressing = Literal["path", "virtual"]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """An access key that the store knows, or temporary ones with their session token."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A forward proxy.

    Attributes:
        url: `http://HOST:PORT`, without user and password.
        authorization: The header Proxy-Authorization; None if the proxy wants no user.
    """

    url: str
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, url: str) -> Self:
        """Read a proxy's URL, as settings and `https_proxy` have it: `[http://][USER[:PASSWORD]@]HOST[:PORT][/]`.

        User and password may be percent-encoded. They are sent in UTF-8 (RFC 7617).

        Raises:
            StoreSettingError: It is no such URL; the message holds nothing of it.
        """
        text = url.strip()
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            user, at, where = parts.netloc.rpartition("@")
            normal = normal_endpoint(parts._replace(netloc=where).geturl())
        except ValueError:
            raise StoreSettingError(
                "The URL of the proxy cannot be used: write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with "
                "special characters of user and password percent-encoded"
            ) from None
        name, _, password = user.partition(":")
        given = f"{unquote(name)}:{unquote(password)}".encode()
        return cls(url=normal, authorization=f"Basic {base64.b64encode(given).decode()}" if at else None)

    @property
    def where(self) -> str:
        """Host and port, for people."""
        return urlsplit(self.url).netloc

    @property
    def headers(self) -> Mapping[str, str]:
        """What the proxy is sent: with each request by plain HTTP, with CONNECT for TLS."""
        return {} if self.authorization is None else {"Proxy-Authorization": self.authorization}


@dataclass(frozen=True, kw_only=True)
class StoreConnection:
    """One store, and who calls it."""

    endpoint: str
    """`https://s3.eu-west-1.amazonaws.com`, `http://127.0.0.1:8333`; kept in its normal form."""
    region: str = "us-east-1"
    """For which requests are signed, and in which buckets are created."""
    credentials: Credentials | None = None
    """Without any, requests are not signed: what everybody may read can be read."""
    find_credentials: Callable[[], Credentials] | None = None
    """Gives the credentials of each request, where they change while the process runs."""
    addressing: Addressing = "path"
    """Where a bucket's name stands: in the path, or before the endpoint's host name."""
    ca: Path | None = None
    """Certificates (PEM) that sign the store's, instead of the system's."""
    proxy: str | None = field(default=None, repr=False)  # its URL may hold a password
    """`http://USER:PASSWORD@HOST:PORT` of a proxy."""
    connections: int = 16
    """How many are open at once; one more waits for one of them."""
    timeout: float = 30.0
    """Seconds in which anything must move on a connection."""
    send_timeout: float | None = None
    """Seconds in which a connection must come about, and each piece of a request be sent; None: `timeout`."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "endpoint", normal_endpoint(self.endpoint))
        except ValueError as error:
            raise StoreSettingError(f"The URL of the store cannot be used: {error}") from None

    def current_credentials(self) -> Credentials | None:
        """The credentials with which the next request is signed."""
        return self.credentials if self.find_credentials is None else self.find_credentials()

    def url(self, bucket: str | None = None, key: str = "", query: Mapping[str, str] | None = None) -> str:
        """The URL of an object, of a bucket, or (None) of the store.

        Every URL that is sent to a store is made here, quoted as it is signed.

        Raises:
            InvalidBucketName, InvalidArgument: No URL can hold that bucket or key unchanged.
        """
        path = ""
        scheme, host = self.endpoint.split("://")
        if bucket is not None:
            check_readable_bucket_name(bucket)
            check_key(key)
            if self._has_host_of_its_own(bucket):
                host = f"{bucket}.{host}"
                path = quote(key, safe="/-_.~")
            else:
                path = quote(bucket, safe="-_.~") + (f"/{quote(key, safe='/-_.~')}" if key else "")
        text = f"?{urlencode(query, quote_via=quote, safe='-_.~')}" if query else ""
        return f"{scheme}://{host}/{path}{text}"

    def _has_host_of_its_own(self, bucket: str) -> bool:
        """Whether a bucket's name can stand before the host's. If not, it stands in the path.

        An address has no names before it, a name with capitals or underscores is no host's, and a certificate for
        `*.HOST` does not match a name with dots.
        """
        host = urlsplit(self.endpoint).hostname or ""
        dotted = "." in bucket and self.endpoint.startswith("https:")
        return self.addressing == "virtual" and not dotted and not _is_address(host) and bool(_LABELS.fullmatch(bucket))


_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_LABELS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
