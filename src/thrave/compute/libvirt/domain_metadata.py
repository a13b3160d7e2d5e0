"""What the operator, and the driver, write into a domain's metadata: whose instance it is, and what becomes of it.

::

    <thrave:instance xmlns:thrave="https://thrave.dev/xmlns/instance/1"
        account="123456789012" platform="windows" rootDevice="vda" rootDeviceType="instance-store" secretFile="/…">
      <thrave:tag key="Name">web</thrave:tag>
    </thrave:instance>

All but the account may be left out. The driver adds what it must find again: `launchTime`, `terminated`, and, while the
root volume is frozen, one `<thrave:frozen>`. A guest cannot write here, but people do: names that nobody knows are
faults, since they are most likely misspelt. Pure.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar, get_args
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

from thrave.compute.errors import InvalidDomainError
from thrave.compute.instance import validate_tags

NAMESPACE = "https://thrave.dev/xmlns/instance/1"
KEY = "thrave"
"""The prefix that libvirt is asked to write."""

Platform = Literal["windows", "linux"]
RootDeviceType = Literal["instance-store", "ebs"]

_ATTRIBUTES = {"account", "platform", "rootDevice", "rootDeviceType", "secretFile", "launchTime", "terminated"}
_FROZEN_ATTRIBUTES = {"path", "format", "overlay", "secretFile", "paused"}

_PLATFORMS: tuple[Platform, ...] = get_args(Platform)
_ROOT_DEVICE_TYPES: tuple[RootDeviceType, ...] = get_args(RootDeviceType)
_YES_OR_NO = ("true", "false")

_Word = TypeVar("_Word", bound=str)


@dataclass(frozen=True, kw_only=True)
class OverlayMetadata:
    """A root volume that has an overlay over it, or has had one until a moment ago.

    Attributes:
        path: The volume that stands still.
        format: Its format.
        overlay: The overlay.
        secret_file: Holds the volume's passphrase.
        paused: The driver has stopped the guest's CPUs for the moment in which the overlay is left.
    """

    path: Path
    format: str
    overlay: Path
    secret_file: Path | None = None
    paused: bool = False


@dataclass(frozen=True, kw_only=True)
class InstanceMetadata:
    """What stands in the element.

    Attributes:
        account_id: Of the owner, 12 digits.
        platform: Instead of what libosinfo's metadata say.
        root_device: Instead of the disk that is booted; its target, vda.
        root_device_type: Instead of what the root volume's source says.
        secret_file: Holds the passphrase of the root volume.
        tags: Key to value.
        launch_time: When it was last started, as far as the driver has seen it (UTC).
        terminated: It is not to be used any more.
        frozen: Its root volume has an overlay.
    """

    account_id: str
    platform: Platform | None = None
    root_device: str | None = None
    root_device_type: RootDeviceType | None = None
    secret_file: Path | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    launch_time: datetime | None = None
    terminated: bool = False
    frozen: OverlayMetadata | None = None


def parse_metadata(metadata: Iterable[Element]) -> InstanceMetadata | None:
    """What our element among a domain's metadata says; None if there is none.

    Raises:
        DomainFaultError: It cannot be understood.
    """
    ours = [element for element in metadata if element.tag == f"{{{NAMESPACE}}}instance"]
    return _record(ours[0]) if ours else None


def format_metadata(record: InstanceMetadata, *, prefix: str = "") -> str:
    """The element as virDomainSetMetadata takes it; with the prefix `thrave:`, as it stands in a definition."""
    element = Element(f"{prefix}instance", {"xmlns:thrave": NAMESPACE} if prefix else {})
    _set(element, "account", record.account_id)
    _set(element, "platform", record.platform)
    _set(element, "rootDevice", record.root_device)
    _set(element, "rootDeviceType", record.root_device_type)
    _set(element, "secretFile", record.secret_file)
    _set(element, "launchTime", record.launch_time and record.launch_time.isoformat())
    _set(element, "terminated", "true" if record.terminated else None)
    for key, value in record.tags.items():
        ET.SubElement(element, f"{prefix}tag", {"key": key}).text = value
    if record.frozen is not None:
        _add_frozen(element, record.frozen, prefix)
    return ET.tostring(element, encoding="unicode")


def check_metadata(record: InstanceMetadata) -> None:
    """See that what is to be written can be read again.

    Raises:
        DomainFaultError: It could not.
    """
    text = format_metadata(record, prefix=f"{KEY}:")
    try:
        again = parse_metadata([ET.fromstring(text)])  # noqa: S314 (our own)
    except ET.ParseError:
        raise InvalidDomainError("there is a character that XML cannot hold") from None
    if again != record:
        raise InvalidDomainError("there is a character that XML does not keep")


def _add_frozen(element: Element, frozen: OverlayMetadata, prefix: str) -> None:
    child = ET.SubElement(element, f"{prefix}frozen")
    _set(child, "path", frozen.path)
    _set(child, "format", frozen.format)
    _set(child, "overlay", frozen.overlay)
    _set(child, "secretFile", frozen.secret_file)
    _set(child, "paused", "true" if frozen.paused else None)


def _set(element: Element, name: str, value: object) -> None:
    if value is not None:
        element.set(name, str(value))


def _record(element: Element) -> InstanceMetadata:
    _refuse_unknown(element, _ATTRIBUTES)
    tags: dict[str, str] = {}
    frozen: OverlayMetadata | None = None
    for child in element:
        match child.tag.removeprefix(f"{{{NAMESPACE}}}"):
            case "tag":
                _refuse_unknown(child, {"key"})
                if (key := _needed(child, "key")) in tags:
                    raise InvalidDomainError(f"tag: there are two with the key {key!r}")
                tags[key] = child.text or ""
            case "frozen":
                frozen = _frozen(child)
            case other:
                raise InvalidDomainError(f"{other}: is none of tag, frozen")
    return InstanceMetadata(
        account_id=_account(_needed(element, "account")),
        platform=_word(element, "platform", _PLATFORMS),
        root_device=element.get("rootDevice"),
        root_device_type=_word(element, "rootDeviceType", _ROOT_DEVICE_TYPES),
        secret_file=_path(element, "secretFile"),
        tags=_checked(tags),
        launch_time=_time(element, "launchTime"),
        terminated=_word(element, "terminated", _YES_OR_NO) == "true",
        frozen=frozen,
    )


def _frozen(element: Element) -> OverlayMetadata:
    _refuse_unknown(element, _FROZEN_ATTRIBUTES)
    return OverlayMetadata(
        path=_needed_path(element, "path"),
        format=_needed(element, "format"),
        overlay=_needed_path(element, "overlay"),
        secret_file=_path(element, "secretFile"),
        paused=_word(element, "paused", _YES_OR_NO) == "true",
    )


def _refuse_unknown(element: Element, known: set[str]) -> None:
    for name in sorted(set(element.keys()) - known):
        raise InvalidDomainError(f"{name}: is none of {', '.join(sorted(known))}")


def _needed(element: Element, name: str) -> str:
    value = element.get(name)
    if not value:
        raise InvalidDomainError(f"{name}: is missing")
    return value


def _account(text: str) -> str:
    if not re.fullmatch(r"[0-9]{12}", text):
        raise InvalidDomainError(f"account: {text[:40]!r} is not 12 digits")
    return text


def _word(element: Element, name: str, words: Collection[_Word]) -> _Word | None:
    value = element.get(name)
    for word in words:
        if value == word:
            return word
    if value is None:
        return None
    raise InvalidDomainError(f"{name}: {value[:40]!r} is none of {', '.join(words)}")


def _path(element: Element, name: str) -> Path | None:
    value = element.get(name)
    if value is not None and not value.startswith("/"):
        raise InvalidDomainError(f"{name}: must be an absolute path")
    return None if value is None else Path(value)


def _needed_path(element: Element, name: str) -> Path:
    path = _path(element, name)
    if path is None:
        raise InvalidDomainError(f"{name}: is missing")
    return path


def _time(element: Element, name: str) -> datetime | None:
    value = element.get(name)
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidDomainError(f"{name}: {value[:40]!r} is no time") from None
    if time.tzinfo is None:
        raise InvalidDomainError(f"{name}: {value[:40]!r} has no time zone")
    return time.astimezone(UTC)


def _checked(tags: dict[str, str]) -> dict[str, str]:
    try:
        return validate_tags(tags)
    except ValueError as error:
        raise InvalidDomainError(f"tag: {error}") from None
