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
        "The owner has called CancelBundleTask.",
        "Nothing. The instance was started again, and the task's objects were deleted. `thrave task show` lists "
        "objects that could not be deleted.",
    ),
    "Client.PrefixInUse": ErrorCode(
        "The bucket has a bundle under this prefix, and `existing_bundle` is `refuse`; or the key of the manifest has "
        "an object that is too large for a manifest; or another task writes, or may still write, one of the objects. "
        "Existing objects were not changed.",
        "Choose another prefix, delete the bundle with `thrave delete`, or ask the operator to set "
        '`existing_bundle = "replace"`.',
    ),
    "Client.S3Error": ErrorCode(
        "The bucket refused a request, or has a different object now. The message has S3's code, HTTP status and "
        "message in the format of AWS: `AccessDenied(403)- Invalid according to Policy: …`.",
        "Fix the upload policy or the permissions of the bucket, and bundle again.",
    ),
    "Server.S3Error": ErrorCode(
        "The object store failed (status 5xx) or did not respond, also after retries; or it has lost an object that it "
        "had accepted; or the clocks of the store and the host differ. The message has the same format as that of "
        "`Client.S3Error`.",
        "Fix the store, its disk or the clock, and bundle again.",
    ),
    "Client.InstanceTerminated": ErrorCode(
        "The instance was terminated, or its description deleted, during the task.",
        "Nothing: the task cannot be repeated.",
    ),
    "Server.InstanceNotStopped": ErrorCode(
        "The guest did not power off within `shutdown_timeout` and still runs, or its power could not be cut.",
        "Find out why the guest ignores the shutdown request, raise `shutdown_timeout`, or have the power cut with "
        "`shutdown_timeout_action`. Then bundle again.",
    ),
    "Server.InstanceNotStarted": ErrorCode(
        "The instance could not be started on its overlay, before its root volume was read. After the volume was read, "
        "a failed start does not fail the task: it completes with a warning.",
        "Fix the problem that the hypervisor reports in the message. The start is retried for a day, at last every "
        "five minutes.",
    ),
    "Server.InstanceError": ErrorCode(
        "The hypervisor refused an operation on the instance.",
        "Fix the problem that the hypervisor reports in the message, and bundle again.",
    ),
    "Server.VolumeError": ErrorCode(
        "The root volume could not be read completely; was changed or used during the task; is also a disk of another "
        "machine that is not off; or is unclean. Or the metadata of its image says that it is not a whole disk, or "
        "unused space could not be determined. The message names files without their folders; the service's log has "
        "the paths.",
        "Find out who started the instance or uses its disk. Check the image file (docs/reference/disk-images.md) and "
        "the host's disks. Have the guest shut down completely, without fast startup. Then bundle again.",
    ),
    "Server.NoProgress": ErrorCode(
        "For `stall_timeout` seconds no byte of the root volume was read and no object was stored; or the database was "
        "unavailable for that time while the instance was off.",
        "Find out why the host's disks, the store or the database do not respond, or raise `stall_timeout`. Then "
        "bundle again.",
    ),
    "Server.HostLost": ErrorCode(
        "The operator has retired the host that had the instance's disk.",
        "Nothing: the task cannot be repeated. `thrave task show` lists the objects that it had stored.",
    ),
    "Server.InternalError": ErrorCode(
        "An unexpected error. The service's log has the details under the id of the bundle task.",
        "Report the error to the maintainers.",
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
    TRANSIENT = "the call is repeated until a timeout"
    UNRECORDABLE = "the step is repeated without a timeout: the database does not respond, or the lease has expired"
    RIGHT_LOST = "the run ends and writes nothing: the task belongs to another run or host"


# The machine itself lacks a resource at the moment: memory, a process, a file descriptor, space.
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
    if isinstance(error, InstanceCommandFailed):  # a stateCommand fails while its hypervisor is unavailable
        return error.command == "stateCommand"
    if isinstance(error, _TRANSIENT):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


# The codes for errors of other packages; the first that matches.
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
    if isinstance(error, VolumeError):  # a tenant must not learn the layout of the host
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
    (HostEvent.ACTIVATE, HostState.FENCED): "another host has adopted its tasks. Start its agent to activate it",
}
"""What an operator can do, by the requested event and the state that does not allow it."""


class HostError(Exception):
    """A request about a host that is not possible."""


class NoSuchHost(HostError):
    """There is no host of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no host {name}")


class HostInUse(HostError):
    """The agent of the host has sent a heartbeat within `heartbeat_timeout`."""


class HostStateError(HostError):
    """The state of the host does not allow the request."""

    def __init__(self, name: str, state: HostState, event: HostEvent) -> None:
        super().__init__(f"Host {name} is {state}: {_REMEDIES.get((event, state), 'its state does not allow this')}")


class AdopterError(HostError):
    """A host cannot adopt the tasks of another one."""


class BundleTaskError(Exception):
    """A request about a bundle task that is not possible."""


class BundlingInProgress(BundleTaskError):
    """The instance has a bundle task in progress."""

    def __init__(self, bundle_id: str) -> None:
        super().__init__(f"Instance is already being bundled: {bundle_id}")
        self.bundle_id = bundle_id


class PrefixInUse(BundleTaskError):
    """An unfinished bundle task has the same bucket and prefix."""

    def __init__(self, bucket: str, prefix: str, bundle_id: str | None) -> None:
        """Name the task only if it belongs to the caller's account."""
        which = f"your bundle task {bundle_id}" if bundle_id else "another bundle task"
        super().__init__(
            f"Bucket prefix in use {bucket}/{prefix}: {which} is storing a bundle there. Wait until that task has "
            "ended, or choose another Prefix."
        )


class BundleTaskNotFound(BundleTaskError):
    """The caller's account has no task with this id."""

    def __init__(self, bundle_id: str) -> None:
        super().__init__(f"The bundle task ID '{bundle_id}' does not exist")
        self.bundle_id = bundle_id


class BundleTaskNotCancellable(BundleTaskError):
    """The state of the task does not allow a cancellation."""

    def __init__(self, state: BundleTaskState) -> None:
        super().__init__(f"Can't cancel bundle task when the bundle task is {state}")
        self.state = state


class TooManyBundleTasks(BundleTaskError):
    """The account has its maximum number of unfinished tasks."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"There may be {limit} bundle tasks in progress")
        self.limit = limit
