"""An instance's file: JSON that a person can read and edit, in EC2's words.

Reading checks everything: types, ids, unknown names. What is written can always be read again. It never looks at the
disk; `check_volumes` does, and only when asked.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from thrave.compute.errors import InvalidDescriptionError
from thrave.compute.instance import Instance

ArgumentVector = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Description(Instance):
    """An instance, and the commands that tie it to its hypervisor.

    Attributes:
        stop_command: Asks the guest to power off. Without `state_command` its success means that the machine is off.
        force_stop_command: Cuts the power; its success means that the machine is off.
        start_command: Starts the machine; its success means that it runs.
        state_command: Prints the state, in EC2's words or virsh's. Without it the state is the one in the file.
    """

    host: str | None = None  # written to the file
    stop_command: ArgumentVector | None = None
    force_stop_command: ArgumentVector | None = None
    start_command: ArgumentVector | None = None
    state_command: ArgumentVector | None = None


_DESCRIPTION = TypeAdapter(Description)
_INSTANCE = TypeAdapter(Instance)


def document(instance: Instance) -> dict[str, object]:
    """An instance for programs: EC2's words in camelCase, times as ISO 8601; its commands are left out."""
    plain: dict[str, object] = _INSTANCE.dump_python(instance, mode="json", by_alias=True)
    return plain


def from_document(document: object) -> Instance:
    """The instance of a `document` that this program has written."""
    return _INSTANCE.validate_python(document)


def write(description: Description) -> bytes:
    """The file of an instance."""
    return _DESCRIPTION.dump_json(description, by_alias=True, exclude_none=True, indent=2, warnings=False) + b"\n"


def read(instance_id: str, document: bytes, source: str) -> Description:
    """The instance that a file describes.

    Args:
        instance_id: The id that it must have.
        document: The file's content.
        source: What to call it in a message.

    Raises:
        InvalidDescriptionError: With every fault, each under its name in the file.
    """
    try:
        description = _DESCRIPTION.validate_json(document)
    except ValidationError as error:
        faults = [_fault(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()]
        raise InvalidDescriptionError(instance_id, source, faults) from None
    if description.instance_id != instance_id:
        raise InvalidDescriptionError(instance_id, source, [f"instanceId: is not {instance_id}"])
    return description


def read_owner(document: bytes) -> str | None:
    """The account id in an instance's file, whatever else may be wrong with it; None if there is none."""
    try:
        owner = json.loads(document)["accountId"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return owner if isinstance(owner, str) else None


def check_volumes(instance: Instance) -> None:
    """See that each volume of an instance is there, can be read, and is a regular file or a block device.

    Raises:
        InvalidDescriptionError: One is not.
    """
    named = [("rootVolume", instance.root_volume), *(("volumes", volume) for volume in instance.volumes)]
    faults = [_fault(name, fault) for name, volume in named if (fault := volume_fault(volume.path))]
    if faults:
        raise InvalidDescriptionError(instance.instance_id, "what was given", faults)


def volume_fault(path: Path) -> str | None:
    """Why a volume's file cannot be read; None if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path}: {os.strerror(error.errno or 0)}"
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        return f"{path}: neither a regular file nor a block device"
    return None if os.access(path, os.R_OK) else f"{path}: cannot be read"


def _fault(name: str, message: str) -> str:
    return f"{name}: {message}" if name else message
