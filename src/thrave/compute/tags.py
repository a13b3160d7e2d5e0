"""Tags that an operator puts on an instance, and what EC2 allows of them.

Source of the limits: EC2 User Guide, "Tag your Amazon EC2 resources". Who reads tags from outside checks them here, at
once and with one answer for every way in: the command line, an instance's file, a domain's metadata.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

MAX_TAGS = 50
"""On one instance."""
MAX_KEY = 128
"""Characters."""
MAX_VALUE = 256
"""Characters."""

_RESERVED = "aws:"
# Tags are told in XML and may stand in a domain's: it cannot hold some of these, and does not keep others as they are.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_Tags = TypeVar("_Tags", bound=Mapping[str, str])


def checked_tags(tags: _Tags) -> _Tags:
    """Give the tags, key to value, as they are.

    Raises:
        ValueError: They are too many, or one of them is none; the text says which and why.
    """
    if len(tags) > MAX_TAGS:
        raise ValueError(f"{len(tags)} tags are more than the {MAX_TAGS} that an instance may have")
    for key, value in tags.items():
        if fault := _fault(key, value):
            raise ValueError(f"the tag {key[:MAX_KEY]!r} {fault}")
    return tags


def _fault(key: str, value: str) -> str | None:
    if not key:
        return "has no key"
    if len(key) > MAX_KEY:
        return f"has a key of more than {MAX_KEY} characters"
    if len(value) > MAX_VALUE:
        return f"has a value of more than {MAX_VALUE} characters"
    if key.lower().startswith(_RESERVED):
        return f"begins with {_RESERVED}, which is AWS's own"
    return "holds a control character" if _NO_TEXT.search(key + value) else None
