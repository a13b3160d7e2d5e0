"""Errors of bundle tasks and hosts: the table of error codes, the exceptions, and which errors are transient.

EC2 writes these codes with their prefix into the response (`Client.S3Error`, `Client.Cancelled`, seen in the records of
RightScale's right_aws); so does Thrave. The caller can fix a `Client.…` error, the operator a `Server.…` error. No
message contains a secret.
"""

import errno
import re
from enum import Enum
from typing import NamedTuple

import structlog

from thrave.buckets.errors import BucketError, TransientError
from thrave.bundle.errors import ImageError
from thrave.compute.errors import (
    HoldLostError,
    HypervisorUnavailable,
    ImageInUseError,
    InstanceCommandFailed,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    RootVolumeInUse,
    StateChangedError,
)
from thrave.database import is_unavailable
from thrave.tasks.lease import LeaseExpiredError, RightLostError
from thrave.tasks.models import BundleTaskState, HostEvent, HostState
from thrave.volumes.errors import VolumeError

log = structlog.get_logger()


class ErrorCode(NamedTuple):
    """A row of the table: what happened, and what to do about it."""

    meaning: str
    remedy: str


ERROR_CODES: dict[str, ErrorCode] = {
    "Client.Cancelled": ErrorCode(
        "CancelBundleTask was called.",
        "Nothing. The instance was started again. What had been stored was removed; what could not be removed is "
        "listed by `thrave task show`.",
    ),
    "Client.PrefixInUse": ErrorCode(
        "The bucket has a bundle under this prefix, and `existing_bundle` is `refuse`; or a large object is in the "
        "place of its manifest. Nothing that existed was touched.",
        "Choose another prefix, remove the bundle with `thrave delete`, or have the operator set "
        '`existing_bundle = "replace"`.',
    ),
    "Client.S3Error": ErrorCode(
        "The bucket refused an object. The message gives S3's code, HTTP status and words, as AWS did: "
        "`AccessDenied(403)- Invalid according to Policy: …`.",
        "Mend the upload policy or the bucket's permissions, and bundle again.",
    ),
    "Server.S3Error": ErrorCode(
        "The object store failed (status 5xx), did not answer, or lost what it was sent, again and again; or its clock "
        "and the host's differ. The message is as above.",
        "Mend the store, the disk that it is on, or the clock, and bundle again.",
    ),
    "Client.InstanceTerminated": ErrorCode(
        "The instance was terminated, or its description removed, while it was being bundled.",
        "Nothing can be done for this task.",
    ),
    "Server.InstanceNotStopped": ErrorCode(
        "The guest did not power off within the grace period. It was left running, or its power could not be cut.",
        "See why the guest ignores the shutdown request, raise `shutdown_timeout`, or have its power cut by "
        "`shutdown_timeout_action`, and bundle again.",
    ),
    "Server.InstanceNotStarted": ErrorCode(
        "The instance could not be started on its overlay, before its root volume was read. Once the volume was read, "
        "a start that fails costs no bundle: the task completes with a warning.",
        "Mend what the hypervisor says in the message. For a day the start is tried again, every five minutes at last.",
    ),
    "Server.InstanceError": ErrorCode(
        "The hypervisor refused to do something with the instance.",
        "The message gives the hypervisor's words; mend that, and bundle again.",
    ),
    "Server.VolumeError": ErrorCode(
        "The root volume could not be read to its end, was changed or in use meanwhile, is a disk of another machine "
        "that is not off, or is not clean; or its image is no whole disk by its own words; or what is unused on it "
        "cannot be told. The message names files without their folders; the service's log has their paths.",
        "See who has started the instance or uses its disk, and check the volume's file "
        "(docs/reference/disk-images.md) and the host's disks; have the "
        "guest shut down wholly, without fast start-up. Then bundle again.",
    ),
    "Server.NoProgress": ErrorCode(
        "Neither the root volume nor the bucket did anything for `stall_timeout` seconds, or the database was "
        "unavailable for so long while the instance was off.",
        "See why the host's disks, the store or the database do not answer, or raise `stall_timeout`, and bundle "
        "again.",
    ),
    "Server.HostLost": ErrorCode(
        "The host that had the instance's disk was lost, and the operator has retired it.",
        "Nothing can be done for this task. What it had stored, if anything, is listed by `thrave task show`.",
    ),
    "Server.InternalError": ErrorCode(
        "Something that nobody foresaw. The service's log has the details under the bundle task's id.",
        "Report it.",
    ),
}


# The folders of an absolute path; not those of a URL or of an object's key.
_FOLDERS = re.compile(r"(?<![\w:/.~-])/(?:[^\s/'\":;,()]+/)*(?=[^\s/'\":;,()])")


def without_folders(text: str) -> str:
    """Return a text without the folders of the host's files: a tenant must not learn the layout of the host."""
    return _FOLDERS.sub("", text)


class TaskFailure(Exception):
    """The task fails with a code of `ERROR_CODES`. Its owner reads the message."""

    def __init__(self, code: str, message: str) -> None:
        """Set a `code` of `ERROR_CODES`, and a `message` that says what happened.

        The folders of the host's files are removed from the message, which may come from a hypervisor or a command.
        """
        self.code = code
        self.message = without_folders(message)
        super().__init__(f"{code}: {self.message}")

    def with_second_failure(self, another: "TaskFailure") -> "TaskFailure":
        """Return this failure with the message of another one, which happened while the task was undone."""
        return TaskFailure(self.code, f"{self.message} ({another})")


class TaskCancelled(TaskFailure):
    """The owner has cancelled the task. The message is the one of AWS."""

    def __init__(self) -> None:
        super().__init__("Client.Cancelled", "User has requested bundling operation cancellation")


class ErrorKind(Enum):
    """How an error is handled: one classification for database, store, hypervisor, state command and disk."""

    PERMANENT = "the task fails with a reason"
    TRANSIENT = "the call is repeated until a deadline"
    UNRECORDABLE = (
        "the step is repeated for as long as it takes: the database does not answer, or the lease is in doubt"
    )
    RIGHT_LOST = "the run ends without a trace: the task belongs to another run or host"


# Of the machine itself: no memory, no process, no file descriptor, no space, for now.
_TRANSIENT_ERRNO = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.EDQUOT, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC,
    errno.ETIMEDOUT,
})  # fmt: skip


_TRANSIENT = (
    TransientError, HypervisorUnavailable, HoldLostError, ImageInUseError, InstanceLocked, StateChangedError,
)  # fmt: skip


def kind_of(error: BaseException) -> ErrorKind:
    """Classify an error that ended a call or a step."""
    if isinstance(error, RightLostError):
        return ErrorKind.RIGHT_LOST
    if isinstance(error, LeaseExpiredError) or is_unavailable(error):
        return ErrorKind.UNRECORDABLE
    return ErrorKind.TRANSIENT if _may_pass(error) else ErrorKind.PERMANENT


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later without a change."""
    return kind_of(error) in {ErrorKind.TRANSIENT, ErrorKind.UNRECORDABLE}


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, InstanceCommandFailed):  # the hypervisor behind a stateCommand is unavailable when that fails
        return error.command == "stateCommand"
    if isinstance(error, _TRANSIENT):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


# The task error codes for the errors of other packages; the first that matches.
EXPECTED_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (InstanceNotFound, "Client.InstanceTerminated"),
    (RootVolumeInUse, "Server.VolumeError"),
    (InstanceError, "Server.InstanceError"),
    (ImageError, "Server.VolumeError"),
    (BucketError, "Client.S3Error"),
)


def to_task_failure(error: Exception) -> TaskFailure:
    """Return the task failure for an error that ended a step. Details of an unexpected error are only logged."""
    if isinstance(error, TaskFailure):
        return error
    if isinstance(error, BucketError) and error.is_store_failure:
        return TaskFailure("Server.S3Error", str(error))
    if isinstance(error, VolumeError):  # its owner must not learn the layout of the host
        log.warning("root volume not readable", error=str(error))
        return TaskFailure("Server.VolumeError", error.public)
    for kind, code in EXPECTED_ERRORS:
        if isinstance(error, kind):
            log.warning("step failed", code=code, error=str(error))  # with full paths, for the operator
            return TaskFailure(code, str(error))
    log.error("step failed with an unexpected error", exc_info=error)
    return TaskFailure("Server.InternalError", "An internal error has occurred.")


_REMEDIES = {
    (HostEvent.DRAIN, HostState.FENCED): "another host has adopted its tasks. Start its agent first",
    (
        HostEvent.ACTIVATE,
        HostState.FENCED,
    ): "another host has adopted its tasks. It is active once its agent is started",
}
"""What an operator can do, by the requested event and the state that does not allow it."""


class HostError(Exception):
    """A request about a host that is not possible."""


class NoSuchHost(HostError):
    """There is no host of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no host {name}")


class HostInUse(HostError):
    """The host's agent has just sent a heartbeat."""


class HostStateError(HostError):
    """The state of the host does not allow the request."""

    def __init__(self, name: str, state: HostState, event: HostEvent) -> None:
        super().__init__(f"Host {name} is {state}: {_REMEDIES.get((event, state), 'its state does not allow this')}")


class AdopterError(HostError):
    """The host that is to adopt another one's tasks cannot do so."""


class BundleTaskError(Exception):
    """A request about a bundle task that cannot be granted."""


class BundlingInProgress(BundleTaskError):
    """The instance has a bundle task in progress."""

    def __init__(self, bundle_id: str) -> None:
        super().__init__(f"Instance is already being bundled: {bundle_id}")
        self.bundle_id = bundle_id


class PrefixInUse(BundleTaskError):
    """A bundle task that is not finished goes to the same bucket and prefix."""

    def __init__(self, bucket: str, prefix: str, bundle_id: str | None) -> None:
        """Name the task only if it belongs to the caller's account."""
        which = f"your bundle task {bundle_id}" if bundle_id else "another bundle task"
        super().__init__(
            f"Bucket prefix in use {bucket}/{prefix}: {which} is storing a bundle there. Wait until that task has "
            "ended, or choose another Prefix."
        )


class BundleTaskNotFound(BundleTaskError):
    """No task of the caller's has that id."""

    def __init__(self, bundle_id: str) -> None:
        super().__init__(f"The bundle task ID '{bundle_id}' does not exist")
        self.bundle_id = bundle_id


class BundleTaskNotCancellable(BundleTaskError):
    """The task is in a state in which it cannot be cancelled."""

    def __init__(self, state: BundleTaskState) -> None:
        super().__init__(f"Can't cancel bundle task when the bundle task is {state}")
        self.state = state


class TooManyBundleTasks(BundleTaskError):
    """The account has as many unfinished tasks as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"There may be {limit} bundle tasks in progress")
        self.limit = limit
