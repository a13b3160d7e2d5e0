"""Tags that an operator puts on an instance, and what EC2 allows of them.

Source of the limits: EC2 User Guide, "Tag your Amazon EC2 resources". Who reads tags from outside checks them here, at
once and with one answer for every way in: the command line, an instance's file, a domain's metadata.

What an instance is: EC2's words for a machine of somebody's hypervisor.

Plain values. The types here also say what a valid value is, for whoever reads an instance from outside (the file driver
checks against them); constructing one by hand checks nothing. Which instances there are is `instances.py`.
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


def validate_tags(tags: _Tags) -> _Tags:
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


INSTANCE_ID_PATTERN = r"^i-([0-9a-f]{8}|[0-9a-f]{17})$"
"""EC2's ids: 17 hexadecimal digits since 2016, 8 before."""


# In files and answers names are EC2's, in camelCase; a name that nobody knows is most likely a misspelt one.
_EC2_WORDS = ConfigDict(alias_generator=to_camel, extra="forbid")


class InstanceState(StrEnum):
    """EC2's states of an instance; `code` is the number that stands beside the name in EC2's answers."""

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
    """Why an instance is off. Only one that was shut down has surely written everything to its volumes."""

    SHUT_DOWN = "shut-down"
    """The guest powered itself off."""
    POWER_CUT = "power-cut"
    """Its power was cut by somebody."""
    CRASHED = "crashed"
    """The guest, or the process that ran it, crashed."""
    LOST_POWER = "lost-power"
    """Its host or its hypervisor failed."""
    SAVED = "saved"
    """Its memory is saved, and what it had not written is in that: it is to be resumed, not started."""
    MIGRATED = "migrated"
    """It runs on another host."""
    UNKNOWN = "unknown"
    """The hypervisor has no record of it."""


NOT_TO_BE_READ: dict[OffReason, str] = {
    OffReason.SAVED: "its memory is saved, and its volume is not what it will go on with; start it and shut it down",
    OffReason.MIGRATED: "it has migrated to another host, which may write to its volume",
}
"""The reasons for which the volume of an instance that is off is not its content, in words."""


MAYBE_UNCLEAN: dict[OffReason, str] = {
    OffReason.POWER_CUT: "its power was cut",
    OffReason.CRASHED: "it crashed",
    OffReason.LOST_POWER: "its host or its hypervisor failed (lost power)",
    OffReason.UNKNOWN: "its hypervisor does not know whether it was shut down or lost its power",
}
"""The reasons for which a volume may lack what its guest had not written yet, in words."""


TERMINATING = frozenset({InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED})
"""The states from which no instance comes back."""


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
        format: In QEMU's words: raw, qcow2, …
        device_name: What EC2 calls the place where it is attached.
        secret_file: Holds the passphrase of an encrypted image (qcow2 with LUKS), and nothing else.
    """

    __pydantic_config__ = _EC2_WORDS

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
        off_reason: Why it is off; None if it is not, or if that is not told: then it counts as shut down.
        launch_time: When it was last started (UTC).
        tags: Whatever the operator has put on it, key to value, within EC2's limits.
        host: The host of a fleet that it was added for; None: the first host that reports it. An operator may have
            given it to another host since, so this is no part of what hosts report.
    """

    __pydantic_config__ = _EC2_WORDS

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
    launch_time: Annotated[AwareDatetime, AfterValidator(_utc)] = field(default_factory=lambda: datetime.now(UTC))
    tags: Annotated[dict[str, str], AfterValidator(validate_tags)] = field(default_factory=dict)
    host: Annotated[str | None, Field(exclude=True)] = None
