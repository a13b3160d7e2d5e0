"""Checks of a bucket and its objects: everything that a task does there, with a few bytes under a prefix of its own.

`clean_up` takes everything away again, and the bucket if it was made for this. A bucket that exists stays as it is:
nobody becomes its owner.
"""

import hashlib
from contextlib import suppress

from thrave.buckets.base import UNKNOWN_OWNER
from thrave.buckets.errors import BucketError, NoSuchBucket
from thrave.doctor.errors import NotTried, Trouble
from thrave.doctor.subject import Subject

_CONTENT = b"thrave doctor was here\n"
_NEW_CONTENT = b"and has looked again\n"


def create(subject: Subject) -> str:
    """Create the bucket, if it is not there."""
    found = subject.buckets.owner(subject.bucket)
    if found is not None and not subject.by_owners_key:
        return f"{subject.bucket} was there"
    subject.buckets.create(subject.bucket, subject.holder.account_id, probe=f"{subject.prefix}.probe")
    subject.has_made_bucket = found is None
    return f"{subject.bucket}, new" if subject.has_made_bucket else f"{subject.bucket} was there"


def owner(subject: Subject) -> str:
    """Ask whose it is."""
    found = subject.buckets.owner(subject.bucket)
    if not subject.has_made_bucket and not subject.by_owners_key and found is not None:
        return "nobody yet: the first account that bundles into it, if it is empty" if found == UNKNOWN_OWNER else found
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


def conditional(subject: Subject) -> str:
    """Store an object twice, if it is not there (`If-None-Match: *`): the second time must be refused."""
    if subject.settings.store != "s3":
        raise NotTried("files are created once, or not at all")
    once = {"If-None-Match": "*"}
    for _ in range(2):
        try:
            subject.requests.send("PUT", subject.bucket, f"{subject.prefix}.once", headers=once, body=[_CONTENT])
        except BucketError as error:
            if error.code == "PreconditionFailed":
                return "the second one was refused"
            raise
    raise Trouble("the store ignores If-None-Match")


def delete(subject: Subject) -> str:
    """Delete everything that was stored, and look."""
    subject.buckets.delete(subject.bucket, _keys(subject))
    if left := [key for key in _keys(subject) if subject.buckets.head(subject.bucket, key) is not None]:
        raise Trouble(f"what was deleted is still there: {', '.join(left)}")
    return "nothing is left"


def clean_up(subject: Subject) -> str:
    """Take away what the trial has left, and its bucket."""
    with suppress(NoSuchBucket):
        subject.buckets.delete(subject.bucket, _keys(subject))
        if subject.has_made_bucket and not subject.buckets.remove(subject.bucket, subject.holder.account_id):
            raise Trouble(f"the bucket {subject.bucket} could not be removed")
    return "nothing is left"


def _keys(subject: Subject) -> list[str]:
    """Of every object that the checks store."""
    return [f"{subject.prefix}.{name}" for name in ("put", "post", "once", "probe")]


def _key(subject: Subject) -> str:
    return f"{subject.prefix}.put"
