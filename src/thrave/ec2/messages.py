"""One HTTP request as it arrived, before anything in it is trusted."""

import ipaddress
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

from thrave.ec2.protocol import join_forms, read_form

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
class Request:
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
