"""Checks of a bucket and its objects: everything that a task does there, with a few bytes under a prefix of its own.

`clean_up` takes everything away again, and the bucket if it was made for this.
"""

import hashlib
from contextlib import suppress

from thrave.buckets.errors import NoSuchBucket
from thrave.buckets.s3 import OWNER_KEY
from thrave.doctor.errors import Trouble
from thrave.doctor.subject import Subject

_CONTENT = b"thrave doctor was here\n"
_NEW_CONTENT = b"and has looked again\n"


def create(subject: Subject) -> str:
    """Create the bucket, if it is not there."""
    if subject.buckets.owner(subject.bucket) is None:
        subject.has_made_bucket = True
    subject.buckets.create(subject.bucket, subject.holder.account_id)
    return f"{subject.bucket}, new" if subject.has_made_bucket else f"{subject.bucket} was there"


def owner(subject: Subject) -> str:
    """Ask whose it is."""
    found = subject.buckets.owner(subject.bucket)
    if found != subject.holder.account_id:
        raise Trouble(f"its owner is shown as {found}, not as {subject.holder.account_id}")
    return found


def put(subject: Subject) -> str:
    """Store an object, signed."""
    subject.buckets.put(subject.bucket, _key(subject), _CONTENT)
    return f"{len(_CONTENT)} bytes"


def head(subject: Subject) -> str:
    """Ask for its size and ETag."""
    found = subject.buckets.head(subject.bucket, _key(subject))
    if found is None or found.size != len(_CONTENT):
        raise Trouble("the object is not there as it was stored")
    if found.etag is None:
        return "size, no ETag"
    if found.etag != hashlib.md5(_CONTENT, usedforsecurity=False).hexdigest():
        raise Trouble("its ETag is of another content")
    return "size and ETag"


def ranged(subject: Subject) -> str:
    """Read some bytes out of its middle."""
    if subject.buckets.get_range(subject.bucket, _key(subject), 7, 6) != _CONTENT[7:13]:
        raise Trouble("other bytes came than were asked for")
    return "6 bytes of it"


def listed(subject: Subject) -> str:
    """List what is under the prefix."""
    if [*subject.buckets.list(subject.bucket, _key(subject))] != [_key(subject)]:
        raise Trouble("the object is not listed")
    return "one object"


def overwrite(subject: Subject) -> str:
    """Store another content in its place, and read it."""
    subject.buckets.put(subject.bucket, _key(subject), _NEW_CONTENT)
    if subject.buckets.get(subject.bucket, _key(subject)) != _NEW_CONTENT:
        raise Trouble("the old content came back")
    return "the new content at once"


def delete(subject: Subject) -> str:
    """Delete everything under the prefix, and look."""
    subject.buckets.delete(subject.bucket, subject.buckets.list(subject.bucket, subject.prefix))
    if any(subject.buckets.list(subject.bucket, subject.prefix)):
        raise Trouble("what was deleted is still listed")
    return "nothing is left"


def clean_up(subject: Subject) -> str:
    """Take away what the trial has left, and its bucket."""
    with suppress(NoSuchBucket):
        subject.buckets.delete(subject.bucket, subject.buckets.list(subject.bucket, subject.prefix))
        if subject.has_made_bucket:
            _remove_bucket(subject)
    return "nothing is left"


def _remove_bucket(subject: Subject) -> None:
    """Remove the empty bucket; no task ever does, so no driver can."""
    if subject.settings.store == "s3":
        subject.buckets.delete(subject.bucket, [OWNER_KEY])
        subject.requests.send("DELETE", subject.bucket)
        return
    root = subject.settings.directory.buckets
    with suppress(FileNotFoundError):
        (root / subject.bucket).rmdir()
        (root / ".owners" / subject.bucket).unlink()


def _key(subject: Subject) -> str:
    return f"{subject.prefix}.put"
