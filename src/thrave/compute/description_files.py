"""An instance's file: JSON that a person can read and edit, in EC2's words.

Reading checks everything: types, ids, unknown names. What is written can always be read again. It never looks at the
disk; `check_volumes` does, and only when asked.

The folder of instance files: read, made, changed whole, removed. What stands in a file is `descriptions.py`.
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

ArgumentVector = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class InstanceDescription(Instance):
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


_DESCRIPTION = TypeAdapter(InstanceDescription)


_INSTANCE = TypeAdapter(Instance)


def document(instance: Instance) -> dict[str, object]:
    """An instance for programs: EC2's words in camelCase, times as ISO 8601; its commands are left out."""
    plain: dict[str, object] = _INSTANCE.dump_python(instance, mode="json", by_alias=True)
    return plain


def from_document(document: object) -> Instance:
    """The instance of a `document` that this program has written."""
    return _INSTANCE.validate_python(document)


def write(description: InstanceDescription) -> bytes:
    """The file of an instance."""
    return _DESCRIPTION.dump_json(description, by_alias=True, exclude_none=True, indent=2, warnings=False) + b"\n"


def read(instance_id: str, document: bytes, source: str) -> InstanceDescription:
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


_INSTANCE_ID = re.compile(INSTANCE_ID_PATTERN)


_LOCKS = ".locks"


_NOBODYS = (
    b'{"instanceId": "i-00000000000000000", "accountId": null, "platform": "windows", "rootVolume": {"path": ""}}'
)
"""Read in place of a file that does not exist."""


log = logging.getLogger(__name__)


class DescriptionFiles:
    """One file an instance, named after its id; locks in a folder beside them.

    Args:
        root: The folder; it need not exist before the first file is made.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, instance_id: str) -> InstanceDescription:
        """What the instance's file says.

        Raises:
            InstanceNotFound: There is no such file, or this is no id.
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
        return read(instance_id, document, str(path))

    def get_owner(self, instance_id: str) -> str:
        """The account id in the instance's file, whatever else may be wrong with the file.

        It takes the same work whether there is such a file or not.

        Raises:
            InstanceNotFound: There is no such file, this is no id, or the file names no owner; then the log names it.
        """
        if not _INSTANCE_ID.fullmatch(instance_id):
            raise InstanceNotFound(instance_id)
        path = self._path(instance_id)
        try:
            document = path.read_bytes()
        except OSError as error:
            document = _NOBODYS if isinstance(error, FileNotFoundError) else b""
        owner = read_owner(document)
        if owner is None and document is not _NOBODYS:
            log.warning("an instance's file names no owner: %s", path)
        if owner is None:
            raise InstanceNotFound(instance_id)
        return owner

    def read_all(self) -> tuple[Sequence[InstanceDescription], Sequence[InstanceError]]:
        """Every file, by id: what can be read, and why the others cannot."""
        readable: list[InstanceDescription] = []
        broken: list[InstanceError] = []
        for path in sorted(self._root.glob("i-*.json")):
            try:
                readable.append(self.read(path.stem))
            except InstanceError as error:
                broken.append(error)
        return readable, broken

    def create(self, description: InstanceDescription) -> None:
        """Make the file of a new instance, if it can be read again.

        Raises:
            InvalidDescriptionError: It could not.
            InstanceAlreadyExists: The id is taken.
        """
        document = write(description)
        read(description.instance_id, document, "what was given")
        self._root.mkdir(parents=True, exist_ok=True)
        if not files.create_exclusive(self._path(description.instance_id), document):
            raise InstanceAlreadyExists(description.instance_id)

    def change(
        self,
        instance_id: str,
        state: InstanceState,
        *,
        seen: InstanceDescription | None = None,
        launch_time: datetime | None = None,
        off_reason: OffReason | None = None,
    ) -> None:
        """Write the file anew with another state; a reason of the old one goes.

        The file is read again under the lock, so that a change that was decided upon an older state is refused.

        Args:
            instance_id: The instance.
            state: The new state.
            seen: What was read when the change was decided; None: the change is right from every state but TERMINATING.
            launch_time: The new launch time; None: as before.
            off_reason: Why it is off, if it is.

        Raises:
            StateChangedError: The file says something else than `seen` (state or launch time), or the instance is
                terminated. Nothing was changed.
            InstanceHeld: The file is being changed, for longer than that takes.
        """
        with self._alone(instance_id):
            before = self.read(instance_id)
            if before.state is InstanceState.TERMINATED is not state:
                raise StateChangedError(instance_id, before.state)
            if seen is None:
                is_as_seen = before.state not in TERMINATING or state in TERMINATING
            else:
                # The launch time tells a start that came in between, also after the state has become the same again.
                is_as_seen = (before.state, before.launch_time) == (seen.state, seen.launch_time)
            if not is_as_seen:
                raise StateChangedError(instance_id, before.state)
            after = replace(before, state=state, off_reason=off_reason, launch_time=launch_time or before.launch_time)
            files.remove_stale(self._root)
            files.replace(self._path(instance_id), write(after), spool=self._root)

    def remove(self, instance_id: str) -> None:
        """Remove the file; it may be gone already. A change that is being written does not bring it back.

        Raises:
            InstanceHeld: The file is being changed, for longer than that takes.
        """
        with self._alone(instance_id):
            self._path(instance_id).unlink(missing_ok=True)
            files.sync_folder(self._root)

    def lock(self, instance_id: str) -> AbstractContextManager[None]:
        """The instance's lock for as long as somebody needs it unchanged; BlockingIOError if somebody else has it."""
        return file_lock(self._lock_path(instance_id, "held"), wait=False)

    @contextmanager
    def _alone(self, instance_id: str) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._lock_path(instance_id, "change"), wait=True))
            except BlockingIOError:
                raise InstanceLocked(instance_id, waited=LOCK_TIMEOUT) from None
            yield

    def _path(self, instance_id: str) -> Path:
        return self._root / f"{instance_id}.json"

    def _lock_path(self, instance_id: str, purpose: str) -> Path:
        return self._root / _LOCKS / f"{instance_id}.{purpose}"
