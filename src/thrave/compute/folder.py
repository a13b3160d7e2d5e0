"""The folder of instance files: read, made, changed whole, removed. What stands in a file is `descriptions.py`."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from thrave import files
from thrave.compute import descriptions
from thrave.compute.descriptions import Description
from thrave.compute.errors import (
    InstanceAlreadyExists,
    InstanceError,
    InstanceHeld,
    InstanceNotFound,
    InvalidDescriptionError,
    StateChangedError,
)
from thrave.compute.instance import GONE, INSTANCE_ID_PATTERN, InstanceState, OffReason
from thrave.compute.locks import LOCK_TIMEOUT, locked

_INSTANCE_ID = re.compile(INSTANCE_ID_PATTERN)
_LOCKS = ".locks"
_NOBODYS = (
    b'{"instanceId": "i-00000000000000000", "accountId": null, "platform": "windows", "rootVolume": {"path": ""}}'
)
"""Read in place of a file that does not exist."""

log = logging.getLogger(__name__)


class DescriptionFolder:
    """One file an instance, named after its id; locks in a folder beside them.

    Args:
        root: The folder; it need not exist before the first file is made.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, instance_id: str) -> Description:
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
        return descriptions.read(instance_id, document, str(path))

    def owner_of(self, instance_id: str) -> str:
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
        owner = descriptions.read_owner(document)
        if owner is None and document is not _NOBODYS:
            log.warning("an instance's file names no owner: %s", path)
        if owner is None:
            raise InstanceNotFound(instance_id)
        return owner

    def read_all(self) -> tuple[Sequence[Description], Sequence[InstanceError]]:
        """Every file, by id: what can be read, and why the others cannot."""
        readable: list[Description] = []
        broken: list[InstanceError] = []
        for path in sorted(self._root.glob("i-*.json")):
            try:
                readable.append(self.read(path.stem))
            except InstanceError as error:
                broken.append(error)
        return readable, broken

    def create(self, description: Description) -> None:
        """Make the file of a new instance, if it can be read again.

        Raises:
            InvalidDescriptionError: It could not.
            InstanceAlreadyExists: The id is taken.
        """
        document = descriptions.write(description)
        descriptions.read(description.instance_id, document, "what was given")
        self._root.mkdir(parents=True, exist_ok=True)
        if not files.create_once(self._path(description.instance_id), document):
            raise InstanceAlreadyExists(description.instance_id)

    def change(
        self,
        instance_id: str,
        state: InstanceState,
        *,
        seen: Description | None = None,
        launch_time: datetime | None = None,
        off_reason: OffReason | None = None,
    ) -> None:
        """Write the file anew with another state; a reason of the old one goes.

        The file is read again under the lock, so that a change that was decided upon an older state is refused.

        Args:
            instance_id: The instance.
            state: The new state.
            seen: What was read when the change was decided; None: the change is right from every state but GONE.
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
                is_as_seen = before.state not in GONE or state in GONE
            else:
                # The launch time tells a start that came in between, also after the state has become the same again.
                is_as_seen = (before.state, before.launch_time) == (seen.state, seen.launch_time)
            if not is_as_seen:
                raise StateChangedError(instance_id, before.state)
            after = replace(before, state=state, off_reason=off_reason, launch_time=launch_time or before.launch_time)
            files.sweep(self._root)
            files.replace(self._path(instance_id), descriptions.write(after), spool=self._root)

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
        return locked(self._lock_path(instance_id, "held"), wait=False)

    @contextmanager
    def _alone(self, instance_id: str) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._lock_path(instance_id, "change"), wait=True))
            except BlockingIOError:
                raise InstanceHeld(instance_id, waited=LOCK_TIMEOUT) from None
            yield

    def _path(self, instance_id: str) -> Path:
        return self._root / f"{instance_id}.json"

    def _lock_path(self, instance_id: str, purpose: str) -> Path:
        return self._root / _LOCKS / f"{instance_id}.{purpose}"
