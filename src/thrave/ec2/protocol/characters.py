"""The characters that XML 1.0 can carry, by the Char production of its specification."""

import re

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def is_xml(text: str) -> bool:
    """Say whether every character of a text may stand in an XML document."""
    return _NOT_XML.search(text) is None


def replace_non_xml(text: str) -> str:
    """Put U+FFFD in the place of every character that may not stand in an XML document."""
    return _NOT_XML.sub("\ufffd", text)
