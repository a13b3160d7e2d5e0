"""Our element in a domain's metadata: written by `thrave instance adopt` and by the driver. Does not call libvirt.

::

    <thrave:instance xmlns:thrave="https://thrave.dev/xmlns/instance/1"
        account="123456789012" platform="windows" rootDevice="vda" rootDeviceType="instance-store" secretFile="/…">
      <thrave:tag key="Name">web</thrave:tag>
    </thrave:instance>

Only the account is required. The driver adds `launchTime`, `terminated` and, while an overlay is attached,
`<thrave:frozen>`. Guests cannot write to it, but operators can: unknown names are refused as spelling mistakes.
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
"""The prefix of the namespace in the domain's XML."""

Platform = Literal["windows", "linux"]
RootDeviceType = Literal["instance-store", "ebs"]

_ATTRIBUTES = {"account", "platform", "rootDevice", "rootDeviceType", "secretFile", "launchTime", "terminated"}
_FROZEN_ATTRIBUTES = {"path", "format", "overlay", "secretFile", "paused"}

_PLATFORMS: tuple[Platform, ...] = get_args(Platform)
_ROOT_DEVICE_TYPES: tuple[RootDeviceType, ...] = get_args(RootDeviceType)
_YES_OR_NO = ("true", "false")

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True, kw_only=True)
class OverlayMetadata:
    """The overlay of a root volume (`<thrave:frozen>`), from `attach` until it is merged and removed.

    Attributes:
        path: The volume, which does not change while the overlay is attached.
        format: Format of the volume.
        overlay: The overlay.
        secret_file: Contains the passphrase of the volume.
        paused: The driver has paused the CPUs while the domain switches from the overlay to the volume.
    """

    path: Path
    format: str
    overlay: Path
    secret_file: Path | None = None
    paused: bool = False


@dataclass(frozen=True, kw_only=True)
class InstanceMetadata:
    """Content of the element.

    Attributes:
        account_id: Of the owner, 12 digits.
        platform: Overrides libosinfo's metadata.
        root_device: Target of the root disk, such as vda; None: the disk that the domain boots from.
        root_device_type: Overrides the type that follows from the source of the root disk.
        secret_file: Contains the passphrase of the root volume.
        tags: Key to value.
        launch_time: Time of the last start that the driver knows (UTC).
        terminated: The instance is terminated.
        frozen: The overlay of the root volume.
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


def parse_metadata(elements: Iterable[Element]) -> InstanceMetadata | None:
    """Return the content of our element among a domain's metadata; None if there is none.

    Raises:
        InvalidDomainError: The element is not valid.
    """
    ours = [element for element in elements if element.tag == f"{{{NAMESPACE}}}instance"]
    return _parse_element(ours[0]) if ours else None


def format_metadata(metadata: InstanceMetadata, *, prefix: str = "") -> str:
    """Return the element for virDomainSetMetadata, or with the prefix `thrave:` for a domain's definition."""
    element = Element(f"{prefix}instance", {"xmlns:thrave": NAMESPACE} if prefix else {})
    _set(element, "account", metadata.account_id)
    _set(element, "platform", metadata.platform)
    _set(element, "rootDevice", metadata.root_device)
    _set(element, "rootDeviceType", metadata.root_device_type)
    _set(element, "secretFile", metadata.secret_file)
    _set(element, "launchTime", metadata.launch_time and metadata.launch_time.isoformat())
    _set(element, "terminated", "true" if metadata.terminated else None)
    for key, value in metadata.tags.items():
        ET.SubElement(element, f"{prefix}tag", {"key": key}).text = value
    if metadata.frozen is not None:
        _add_frozen(element, metadata.frozen, prefix)
    return ET.tostring(element, encoding="unicode")


def check_metadata(metadata: InstanceMetadata) -> None:
    """Check that metadata can be written as XML and parsed again.

    Raises:
        InvalidDomainError: They cannot.
    """
    text = format_metadata(metadata, prefix=f"{KEY}:")
    try:
        parsed = parse_metadata([ET.fromstring(text)])  # noqa: S314 (our own)
    except ET.ParseError:
        raise InvalidDomainError("it contains a character that XML cannot contain") from None
    if parsed != metadata:
        raise InvalidDomainError("it contains a character that XML changes")


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


def _parse_element(element: Element) -> InstanceMetadata:
    _refuse_unknown(element, _ATTRIBUTES)
    tags: dict[str, str] = {}
    frozen: OverlayMetadata | None = None
    for child in element:
        match child.tag.removeprefix(f"{{{NAMESPACE}}}"):
            case "tag":
                _refuse_unknown(child, {"key"})
                if (key := _required(child, "key")) in tags:
                    raise InvalidDomainError(f"tag: two tags with the key {key!r}")
                tags[key] = child.text or ""
            case "frozen":
                frozen = _parse_frozen(child)
            case other:
                raise InvalidDomainError(f"{other}: is neither tag nor frozen")
    return InstanceMetadata(
        account_id=_account(_required(element, "account")),
        platform=_choice(element, "platform", _PLATFORMS),
        root_device=element.get("rootDevice"),
        root_device_type=_choice(element, "rootDeviceType", _ROOT_DEVICE_TYPES),
        secret_file=_path(element, "secretFile"),
        tags=_checked(tags),
        launch_time=_time(element, "launchTime"),
        terminated=_choice(element, "terminated", _YES_OR_NO) == "true",
        frozen=frozen,
    )


def _parse_frozen(element: Element) -> OverlayMetadata:
    _refuse_unknown(element, _FROZEN_ATTRIBUTES)
    return OverlayMetadata(
        path=_required_path(element, "path"),
        format=_required(element, "format"),
        overlay=_required_path(element, "overlay"),
        secret_file=_path(element, "secretFile"),
        paused=_choice(element, "paused", _YES_OR_NO) == "true",
    )


def _refuse_unknown(element: Element, known: set[str]) -> None:
    for name in sorted(set(element.keys()) - known):
        raise InvalidDomainError(f"{name}: is none of {', '.join(sorted(known))}")


def _required(element: Element, name: str) -> str:
    value = element.get(name)
    if not value:
        raise InvalidDomainError(f"{name}: is missing")
    return value


def _account(text: str) -> str:
    if not re.fullmatch(r"[0-9]{12}", text):
        raise InvalidDomainError(f"account: {text[:40]!r} is not 12 digits")
    return text


def _choice(element: Element, name: str, choices: Collection[_Choice]) -> _Choice | None:
    value = element.get(name)
    for choice in choices:
        if value == choice:
            return choice
    if value is None:
        return None
    raise InvalidDomainError(f"{name}: {value[:40]!r} is none of {', '.join(choices)}")


def _path(element: Element, name: str) -> Path | None:
    value = element.get(name)
    if value is not None and not value.startswith("/"):
        raise InvalidDomainError(f"{name}: must be an absolute path")
    return None if value is None else Path(value)


def _required_path(element: Element, name: str) -> Path:
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
        raise InvalidDomainError(f"{name}: {value[:40]!r} is not a time") from None
    if time.tzinfo is None:
        raise InvalidDomainError(f"{name}: {value[:40]!r} has no time zone")
    return time.astimezone(UTC)


def _checked(tags: dict[str, str]) -> dict[str, str]:
    try:
        return validate_tags(tags)
    except ValueError as error:
        raise InvalidDomainError(f"tag: {error}") from None
