"""A domain's XML, as far as it is read here: what it boots, its disks, what its operator has said of it.

Plain values out of libvirt's own words, with nothing decided: what they mean to EC2 is `domains.py`. It is libvirt that
writes this XML, from what others have given it: a text that is too long or declares a document type (and with it
entities, which could grow without bounds) is refused before anything looks at it. Nothing is asked of libvirt here.

Source: libvirt's "Domain XML format".

Another image for a domain's root disk, in its definition: that disk and our own element change, and nothing else.

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

from thrave.compute.errors import InvalidDomainError
from thrave.compute.libvirt.domain_metadata import KEY, NAMESPACE, InstanceMetadata, format_metadata

MOST_CHARACTERS = 4 << 20
"""Of one definition; libvirt itself sends no more than 4 MiB (VIR_NET_MESSAGE_STRING_MAX)."""


_OSINFO = "{http://libosinfo.org/xmlns/libvirt/domain/1.0}"


_AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Mirror:
    """A job that copies a disk's content while its domain runs.

    Attributes:
        job: `active-commit`, `copy` or `active-copy`.
        ready: It has caught up: what the guest writes goes to both images.
    """

    job: str
    ready: bool


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk of a domain.

    Attributes:
        target: Its name in the domain, vda.
        device: disk, lun, cdrom or floppy.
        kind: Of its source: file, block, volume, network, …
        format: Of its image, in QEMU's words; raw if nothing is said, which is libvirt's default.
        path: The file or block device, where that is the source.
        pool_volume: The storage pool and the volume, where those are.
        remote: Protocol and name, where it is on the network.
        boot_order: The lowest boots first; None if that is not said of single devices.
        readonly: The guest does not write to it.
        shareable: Other domains may have it at the same time.
        transient: What the guest writes is thrown away.
        encrypted: It, or an image below it, is encrypted by QEMU.
        mirror: The job that copies it just now.
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
    """One of a domain's two definitions: of the running one, or what it is started from.

    Attributes:
        name: What its operator calls it.
        uuid: In libvirt's notation.
        architecture: In libvirt's words, x86_64.
        os_id: What libosinfo calls the guest's operating system, a URL.
        disks: All, in their order.
        has_agent: The guest's agent has opened its channel; never of one that does not run.
        metadata: The elements in `<metadata>`.
    """

    name: str
    uuid: str
    architecture: str
    os_id: str | None
    disks: tuple[Disk, ...]
    has_agent: bool
    metadata: tuple[Element, ...]


def parsed(xml: str) -> Element:
    """The root of an XML text from libvirt.

    Raises:
        DomainFaultError: It is too long, declares a document type, or is not well-formed.
    """
    if len(xml) > MOST_CHARACTERS:
        raise InvalidDomainError(f"its XML has more than {MOST_CHARACTERS} characters")
    if "<!DOCTYPE" in xml:
        raise InvalidDomainError("its XML declares a document type")
    try:
        return ET.fromstring(xml)  # noqa: S314 (without a document type there are no entities to expand)
    except ET.ParseError as error:
        raise InvalidDomainError(f"its XML is not well-formed: {error}") from None


def read_definition(xml: str) -> DomainDefinition:
    """What a domain's XML says.

    Raises:
        DomainFaultError: As `parsed`, or what is needed is missing.
    """
    domain = parsed(xml)
    return DomainDefinition(
        name=_text(domain, "name"),
        uuid=_text(domain, "uuid"),
        architecture=_attribute(domain, "os/type", "arch"),
        os_id=_os_id(domain),
        disks=tuple(_disk(element) for element in domain.iterfind("devices/disk")),
        has_agent=any(_is_open_agent_channel(target) for target in domain.iterfind("devices/channel/target")),
        metadata=tuple(domain.iterfind("metadata/*")),
    )


def pool_type(xml: str) -> str:
    """The type of a storage pool, by its XML: dir, logical, rbd, … Raises as `parsed`."""
    return parsed(xml).get("type", "")


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
        return None  # a drive without a medium
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
        raise InvalidDomainError(f"{path}: there is none")
    return text


def _optional(parent: Element, path: str, name: str) -> str | None:
    element = parent.find(path)
    return None if element is None else element.get(name)


def _attribute(parent: Element, path: str, name: str) -> str:
    value = _optional(parent, path, name)
    if not value:
        raise InvalidDomainError(f"{path}: says no {name}")
    return value


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidDomainError(f"{name}: {text!r} is no number")
    return int(text)


_Change = Callable[[Element], None]


_SEPARATOR = " "  # between namespace and name; no namespace can hold one


_DISK = ("domain", "devices", "disk")


_METADATA = ("domain", "metadata")


_OURS = (*_METADATA, f"{NAMESPACE}{_SEPARATOR}instance")


@dataclass(frozen=True)
class DiskImage:
    """A file, and its format in QEMU's words."""

    path: Path
    format: str


def with_overlay(
    xml: str, target: str, record: InstanceMetadata | None, *, volume: DiskImage, overlay: DiskImage
) -> str:
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


def without_overlay(xml: str, target: str, record: InstanceMetadata | None, *, volume: DiskImage) -> str:
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


def _set_image(disk: Element, image: DiskImage) -> None:
    driver, source = disk.find("driver"), disk.find("source")
    if source is None:
        raise InvalidDomainError("disk: it has no source")
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

    def changed(self, target: str, change: _Change, record: InstanceMetadata | None) -> str:
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
        raise InvalidDomainError(f"disk: there is no {target}")

    def _metadata(self, record: InstanceMetadata) -> tuple[int, int, str]:
        new = format_metadata(record, prefix=f"{KEY}:")
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
