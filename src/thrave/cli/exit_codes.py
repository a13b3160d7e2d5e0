"""The exit codes of the `thrave` command, and the errors that lead to them.

The codes are stable: scripts depend on them, and a code keeps its meaning. docs/reference/exit-codes.md is generated
from `MEANING`. No module of the service is imported here, so that `thrave --help` stays quick.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import thrave

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import thrave.buckets.errors
    import thrave.bundle.errors
    import thrave.cli.folders
    import thrave.components
    import thrave.compute.errors
    import thrave.config
    import thrave.database
    import thrave.demo.disk
    import thrave.demo.tour
    import thrave.files
    import thrave.host_files.installer
    import thrave.http_server
    import thrave.identity.errors
    import thrave.tasks.errors
    import thrave.testing
    import thrave.vault
    import thrave.volumes.errors  # noqa: TC004 (the names are looked up when an error has occurred)

_Value = TypeVar("_Value")


class Exit(IntEnum):
    """Exit codes; `MEANING` describes them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    DAMAGED = 10
    WRONG_KEY = 11
    MISSING_COMPONENT = 12
    TASK_FAILED = 20
    TASK_CANCELLED = 21
    START_AGAIN = 30
    LEASE_LOST = 75
    INTERRUPTED = 130


MEANING: dict[Exit, str] = {
    Exit.OK: "Success.",
    Exit.FAILED: "Failed; the reason is on stderr.",
    Exit.USAGE: "The command line is wrong.",
    Exit.NOT_FOUND: "A file, account, instance, bundle task or bucket does not exist.",
    Exit.REFUSED: "Refused: wrong state, name in use, limit reached, no permission, or plain HTTP on a public address.",
    Exit.DAMAGED: "The bundle is damaged or forged: a signature, digest, size or name is wrong.",
    Exit.WRONG_KEY: "The bundle was not encrypted for this private key.",
    Exit.MISSING_COMPONENT: "A required program or library is not installed; stderr names the package.",
    Exit.TASK_FAILED: "A watched bundle task has failed.",
    Exit.TASK_CANCELLED: "A watched bundle task was cancelled, and none failed.",
    Exit.START_AGAIN: "An operator ended the drain of this host while its agent drained: start the agent again.",
    Exit.LEASE_LOST: "Another process is now the agent of this host, or another host has adopted its tasks.",
    Exit.INTERRUPTED: "Stopped by Ctrl-C.",
}

NO_RESTART = frozenset({Exit.USAGE, Exit.REFUSED, Exit.LEASE_LOST})
"""After these a service manager must not restart a service: it would fail again, or take a host back."""

# Expected errors; the first match decides. Lambdas, so that no module is imported for the table, and mypy still checks
# the names.
EXITS: tuple[tuple[Callable[[], type[Exception]], Exit], ...] = (
    (lambda: thrave.bundle.errors.WrongKeyError, Exit.WRONG_KEY),
    (lambda: thrave.bundle.errors.DamagedError, Exit.DAMAGED),
    (lambda: thrave.bundle.errors.PartMissingError, Exit.NOT_FOUND),
    (lambda: thrave.bundle.errors.NamingError, Exit.USAGE),
    (lambda: thrave.bundle.errors.OutputExistsError, Exit.REFUSED),
    (lambda: thrave.bundle.errors.BundleError, Exit.FAILED),
    (lambda: thrave.cli.folders.FileMissingError, Exit.NOT_FOUND),
    (lambda: thrave.cli.folders.FolderRefusedError, Exit.REFUSED),
    (lambda: thrave.cli.folders.FolderError, Exit.FAILED),
    (lambda: thrave.identity.errors.NoSuchEntity, Exit.NOT_FOUND),
    (lambda: thrave.identity.errors.EntityAlreadyExists, Exit.REFUSED),
    (lambda: thrave.identity.errors.LimitExceeded, Exit.REFUSED),
    (lambda: thrave.identity.errors.DeleteConflict, Exit.REFUSED),
    (lambda: thrave.identity.errors.IdentityError, Exit.FAILED),
    (lambda: thrave.vault.VaultError, Exit.FAILED),
    (lambda: thrave.tasks.errors.BundleTaskNotFound, Exit.NOT_FOUND),
    (lambda: thrave.tasks.errors.BundleTaskError, Exit.REFUSED),
    (lambda: thrave.tasks.errors.NoSuchHost, Exit.NOT_FOUND),
    (lambda: thrave.tasks.errors.HostError, Exit.REFUSED),
    (lambda: thrave.config.SettingsError, Exit.USAGE),
    (lambda: thrave.host_files.installer.HostFilesError, Exit.REFUSED),
    (lambda: thrave.files.NotPrivateError, Exit.FAILED),
    (lambda: thrave.database.DatabaseUnusableError, Exit.FAILED),
    (lambda: thrave.components.DataDirectoryInUseError, Exit.REFUSED),
    (lambda: thrave.components.DataDirectoryError, Exit.FAILED),
    (lambda: thrave.buckets.errors.BucketError, Exit.FAILED),
    (lambda: thrave.compute.errors.InstanceNotFound, Exit.NOT_FOUND),
    (lambda: thrave.compute.errors.InstanceCommandFailed, Exit.FAILED),
    (lambda: thrave.compute.errors.InvalidDescriptionError, Exit.FAILED),
    (lambda: thrave.compute.errors.LibraryNotInstalled, Exit.MISSING_COMPONENT),
    (lambda: thrave.compute.errors.HypervisorError, Exit.FAILED),
    (lambda: thrave.compute.errors.InstanceError, Exit.REFUSED),
    (lambda: thrave.volumes.errors.ToolNotInstalled, Exit.MISSING_COMPONENT),
    (lambda: thrave.volumes.errors.VolumeError, Exit.FAILED),
    (lambda: thrave.http_server.PlainHttpNotAllowed, Exit.REFUSED),
    (lambda: thrave.http_server.ListeningError, Exit.FAILED),
    (lambda: thrave.demo.disk.DemoDiskError, Exit.USAGE),
    (lambda: thrave.demo.tour.DemoError, Exit.FAILED),
    (lambda: thrave.testing.ServerError, Exit.FAILED),
    (lambda: thrave.testing.ComponentMissingError, Exit.MISSING_COMPONENT),
)

# What to do about errors whose message does not say it; the first match decides.
REMEDIES: tuple[tuple[Callable[[], type[Exception]], str], ...] = (
    (
        lambda: thrave.bundle.errors.WrongKeyError,
        "Pass the private key that belongs to one of the two certificates of the bundle.",
    ),
    (
        lambda: thrave.bundle.errors.PartMissingError,
        "Copy the part into the directory of the manifest; without it the bundle cannot be opened.",
    ),
    (
        lambda: thrave.bundle.errors.SignatureError,
        "Pass the certificate of the signer; if this is the certificate, do not trust the bundle.",
    ),
    (
        lambda: thrave.bundle.errors.PartDamagedError,
        "Copy the part again from another copy of the bundle.",
    ),
    (lambda: thrave.bundle.errors.DamagedError, "Get another copy of the bundle."),
    (lambda: thrave.cli.folders.FileMissingError, "Check the path."),
    (
        lambda: thrave.identity.errors.NoSuchEntity,
        "`thrave account list` lists accounts and keys, `thrave account user list` the users of an account.",
    ),
    (
        lambda: thrave.identity.errors.EntityAlreadyExists,
        "Choose another name; `thrave account list` lists the existing accounts.",
    ),
    (lambda: thrave.tasks.errors.BundleTaskNotFound, "`thrave task list` lists the tasks."),
    (
        lambda: thrave.tasks.errors.BundleTaskNotCancellable,
        "`thrave task list --unfinished` lists the tasks that can be cancelled.",
    ),
    (lambda: thrave.tasks.errors.NoSuchHost, "`thrave host list` lists the hosts."),
    (lambda: thrave.compute.errors.InstanceNotFound, "`thrave instance list` lists the instances."),
    (lambda: thrave.compute.errors.InstanceAlreadyExists, "Choose another id, or remove that instance first."),
)


def remedy_of(error: Exception) -> str | None:
    """Return what to do about an expected error, if its message does not say it."""
    return _find(REMEDIES, error) or remedy_of_os_error(_os_cause(error.__cause__))


def _os_cause(error: BaseException | None) -> OSError | None:
    """Return the error of the system that caused an error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error


def remedy_of_os_error(error: OSError | None) -> str | None:
    """Return what to do about an error of the system: no permission, no space, no file."""
    if isinstance(error, PermissionError):
        return "Check the owner and mode of the file and its directory, or run the command as another user."
    if isinstance(error, FileNotFoundError):
        return "Check the path."
    if error is not None and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "Free some space on the file system."
    return None


def exit_code(error: Exception) -> Exit | None:
    """Return the exit code of an expected error, None for an unexpected one.

    A failure because of a missing permission is a refusal, whatever the command did.
    """
    code = _find(EXITS, error)
    return Exit.REFUSED if code is Exit.FAILED and isinstance(_os_cause(error.__cause__), PermissionError) else code


def _find(table: Sequence[tuple[Callable[[], type[Exception]], _Value]], error: Exception) -> _Value | None:
    for get_class, value in table:
        try:
            error_class = get_class()
        except AttributeError:  # the module is not imported, so it did not raise this error
            continue
        if isinstance(error, error_class):
            return value
    return None
