"""Another image for a domain's root disk, in its definition: that disk and our own element change, and nothing else.

What is not changed stays byte for byte as libvirt wrote it: elements of other namespaces (QEMU's command lines,
libosinfo's words) would not survive being read and written anew by just anything. Pure: the text is what
virDomainDefineXML is then given, in one call, so that disk and metadata change together.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element
from xml.parsers import expat

from thrave.compute.domain_metadata import KEY, NAMESPACE, Record, write_record
from thrave.compute.domain_xml import DomainFaultError, parsed

_Change = Callable[[Element], None]

_SEPARATOR = " "  # between namespace and name; no namespace can hold one
_DISK = ("domain", "devices", "disk")
_METADATA = ("domain", "metadata")
_OURS = (*_METADATA, f"{NAMESPACE}{_SEPARATOR}instance")


@dataclass(frozen=True)
class Image:
    """A file, and its format in QEMU's words."""

    path: Path
    format: str


def with_overlay(xml: str, target: str, record: Record | None, *, volume: Image, overlay: Image) -> str:
    """The definition with the disk `target` on `overlay`, which stands on `volume`, the disk's image till now.

    Args:
        xml: The definition, as libvirt has written it.
        target: The disk's name in the domain.
        record: What is to stand in our element; None leaves it as it is.
        volume: The image below. What the definition says of images below that stays.
        overlay: The image on top.

    Raises:
        DomainFaultError: There is no such disk, or no XML.
    """

    def put_over(disk: Element) -> None:
        backing = Element("backingStore", {"type": "file"})
        ET.SubElement(backing, "format", {"type": volume.format})
        ET.SubElement(backing, "source", {"file": str(volume.path)})
        below = disk.find("backingStore")
        if below is not None:
            disk.remove(below)
            backing.append(below)
        _set_image(disk, overlay)
        disk.append(backing)

    return _Text(xml).changed(target, put_over, record)


def without_overlay(xml: str, target: str, record: Record | None, *, volume: Image) -> str:
    """The opposite: the disk on `volume`, the image that was below. Arguments and errors as `with_overlay`."""

    def take_off(disk: Element) -> None:
        backing = disk.find("backingStore")
        if backing is not None:
            disk.remove(backing)
            below = backing.find("backingStore")
            if below is not None:
                disk.append(below)
        _set_image(disk, volume)

    return _Text(xml).changed(target, take_off, record)


def _set_image(disk: Element, image: Image) -> None:
    driver, source = disk.find("driver"), disk.find("source")
    if source is None:
        raise DomainFaultError("disk: it has no source")
    if driver is None:
        driver = ET.SubElement(disk, "driver", {"name": "qemu"})
    driver.set("type", image.format)
    source.set("file", str(image.path))


@dataclass(frozen=True)
class _Span:
    """An element in the text: where it begins and ends, in bytes."""

    path: tuple[str, ...]
    start: int
    end: int


class _Text:
    """A definition's text, and where in it stands what may change."""

    def __init__(self, xml: str) -> None:
        parsed(xml)
        self._xml = xml.encode()
        self._spans: list[_Span] = []
        self._open: list[tuple[str, int]] = []
        self._parser = expat.ParserCreate("utf-8", _SEPARATOR)
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end
        self._parser.Parse(self._xml, True)  # noqa: FBT003 (expat's signature)

    def changed(self, target: str, change: _Change, record: Record | None) -> str:
        """The text with a disk changed, and with our element if one is given."""
        edits = [self._disk(target, change)]
        if record is not None:
            edits.append(self._metadata(record))
        text = self._xml
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new.encode() + text[end:]
        return text.decode()

    def _disk(self, target: str, change: _Change) -> tuple[int, int, str]:
        for span in self._of(_DISK):
            disk = parsed(self._xml[span.start : span.end].decode())
            device = disk.find("target")
            if device is not None and device.get("dev") == target:
                change(disk)
                return span.start, span.end, ET.tostring(disk, encoding="unicode")
        raise DomainFaultError(f"disk: there is no {target}")

    def _metadata(self, record: Record) -> tuple[int, int, str]:
        new = write_record(record, prefix=f"{KEY}:")
        for span in self._of(_OURS):
            return span.start, span.end, new
        for span in self._of(_METADATA):
            last = self._xml.rfind(b"</", span.start, span.end)
            if last < 0:
                return span.start, span.end, f"<metadata>{new}</metadata>"
            return last, last, new
        last = self._xml.rindex(b"</")
        return last, last, f"<metadata>{new}</metadata>"

    def _of(self, path: tuple[str, ...]) -> list[_Span]:
        return [span for span in self._spans if span.path == path]

    def _begin(self, name: str, _attributes: dict[str, str]) -> None:
        self._open.append((name, self._parser.CurrentByteIndex))

    def _end(self, _name: str) -> None:
        path = tuple(name for name, _ in self._open)
        _, start = self._open.pop()
        if path in {_DISK, _METADATA, _OURS}:
            self._spans.append(_Span(path, start, self._end_of(start, self._parser.CurrentByteIndex)))

    def _end_of(self, start: int, told: int) -> int:
        """Where an element ends: expat tells of its end tag where that begins, of an empty element where it ends."""
        name = re.split(rb"[\s/>]", self._xml[start + 1 : told], maxsplit=1)[0]
        return self._xml.index(b">", told) + 1 if self._xml.startswith(b"</" + name, told) else told
