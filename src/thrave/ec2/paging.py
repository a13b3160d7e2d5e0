"""Pages of a Describe… action: `MaxResults` and `NextToken`.

A token names the last record of the page before it, so that the service remembers nothing and a record that comes or
goes between two pages moves no other. Source: AWS, "Paginating results", EC2 API Reference; boto3 and the AWS CLI only
ever hand a token back.
"""

import base64
from collections.abc import Callable, Sequence
from typing import TypeVar

from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import Parameters

Record = TypeVar("Record")

SMALLEST, LARGEST = 5, 1000


def page(
    records: Sequence[Record], parameters: Parameters, id_of: Callable[[Record], str]
) -> tuple[Sequence[Record], str | None]:
    """Cut the page out of the records that a request asks for.

    Args:
        records: In ascending order of their ids.
        parameters: With `MaxResults` and `NextToken`, or without.
        id_of: Gives a record's id, plain ASCII.

    Returns:
        The page, and the token of the next; None if this is the last.

    Raises:
        EC2Error: InvalidParameterValue (MaxResults out of 5 to 1000), InvalidPaginationToken.
    """
    size = parameters.get("MaxResults", LARGEST)
    if not SMALLEST <= size <= LARGEST:
        message = f"Value ({size}) for parameter MaxResults is invalid. It must be from {SMALLEST} to {LARGEST}."
        raise EC2Error("InvalidParameterValue", message)
    last_seen = _read_token(parameters.get("NextToken", ""))
    rest = [record for record in records if id_of(record) > last_seen]
    token = _write_token(id_of(rest[size - 1])) if len(rest) > size else None
    return rest[:size], token


def _write_token(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _read_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode("ascii")
    except ValueError:
        raise EC2Error("InvalidPaginationToken") from None
