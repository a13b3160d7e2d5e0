"""Damaged parts and manifests. Each has one small change, in any part, element or attribute."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TOKEN = re.compile(r"<(?P<close>/?)(?P<tag>\w+)(?P<attributes>[^>]*)>")


def flip_bit(position: Callable[[int], int], mask: int) -> Callable[[bytes], bytes]:
    """Return a function that flips one bit of its argument.

    Args:
        position: Returns the index of the byte to change, given the size of the data.
        mask: Has only the bit to flip.
    """

    def flip(data: bytes) -> bytes:
        index = position(len(data))
        return data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :]

    return flip


PART_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flip first bit": flip_bit(lambda _: 0, 0x80),
    "flip middle bit": flip_bit(lambda size: size // 2, 0x08),
    "flip last bit": flip_bit(lambda size: size - 1, 0x01),
    "truncate by a byte": lambda data: data[:-1],
    "truncate by a block": lambda data: data[:-16],
    "extend by a byte": lambda data: data + b"\0",
    "extend by a block": lambda data: data + data[-16:],
    "empty": lambda _: b"",
}


@dataclass(frozen=True)
class Element:
    """Positions of an element and of its content in the text of a manifest."""

    path: str
    start: int
    attributes: tuple[int, int]
    content: tuple[int, int]
    end: int
    is_leaf: bool


def find_elements(text: str) -> Iterator[Element]:
    """Yield the elements below <manifest>, in the order of their closing tags."""
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


def other_digit(character: str) -> str:
    """Return another character that is valid in the same place, in a number or a hex digest."""
    return "1" if character == "0" else "0"


def change_character(text: str, index: int) -> str:
    """Return the text with another character at an index."""
    return text[:index] + other_digit(text[index]) + text[index + 1 :]


def damaged_manifests(text: str) -> Iterator[tuple[str, str]]:
    """Yield (description of the damage, damaged manifest) for each element and attribute."""
    found = list(find_elements(text))
    for element in found:
        yield from _damage_element(text, element)
        if element.is_leaf:
            yield from _damage_text(text, element)
        yield from _damage_attribute(text, element)
    starting = {element.start: element for element in found}
    for first in found:
        if second := starting.get(first.end):
            swapped = text[second.start : second.end] + text[first.start : first.end]
            yield f"swap {first.path} with {second.path}", text[: first.start] + swapped + text[second.end :]


def _damage_element(text: str, element: Element) -> Iterator[tuple[str, str]]:
    whole = text[element.start : element.end]
    yield f"drop {element.path}", text[: element.start] + text[element.end :]
    yield f"duplicate {element.path}", text[: element.end] + whole + text[element.end :]


def _damage_text(text: str, element: Element) -> Iterator[tuple[str, str]]:
    start, end = element.content
    yield f"change first of {element.path}", change_character(text, start)
    yield f"change middle of {element.path}", change_character(text, (start + end) // 2)
    yield f"change last of {element.path}", change_character(text, end - 1)
    yield f"truncate {element.path}", text[: end - 1] + text[end:]
    yield f"extend {element.path}", text[:end] + "0" + text[end:]
    yield f"empty {element.path}", text[:start] + text[end:]


def _damage_attribute(text: str, element: Element) -> Iterator[tuple[str, str]]:
    start, end = element.attributes
    if start < end:
        yield f"change attribute of {element.path}", change_character(text, end - 2)
        yield f"drop attribute of {element.path}", text[:start] + text[end:]
