"""A request as it came over the wire, before anything in it is believed."""

from dataclasses import dataclass, field
from functools import cached_property

from thrave.ec2.protocol import read_form


@dataclass(frozen=True)
class Request:
    """One HTTP request, whole.

    Attributes:
        method: `GET` or `POST`.
        path: As received, without the query string.
        query: The query string as received.
        headers: Names in lower case with their values, in the order received.
        body: At most as long as the door's limit.
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

    @cached_property
    def form(self) -> dict[str, str]:
        """The parameters, of query string and body together.

        Raises:
            ProtocolError: They cannot be decoded, or one is given twice.
        """
        return read_form(b"&".join(filter(None, (self.query, self.body))))

    @cached_property
    def query_form(self) -> dict[str, str]:
        """The parameters of the query string alone.

        Raises:
            ProtocolError: As for `form`.
        """
        return read_form(self.query)

    def header(self, name: str) -> str | None:
        """Return a header's value by its name in lower case: the first, should there be several; None if none."""
        return next((value for each, value in self.headers if each == name), None)
