"""Parses a domain's XML, and changes the image of its root disk in the XML. Does not call libvirt.

Returns plain values with libvirt's names; `instance_mapping.py` maps them to EC2's. libvirt writes this XML, but its
content comes from other users. So a text that is too long or declares a document type (and with it entities, which
could expand without limit) is refused before it is parsed. A change replaces only the disk and our metadata element;
virDomainDefineXML then changes both in one call. The rest stays as it is, byte by byte: elements of other namespaces
(QEMU's command line, libosinfo) might not survive being parsed and written. Source: libvirt, "Domain XML format".
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element
from xml.parsers import expat

from thrave.compute.errors import InvalidDomainError
from thrave.compute.libvirt.domain_metadata import KEY, NAMESPACE, InstanceMetadata, format_metadata

MAX_CHARACTERS = 4 << 20
"""Of one definition. libvirt sends at most 4 MiB (VIR_NET_MESSAGE_STRING_MAX)."""

_OSINFO = "{http://libosinfo.org/xmlns/libvirt/domain/1.0}"
_AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Mirror:
    """A block job that copies a disk while its domain runs.

    Attributes:
        job: `active-commit`, `copy` or `active-copy`.
        ready: Whether it has copied everything, and the guest now writes to both images.
    """

    job: str
    ready: bool


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk of a domain.

    Attributes:
        target: Name in the domain, such as vda.
        device: disk, lun, cdrom or floppy.
        kind: Type of the source: file, block, volume, network, …
        format: QEMU's name of the image format; by default raw, as in libvirt.
        path: The file or block device, if that is the source.
        pool_volume: Names of storage pool and volume, if those are the source.
        remote: Protocol and name of a network source.
        boot_order: The lowest boots first; None: the device has no boot order of its own.
        readonly: The guest cannot write to it.
        shareable: Other domains may use it at the same time.
        transient: The guest's writes are discarded.
        encrypted: QEMU encrypts the image or a backing file.
        mirror: The block job that copies it at the moment.
    """

    target: str
    device: str
    kind: str
    format: str
    path: Path | None = None
    pool_volume: tuple[str, str] | None = None
    remote: str | None = None
    boot_order: int | None = None
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    encrypted: bool = False
    mirror: Mirror | None = None


@dataclass(frozen=True, kw_only=True)
class DomainDefinition:
    """One of the two definitions of a domain: of the running domain, or for the next start.

    Attributes:
        name: Name in libvirt.
        uuid: In libvirt's form.
        architecture: libvirt's name, such as x86_64.
        os_id: libosinfo's URL of the guest's operating system.
        disks: All disks, in the order of the XML.
        has_agent: The guest agent has opened its channel. False for a domain that is off.
        metadata: The elements in `<metadata>`.
    """

    name: str
    uuid: str
    architecture: str
    os_id: str | None
    disks: tuple[Disk, ...]
    has_agent: bool
    metadata: tuple[Element, ...]


def parse_xml(xml: str) -> Element:
    """Return the root element of an XML text from libvirt.

    Raises:
        InvalidDomainError: It is too long, declares a document type, or is not well-formed.
    """
    if len(xml) > MAX_CHARACTERS:
        raise InvalidDomainError(f"its XML has more than {MAX_CHARACTERS} characters")
    if "<!DOCTYPE" in xml:
        raise InvalidDomainError("its XML declares a document type")
    try:
        return ET.fromstring(xml)  # noqa: S314 (without a document type there are no entities to expand)
    except ET.ParseError as error:
        raise InvalidDomainError(f"its XML is not well-formed: {error}") from None


def read_definition(xml: str) -> DomainDefinition:
    """Return the definition in a domain's XML.

    Raises:
        InvalidDomainError: As `parse_xml`, or a required element is missing.
    """
    domain = parse_xml(xml)
    return DomainDefinition(
        name=_text(domain, "name"),
        uuid=_text(domain, "uuid"),
        architecture=_attribute(domain, "os/type", "arch"),
        os_id=_os_id(domain),
        disks=tuple(_disk(element) for element in domain.iterfind("devices/disk")),
        has_agent=any(_is_open_agent_channel(target) for target in domain.iterfind("devices/channel/target")),
        metadata=tuple(domain.iterfind("metadata/*")),
    )


def read_pool_type(xml: str) -> str:
    """Return the type of a storage pool from its XML: dir, logical, rbd, … Raises as `parse_xml`."""
    return parse_xml(xml).get("type", "")


def _disk(element: Element) -> Disk:
    kind = element.get("type", "file")
    source, order = element.find("source"), element.find("boot")
    return Disk(
        target=_attribute(element, "target", "dev"),
        device=element.get("device", "disk"),
        kind=kind,
        format=_optional(element, "driver", "type") or "raw",
        path=_path(kind, source),
        pool_volume=_pool_volume(kind, source),
        remote=_remote(kind, source),
        boot_order=None if order is None else _number(order.get("order", ""), "boot order"),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find(".//encryption") is not None,
        mirror=_mirror(element.find("mirror")),
    )


def _path(kind: str, source: Element | None) -> Path | None:
    attribute = {"file": "file", "block": "dev"}.get(kind)
    if source is None or attribute is None or not (path := source.get(attribute)):
        return None  # a drive without medium
    if not path.startswith("/"):
        raise InvalidDomainError(f"disk source: {path} is not an absolute path")
    return Path(path)


def _pool_volume(kind: str, source: Element | None) -> tuple[str, str] | None:
    if kind != "volume" or source is None:
        return None
    return source.get("pool", ""), source.get("volume", "")


def _remote(kind: str, source: Element | None) -> str | None:
    if kind != "network" or source is None:
        return None
    return f"{source.get('protocol', '')}:{source.get('name', '')}"


def _mirror(element: Element | None) -> Mirror | None:
    if element is None:
        return None
    return Mirror(element.get("job", "copy"), element.get("ready") == "yes")


def _os_id(domain: Element) -> str | None:
    element = domain.find(f"metadata/{_OSINFO}libosinfo/{_OSINFO}os")
    return None if element is None else element.get("id")


def _is_open_agent_channel(target: Element) -> bool:
    return target.get("name") == _AGENT_CHANNEL and target.get("state") == "connected"


def _text(parent: Element, path: str) -> str:
    text = parent.findtext(path)
    if not text:
        raise InvalidDomainError(f"{path}: is missing")
    return text


def _optional(parent: Element, path: str, name: str) -> str | None:
    element = parent.find(path)
    return None if element is None else element.get(name)


def _attribute(parent: Element, path: str, name: str) -> str:
    value = _optional(parent, path, name)
    if not value:
        raise InvalidDomainError(f"{path}: has no {name}")
    return value


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidDomainError(f"{name}: {text!r} is not a number")
    return int(text)


_Change = Callable[[Element], None]

_SEPARATOR = " "  # between namespace and name; no namespace can contain it
_DISK = ("domain", "devices", "disk")
_METADATA = ("domain", "metadata")
_OURS = (*_METADATA, f"{NAMESPACE}{_SEPARATOR}instance")


@dataclass(frozen=True)
class DiskImage:
    """An image file, and QEMU's name of its format."""

    path: Path
    format: str


def with_overlay(
    xml: str, target: str, metadata: InstanceMetadata | None, *, volume: DiskImage, overlay: DiskImage
) -> str:
    """Return the definition with `overlay` as the image of a disk, and its present image `volume` as backing file.

    Args:
        xml: The definition, as libvirt has written it.
        target: Name of the disk in the domain.
        metadata: New content of our element; None: the element does not change.
        volume: The present image. Its backing files in the definition do not change.
        overlay: The new image.

    Raises:
        InvalidDomainError: There is no such disk, or the XML is not valid.
    """

    def add_overlay(disk: Element) -> None:
        backing = Element("backingStore", {"type": "file"})
        ET.SubElement(backing, "format", {"type": volume.format})
        ET.SubElement(backing, "source", {"file": str(volume.path)})
        below = disk.find("backingStore")
        if below is not None:
            disk.remove(below)
            backing.append(below)
        _set_image(disk, overlay)
        disk.append(backing)

    return _EditableXml(xml).with_changes(target, add_overlay, metadata)


def without_overlay(xml: str, target: str, metadata: InstanceMetadata | None, *, volume: DiskImage) -> str:
    """Return the definition with the backing file `volume` as the image of the disk again. As `with_overlay`."""

    def remove_overlay(disk: Element) -> None:
        backing = disk.find("backingStore")
        if backing is not None:
            disk.remove(backing)
            below = backing.find("backingStore")
            if below is not None:
                disk.append(below)
        _set_image(disk, volume)

    return _EditableXml(xml).with_changes(target, remove_overlay, metadata)


def _set_image(disk: Element, image: DiskImage) -> None:
    driver, source = disk.find("driver"), disk.find("source")
    if source is None:
        raise InvalidDomainError("disk: has no source")
    if driver is None:
        driver = ET.SubElement(disk, "driver", {"name": "qemu"})
    driver.set("type", image.format)
    source.set("file", str(image.path))


@dataclass(frozen=True)
class _Span:
    """Start and end of an element in the text, in bytes."""

    path: tuple[str, ...]
    start: int
    end: int


class _EditableXml:
    """The text of a definition, and the positions of the elements that may change."""

    def __init__(self, xml: str) -> None:
        parse_xml(xml)
        self._xml = xml.encode()
        self._spans: list[_Span] = []
        self._open: list[tuple[str, int]] = []
        self._parser = expat.ParserCreate("utf-8", _SEPARATOR)
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end
        self._parser.Parse(self._xml, True)  # noqa: FBT003 (expat's signature)

    def with_changes(self, target: str, change: _Change, metadata: InstanceMetadata | None) -> str:
        """Return the text with a changed disk, and with new metadata if there are any."""
        edits = [self._edit_disk(target, change)]
        if metadata is not None:
            edits.append(self._edit_metadata(metadata))
        text = self._xml
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new.encode() + text[end:]
        return text.decode()

    def _edit_disk(self, target: str, change: _Change) -> tuple[int, int, str]:
        for span in self._find(_DISK):
            disk = parse_xml(self._xml[span.start : span.end].decode())
            device = disk.find("target")
            if device is not None and device.get("dev") == target:
                change(disk)
                return span.start, span.end, ET.tostring(disk, encoding="unicode")
        raise InvalidDomainError(f"disk: there is no {target}")

    def _edit_metadata(self, metadata: InstanceMetadata) -> tuple[int, int, str]:
        new = format_metadata(metadata, prefix=f"{KEY}:")
        for span in self._find(_OURS):
            return span.start, span.end, new
        for span in self._find(_METADATA):
            last = self._xml.rfind(b"</", span.start, span.end)
            if last < 0:
                return span.start, span.end, f"<metadata>{new}</metadata>"
            return last, last, new
        last = self._xml.rindex(b"</")
        return last, last, f"<metadata>{new}</metadata>"

    def _find(self, path: tuple[str, ...]) -> list[_Span]:
        return [span for span in self._spans if span.path == path]

    def _begin(self, name: str, _attributes: dict[str, str]) -> None:
        self._open.append((name, self._parser.CurrentByteIndex))

    def _end(self, _name: str) -> None:
        path = tuple(name for name, _ in self._open)
        _, start = self._open.pop()
        if path in {_DISK, _METADATA, _OURS}:
            self._spans.append(_Span(path, start, self._end_of(start, self._parser.CurrentByteIndex)))

    def _end_of(self, start: int, position: int) -> int:
        """Return the end of an element. expat reports the start of an end tag, but the end of an empty element."""
        name = re.split(rb"[\s/>]", self._xml[start + 1 : position], maxsplit=1)[0]
        return self._xml.index(b">", position) + 1 if self._xml.startswith(b"</" + name, position) else position
