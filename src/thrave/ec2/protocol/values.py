"""The values that requests and answers are made of, in Python's terms."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Parameters: TypeAlias = Mapping[str, Any]
"""An operation's input, by the member names of the model; the types are the model's."""

Result: TypeAlias = Mapping[str, Any]
"""An operation's output, by the member names of the model. A member whose value is None is left out."""


@dataclass(frozen=True)
class Blob:
    """Bytes that travelled as base64. The text is kept as it came: an upload policy's signature is over the text.

    Attributes:
        text: The base64 exactly as received, line breaks included.
        data: What it decodes to.
    """

    text: str = field(repr=False)
    data: bytes = field(repr=False)

    @classmethod
    def from_text(cls, text: str) -> "Blob":
        """Decode base64, ignoring white space between its characters.

        Raises:
            ValueError: The text is not base64.
        """
        return cls(text, base64.b64decode("".join(text.split()), validate=True))
