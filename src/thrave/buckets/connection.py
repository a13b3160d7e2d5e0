"""How to reach an S3-compatible store, and by whose right: what the service, the commands and the doctor all hold.

Plain data. Nothing here opens a connection or reads the environment.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Addressing = Literal["path", "virtual"]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """An access key that the store knows, or temporary ones with their session token."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class StoreConnection:
    """One store, and who calls it."""

    endpoint: str
    """`https://s3.eu-west-1.amazonaws.com`, `http://127.0.0.1:8333`: no path."""
    region: str = "us-east-1"
    """For which requests are signed, and in which buckets are created."""
    credentials: Credentials | None = None
    """Without any, requests are not signed: what everybody may read can be read."""
    addressing: Addressing = "path"
    """Where a bucket's name stands: in the path, or before the endpoint's host name."""
    ca: Path | None = None
    """Certificates (PEM) of who vouches for the store's, instead of the system's."""
    proxy: str | None = field(default=None, repr=False)  # its URL may hold a password
    """`http://host:port` of a proxy."""
    connections: int = 16
    """How many are open at once; one more waits for one of them."""
    timeout: float = 30.0
    """Seconds in which a connection must come about, and in which anything must move on it."""
