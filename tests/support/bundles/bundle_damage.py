"""Damages a part, and every element and attribute of a manifest, one small change at a time."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TOKEN = re.compile(r"<(?P<close>/?)(?P<tag>\w+)(?P<attributes>[^>]*)>")


def flip(at: Callable[[int], int], bit: int) -> Callable[[bytes], bytes]:
    """A function that changes a bit of what it is given, in the byte that `at` says for its size."""

    def flipped(data: bytes) -> bytes:
        index = at(len(data))
        return data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :]

    return flipped


TO_A_PART: dict[str, Callable[[bytes], bytes]] = {
    "flip first bit": flip(lambda _: 0, 0x80),
    "flip middle bit": flip(lambda size: size // 2, 0x08),
    "flip last bit": flip(lambda size: size - 1, 0x01),
    "truncate by a byte": lambda data: data[:-1],
    "truncate by a block": lambda data: data[:-16],
    "extend by a byte": lambda data: data + b"\0",
    "extend by a block": lambda data: data + data[-16:],
    "empty": lambda _: b"",
}


@dataclass(frozen=True)
class Element:
    """Where an element and its content stand in the text."""

    path: str
    start: int
    attributes: tuple[int, int]
    content: tuple[int, int]
    end: int
    is_leaf: bool


def elements(text: str) -> Iterator[Element]:
    """The elements below <manifest>, in the order in which they end."""
    stack: list[tuple[re.Match[str], bool]] = []
    for token in TOKEN.finditer(text):
        if not token["close"]:
            stack = [(match, False) for match, _ in stack] + [(token, True)]
            continue
        path = "/".join(match["tag"] for match, _ in stack[1:])
        opened, is_leaf = stack.pop()
        if path:
            content = (opened.end(), token.start())
            yield Element(path, opened.start(), opened.span("attributes"), content, token.end(), is_leaf)


def other(character: str) -> str:
    """Another character that is as good: a digit for a digit, a hex digit for a hex digit."""
    return "1" if character == "0" else "0"


def changed(text: str, at: int) -> str:
    return text[:at] + other(text[at]) + text[at + 1 :]


def damages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (what was done where, the damaged manifest) for each element and attribute."""
    found = list(elements(text))
    for element in found:
        yield from _to_element(text, element)
        if element.is_leaf:
            yield from _to_text(text, element)
        yield from _to_attribute(text, element)
    starting = {element.start: element for element in found}
    for first in found:
        if second := starting.get(first.end):
            swapped = text[second.start : second.end] + text[first.start : first.end]
            yield f"swap {first.path} with {second.path}", text[: first.start] + swapped + text[second.end :]


def _to_element(text: str, element: Element) -> Iterator[tuple[str, str]]:
    whole = text[element.start : element.end]
    yield f"drop {element.path}", text[: element.start] + text[element.end :]
    yield f"duplicate {element.path}", text[: element.end] + whole + text[element.end :]


def _to_text(text: str, element: Element) -> Iterator[tuple[str, str]]:
    start, end = element.content
    yield f"change first of {element.path}", changed(text, start)
    yield f"change middle of {element.path}", changed(text, (start + end) // 2)
    yield f"change last of {element.path}", changed(text, end - 1)
    yield f"truncate {element.path}", text[: end - 1] + text[end:]
    yield f"extend {element.path}", text[:end] + "0" + text[end:]
    yield f"empty {element.path}", text[:start] + text[end:]


def _to_attribute(text: str, element: Element) -> Iterator[tuple[str, str]]:
    start, end = element.attributes
    if start < end:
        yield f"change attribute of {element.path}", changed(text, end - 2)
        yield f"drop attribute of {element.path}", text[:start] + text[end:]
