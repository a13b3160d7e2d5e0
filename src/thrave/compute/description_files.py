"""Instance descriptions: JSON files that an operator can read and edit, with EC2's names, and the folder that has them.

Parsing checks types, ids and unknown names, but not whether the volumes exist; `check_volumes` does. A description that
was written can always be parsed again. A file is created once, replaced as a whole, and removed.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from thrave import files
from thrave.compute.errors import (
    InstanceAlreadyExists,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    InvalidDescriptionError,
    StateChangedError,
)
from thrave.compute.instance import INSTANCE_ID_PATTERN, TERMINATING, Instance, InstanceState, OffReason
from thrave.files import LOCK_TIMEOUT, file_lock

log = logging.getLogger(__name__)

ArgumentVector = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class InstanceDescription(Instance):
    """An instance, and the commands that connect it to its hypervisor.

    Attributes:
        stop_command: Asks the guest to power off. Without `state_command`, success means that the machine is off.
        force_stop_command: Cuts the power; success means that the machine is off.
        start_command: Starts the machine; success means that it runs.
        state_command: Prints the state, with EC2's or virsh's name. Without it the state is that in the file.
    """

    host: str | None = None  # unlike in `Instance`, part of the document
    stop_command: ArgumentVector | None = None
    force_stop_command: ArgumentVector | None = None
    start_command: ArgumentVector | None = None
    state_command: ArgumentVector | None = None


_DESCRIPTION = TypeAdapter(InstanceDescription)
_INSTANCE = TypeAdapter(Instance)
_INSTANCE_ID = re.compile(INSTANCE_ID_PATTERN)
_LOCK_FOLDER = ".locks"
_EMPTY_DOCUMENT = (
    b'{"instanceId": "i-00000000000000000", "accountId": null, "platform": "windows", "rootVolume": {"path": ""}}'
)
"""Parsed in place of a file that does not exist, so that the response takes the same time."""


def to_document(instance: Instance) -> dict[str, object]:
    """Return an instance as a JSON object: EC2's names in camelCase, times as ISO 8601, without commands and host."""
    document: dict[str, object] = _INSTANCE.dump_python(instance, mode="json", by_alias=True)
    return document


def from_document(document: object) -> Instance:
    """Return the instance of a document that `to_document` has returned. Raises pydantic.ValidationError."""
    return _INSTANCE.validate_python(document)


def format_description(description: InstanceDescription) -> bytes:
    """Return the content of an instance's file."""
    return _DESCRIPTION.dump_json(description, by_alias=True, exclude_none=True, indent=2, warnings=False) + b"\n"


def parse_description(instance_id: str, document: bytes, source: str) -> InstanceDescription:
    """Return the instance that a file describes.

    Args:
        instance_id: The id that the file must contain.
        document: The content of the file.
        source: Name of the file for messages.

    Raises:
        InvalidDescriptionError: With every fault, each with the name of the field in the file.
    """
    try:
        description = _DESCRIPTION.validate_json(document)
    except ValidationError as error:
        faults = [_fault(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()]
        raise InvalidDescriptionError(instance_id, source, faults) from None
    if description.instance_id != instance_id:
        raise InvalidDescriptionError(instance_id, source, [f"instanceId: is not {instance_id}"])
    return description


def parse_owner(document: bytes) -> str | None:
    """Return the account id in an instance's file, also if the rest is not valid; None if there is none."""
    try:
        owner = json.loads(document)["accountId"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return owner if isinstance(owner, str) else None


def check_volumes(instance: Instance) -> None:
    """Check that each volume of an instance exists, is a regular file or a block device, and can be read.

    Raises:
        InvalidDescriptionError: With each volume that is not.
    """
    named = [("rootVolume", instance.root_volume), *(("volumes", volume) for volume in instance.volumes)]
    faults = [_fault(name, fault) for name, volume in named if (fault := find_file_fault(volume.path))]
    if faults:
        raise InvalidDescriptionError(instance.instance_id, "the description", faults)


def find_file_fault(path: Path) -> str | None:
    """Return why the file or device of a volume cannot be read; None if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path}: {os.strerror(error.errno or 0)}"
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        return f"{path}: neither a regular file nor a block device"
    return None if os.access(path, os.R_OK) else f"{path}: cannot be read"


def _fault(name: str, message: str) -> str:
    return f"{name}: {message}" if name else message


class DescriptionFiles:
    """The folder of instance files, one file for each instance, named after the id. A subfolder has lock files.

    Args:
        root: The folder; `create` creates it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, instance_id: str) -> InstanceDescription:
        """Return the instance that its file describes.

        Raises:
            InstanceNotFound: There is no such file, or the id is not valid.
            InvalidDescriptionError: The file cannot be read or is not valid.
        """
        if not _INSTANCE_ID.fullmatch(instance_id):
            raise InstanceNotFound(instance_id)
        path = self._path(instance_id)
        try:
            document = path.read_bytes()
        except FileNotFoundError:
            raise InstanceNotFound(instance_id) from None
        except OSError as error:
            raise InvalidDescriptionError(instance_id, str(path), [os.strerror(error.errno or 0)]) from error
        return parse_description(instance_id, document, str(path))

    def get_owner(self, instance_id: str) -> str:
        """Return the account id in the instance's file, also if the rest of the file is not valid.

        Takes about the same time whether the file exists or not.

        Raises:
            InstanceNotFound: There is no such file, the id is not valid, or the file names no owner (which is logged).
        """
        if not _INSTANCE_ID.fullmatch(instance_id):
            raise InstanceNotFound(instance_id)
        path = self._path(instance_id)
        try:
            document = path.read_bytes()
        except OSError as error:
            document = _EMPTY_DOCUMENT if isinstance(error, FileNotFoundError) else b""
        owner = parse_owner(document)
        if owner is None and document is not _EMPTY_DOCUMENT:
            log.warning("instance file without owner: %s", path)
        if owner is None:
            raise InstanceNotFound(instance_id)
        return owner

    def read_all(self) -> tuple[Sequence[InstanceDescription], Sequence[InstanceError]]:
        """Read every file, in the order of ids. Returns the valid descriptions, and the errors of the other files."""
        readable: list[InstanceDescription] = []
        errors: list[InstanceError] = []
        for path in sorted(self._root.glob("i-*.json")):
            try:
                readable.append(self.read(path.stem))
            except InstanceError as error:
                errors.append(error)
        return readable, errors

    def create(self, description: InstanceDescription) -> None:
        """Create the file of a new instance.

        Raises:
            InvalidDescriptionError: The description is not valid.
            InstanceAlreadyExists: The id is taken.
        """
        document = format_description(description)
        parse_description(description.instance_id, document, "the description")
        self._root.mkdir(parents=True, exist_ok=True)
        if not files.create_exclusive(self._path(description.instance_id), document):
            raise InstanceAlreadyExists(description.instance_id)

    def change_state(
        self,
        instance_id: str,
        state: InstanceState,
        *,
        seen: InstanceDescription | None = None,
        launch_time: datetime | None = None,
        off_reason: OffReason | None = None,
    ) -> None:
        """Write another state to the file, and remove the reason of the old state.

        The file is read again while it is locked, to refuse a change that was decided on an older state.

        Args:
            instance_id: The instance.
            state: The new state.
            seen: The description on which the change was decided; None: accept every state except that only a change
                to a state in TERMINATING is accepted in such a state.
            launch_time: The new launch time; None: the old one.
            off_reason: Why the instance is off.

        Raises:
            StateChangedError: The state or launch time in the file differs from `seen`, or the instance is terminated.
                Nothing was changed.
            InstanceLocked: The file was locked for longer than a change takes.
        """
        with self._change_lock(instance_id):
            before = self.read(instance_id)
            if before.state is InstanceState.TERMINATED is not state:
                raise StateChangedError(instance_id, before.state)
            if seen is None:
                is_as_seen = before.state not in TERMINATING or state in TERMINATING
            else:
                # The launch time shows a start in the meantime, also if the state is the same again.
                is_as_seen = (before.state, before.launch_time) == (seen.state, seen.launch_time)
            if not is_as_seen:
                raise StateChangedError(instance_id, before.state)
            after = replace(before, state=state, off_reason=off_reason, launch_time=launch_time or before.launch_time)
            files.remove_stale(self._root)
            files.replace(self._path(instance_id), format_description(after), spool=self._root)

    def remove(self, instance_id: str) -> None:
        """Remove the file if it exists. The lock prevents that a change in progress creates it again.

        Raises:
            InstanceLocked: The file was locked for longer than a change takes.
        """
        with self._change_lock(instance_id):
            self._path(instance_id).unlink(missing_ok=True)
            files.sync_folder(self._root)

    def lock(self, instance_id: str) -> AbstractContextManager[None]:
        """Lock the instance against a start, for the length of a block. Raises BlockingIOError if it is locked."""
        return file_lock(self._lock_path(instance_id, "held"), wait=False)

    @contextmanager
    def _change_lock(self, instance_id: str) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._lock_path(instance_id, "change"), wait=True))
            except BlockingIOError:
                raise InstanceLocked(instance_id, waited=LOCK_TIMEOUT) from None
            yield

    def _path(self, instance_id: str) -> Path:
        return self._root / f"{instance_id}.json"

    def _lock_path(self, instance_id: str, purpose: str) -> Path:
        return self._root / _LOCK_FOLDER / f"{instance_id}.{purpose}"
