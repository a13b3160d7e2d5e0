"""An instance as EC2 describes it: states, volumes, tags, and their valid values.

The drivers check values from outside (instance files, domain metadata, the command line) against these types.
Constructing a value by hand checks nothing. Source of the tag limits: EC2 User Guide, "Tag your Amazon EC2 resources".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field
from pydantic.alias_generators import to_camel

from thrave.concurrency import utc_now

MAX_TAGS = 50
"""On one instance."""


MAX_KEY = 128
"""Characters."""


MAX_VALUE = 256
"""Characters."""


_RESERVED = "aws:"


# Tags are written as XML. XML cannot contain some of these characters and changes others.
_FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


_Tags = TypeVar("_Tags", bound=Mapping[str, str])


def validate_tags(tags: _Tags) -> _Tags:
    """Return the tags, key to value, unchanged.

    Raises:
        ValueError: There are too many tags, or one is not valid; the text names the tag and the reason.
    """
    if len(tags) > MAX_TAGS:
        raise ValueError(f"{len(tags)} tags: an instance may have at most {MAX_TAGS}")
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
        return f"begins with {_RESERVED}, which AWS reserves"
    return "contains a control character" if _FORBIDDEN_CHARACTERS.search(key + value) else None


INSTANCE_ID_PATTERN = r"^i-([0-9a-f]{8}|[0-9a-f]{17})$"
"""EC2's ids: 17 hexadecimal digits since 2016, 8 before."""


# Files and responses use the EC2 names in camelCase. An unknown name is most likely a spelling mistake.
_EC2_NAMES = ConfigDict(alias_generator=to_camel, extra="forbid")


class InstanceState(StrEnum):
    """EC2's states of an instance; `code` is the number next to the name in EC2 responses."""

    PENDING = "pending"
    RUNNING = "running"
    SHUTTING_DOWN = "shutting-down"
    TERMINATED = "terminated"
    STOPPING = "stopping"
    STOPPED = "stopped"

    @property
    def code(self) -> int:
        """InstanceState.Code, EC2 API reference."""
        return _STATE_CODES[self]


_STATE_CODES = {
    InstanceState.PENDING: 0,
    InstanceState.RUNNING: 16,
    InstanceState.SHUTTING_DOWN: 32,
    InstanceState.TERMINATED: 48,
    InstanceState.STOPPING: 64,
    InstanceState.STOPPED: 80,
}


class OffReason(StrEnum):
    """Why an instance is off. Only a guest that was shut down has certainly written all data to its volumes."""

    SHUT_DOWN = "shut-down"
    """The guest powered itself off."""
    POWER_CUT = "power-cut"
    """A user or program cut its power."""
    CRASHED = "crashed"
    """The guest, or the process that ran it, crashed."""
    LOST_POWER = "lost-power"
    """Its host or its hypervisor failed."""
    SAVED = "saved"
    """Its memory is saved, including data not yet written to disk. It has to be resumed, not started."""
    MIGRATED = "migrated"
    """It runs on another host."""
    UNKNOWN = "unknown"
    """The hypervisor has no record of it."""


UNREADABLE_REASONS: dict[OffReason, str] = {
    OffReason.SAVED: "its memory is saved with data that is not on the volume yet; start it and shut it down",
    OffReason.MIGRATED: "it has migrated to another host, which may write to its volume",
}
"""Why the volume of an instance that is off cannot be bundled, as a message."""


UNCLEAN_REASONS: dict[OffReason, str] = {
    OffReason.POWER_CUT: "its power was cut",
    OffReason.CRASHED: "it crashed",
    OffReason.LOST_POWER: "its host or its hypervisor failed (lost power)",
    OffReason.UNKNOWN: "its hypervisor has no record of whether it was shut down or lost power",
}
"""Why a volume may lack data that its guest had not written yet, as a message."""


TERMINATING = frozenset({InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED})
"""States that lead to termination; an instance never leaves them for another."""


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _utc(time: datetime) -> datetime:
    return time.astimezone(UTC)


@dataclass(frozen=True, kw_only=True)
class VolumeFile:
    """A disk of an instance: a file or block device of the host.

    Attributes:
        path: Absolute.
        format: QEMU's name: raw, qcow2, …
        device_name: EC2's name of the device.
        secret_file: Contains only the passphrase of an encrypted image (qcow2 with LUKS).
    """

    __pydantic_config__ = _EC2_NAMES

    path: Annotated[Path, AfterValidator(_absolute)]
    format: str = "raw"
    device_name: str = "/dev/sda1"
    secret_file: Annotated[Path, AfterValidator(_absolute)] | None = None


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A machine as EC2 describes it.

    Attributes:
        account_id: Of the owner, 12 digits.
        platform: `windows`, or None for anything else, as in EC2.
        root_device_type: `instance-store` when the root volume is a local file or disk, `ebs` when it is on network
            storage.
        root_volume: The one disk that is bundled.
        volumes: All other disks; never bundled.
        off_reason: Why it is off; None if it is on, or if no reason is known: then it counts as shut down.
        launch_time: When it was last started (UTC).
        tags: Set by the operator, key to value, within EC2's limits.
        host: The host of a fleet that the instance was added for; None: the first host that reports it. Hosts do not
            report this value, since an operator may have moved the instance to another host.
    """

    __pydantic_config__ = _EC2_NAMES

    instance_id: Annotated[str, Field(pattern=INSTANCE_ID_PATTERN)]
    account_id: Annotated[str, Field(pattern=r"^[0-9]{12}$")]
    platform: Literal["windows"] | None = None
    architecture: Literal["i386", "x86_64", "arm64"] = "x86_64"
    root_device_type: Literal["instance-store", "ebs"] = "instance-store"
    root_device_name: str = "/dev/sda1"
    root_volume: VolumeFile
    volumes: tuple[VolumeFile, ...] = ()
    state: InstanceState = InstanceState.RUNNING
    off_reason: OffReason | None = None
    launch_time: Annotated[AwareDatetime, AfterValidator(_utc)] = field(default_factory=utc_now)
    tags: Annotated[dict[str, str], AfterValidator(validate_tags)] = field(default_factory=dict)
    host: Annotated[str | None, Field(exclude=True)] = None
