"""The table of error codes, and the code of each error."""

import re
from pathlib import Path

import pytest

import thrave
from thrave.buckets.errors import AccessDenied, InternalError, NoSuchBucket, StoreError, TransientError
from thrave.bundle.errors import ImageError
from thrave.compute.errors import (
    HypervisorError,
    InstanceCommandFailed,
    InstanceLocked,
    InstanceNotFound,
    InvalidDescriptionError,
    OverlayNotSupported,
)
from thrave.tasks.errors import (
    ERROR_CODES,
    EXPECTED_ERRORS,
    TaskCancelled,
    TaskFailure,
    to_task_failure,
    without_folders,
)
from thrave.volumes.errors import (
    ImageRefusedError,
    SkipRefusedError,
    VolumeChangedError,
    VolumeEncryptedError,
    VolumeError,
    VolumeInUseError,
    VolumeSharedError,
    VolumeUnreadableError,
    VolumeUnwritableError,
)

SOURCES = sorted(Path(thrave.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            AccessDenied.by_policy('Policy Condition failed: ["eq", "$acl", "aws-exec-read"]'),
            "Client.S3Error",
            # word for word what AWS answered in 2010, as RightScale's right_aws has it
            'AccessDenied(403)- Invalid according to Policy: Policy Condition failed: ["eq", "$acl", "aws-exec-read"]',
        ),
        (NoSuchBucket("It is gone"), "Client.S3Error", "NoSuchBucket(404)- It is gone"),
        (InternalError("No space left on device"), "Server.S3Error", "InternalError(500)- No space left on device"),
        (TransientError("SlowDown", 503, "Slow down"), "Server.S3Error", "SlowDown(503)- Slow down"),
        (TransientError("BadDigest", 400, "Lost"), "Server.S3Error", "BadDigest(400)- Lost"),
        (StoreError("RequestTimeTooSkewed", 403, "Late"), "Server.S3Error", "RequestTimeTooSkewed(403)- Late"),
        (InstanceNotFound("i-1"), "Client.InstanceTerminated", "there is no instance 'i-1'"),
        (InstanceLocked("i-1"), "Server.InstanceError", str(InstanceLocked("i-1"))),
        (VolumeError("no"), "Server.VolumeError", "no"),
        (ImageError("no"), "Server.VolumeError", "no"),
        (ZeroDivisionError("secret"), "Server.InternalError", "An internal error has occurred."),
        (TaskCancelled(), "Client.Cancelled", "User has requested bundling operation cancellation"),
    ],
)
def test_to_task_failure_returns_code_and_message(error, code, message):
    failure = to_task_failure(error)
    assert (failure.code, failure.message) == (code, message)


def test_second_failure_is_added_to_the_first():
    both = TaskCancelled().with_second_failure(TaskFailure("Server.InstanceNotStarted", "no memory"))
    assert (both.code, both.message) == (
        "Client.Cancelled",
        "User has requested bundling operation cancellation (Server.InstanceNotStarted: no memory)",
    )


def test_error_codes_have_every_code_in_use():
    given = {code for path in SOURCES for code in re.findall(r'TaskFailure\(\s*"([A-Za-z0-9.]+)"', path.read_text())}
    given |= {code for _, code in EXPECTED_ERRORS} | {"Client.Cancelled"}
    assert given == {*ERROR_CODES}


@pytest.mark.parametrize("code", ERROR_CODES)
def test_error_code_has_prefix_and_remedy(code):
    assert re.fullmatch(r"(Client|Server)\.[A-Z][A-Za-z0-9]+", code)
    assert all(text.endswith(".") for text in ERROR_CODES[code])


@pytest.mark.parametrize(
    "error",
    [
        VolumeUnreadableError(Path("/vm/a/win.raw"), "it refers to /vm/b/x.raw", files=("/vm/b/x.raw",)),
        ImageRefusedError(Path("/vm/a/win.vhd"), "it is a differencing disk"),
        VolumeChangedError(Path("/vm/a/win.raw"), "something wrote to it"),
        VolumeInUseError(Path("/vm/a/win.raw")),
        VolumeSharedError(Path("/vm/a/win.raw"), ["the domain of-another-tenant"]),
        VolumeEncryptedError(Path("/vm/a/win.raw"), "what /vm/s holds does not open it", files=("/vm/s",)),
        VolumeUnwritableError(Path("/vm/a/win.raw"), "no"),
        SkipRefusedError("there is no NTFS volume on it", Path("/vm/a/win.raw")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failure_message_has_file_names_without_folders(error):
    failure = to_task_failure(error)
    assert failure.code == "Server.VolumeError"
    assert "win." in failure.message
    assert "/vm" not in failure.message
    assert "tenant" not in failure.message
    assert "/vm/a/win." in str(error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            InvalidDescriptionError("i-1", "/var/lib/thrave/instances/i-1.json", ["state: '/srv/x' is none"]),
            "i-1.json does not describe an instance: state: 'x' is none",
        ),
        (OverlayNotSupported("i-1", "/dev/vg0/win is no file"), "win is no file"),
        (HypervisorError("i-1", "Cannot open '/srv/images/win.raw': denied"), "Cannot open 'win.raw': denied"),
        (
            InstanceCommandFailed("i-1", "stateCommand", "failed: sh: /opt/tools/state.sh: not found"),
            "the stateCommand of i-1 failed: sh: state.sh: not found",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_without_folders_keeps_file_names(error, message):
    assert to_task_failure(error).message == message


@pytest.mark.parametrize(
    "text",
    [
        "https://store.example:9000/bucket/key",
        "s3://bucket/folder/win.part.0",
        "'folder/win.part.0'",
        "5 / 7",
        "and/or",
    ],
)
def test_without_folders_keeps_urls_and_keys(text):
    assert without_folders(text) == text
