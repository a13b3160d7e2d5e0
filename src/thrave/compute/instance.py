"""What an instance is: EC2's words for a machine of somebody's hypervisor.

Plain values. The types here also say what a valid value is, for whoever reads an instance from outside (the file driver
checks against them); constructing one by hand checks nothing. Which instances there are is `instances.py`.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field
from pydantic.alias_generators import to_camel

from thrave.compute.tags import checked_tags

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

GONE = frozenset({InstanceState.SHUTTING_DOWN, InstanceState.TERMINATED})
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
        launch_time: When it was last started (UTC).
        tags: Whatever the operator has put on it, key to value, within EC2's limits.
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
    launch_time: Annotated[AwareDatetime, AfterValidator(_utc)] = field(default_factory=lambda: datetime.now(UTC))
    tags: Annotated[dict[str, str], AfterValidator(checked_tags)] = field(default_factory=dict)
