r"""Which names a new bucket may have, which a URL can hold, and where in a bucket a bundle lies.

The rules for new buckets are Amazon S3's ("General purpose bucket naming rules"). Buckets that exist may have other
names: until 2018 S3 allowed capitals, underscores and 255 characters, and an access point's alias is used like a
bucket. They are read whatever their name, if a URL can hold it. A bundle's prefix may hold folders:
`backups/win1` is the bundle `win1` in the folder `backups/`, and only the last segment is the bundle's name, which
stands in the manifest, in the tar header and in the names of the parts. Old readers handed those names to a shell or
joined them to paths, so each segment is plain ASCII, `[A-Za-z0-9_][A-Za-z0-9._-]*`: no `..`, no option, nothing to
quote. Pure rules: nothing here looks at a bucket.
"""

import re

from thrave.buckets.errors import InvalidArgument, InvalidBucketName

KEY_BYTES = 1024  # S3's limit for a key in UTF-8
NAME_CHARACTERS = 100  # the name field of a tar header (POSIX ustar)
_LONGEST_ENDING = len(".manifest.json")

_LONGEST_BUCKET_NAME = 255  # of S3's buckets in us-east-1 before March 2018
_DOTS = re.compile(r"(?:.*/)?\.\.?(?:/.*)?", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.))*[a-z0-9]")
_IP_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_RESERVED_STARTS = ("xn--", "sthree-", "amzn-s3-demo-")
_RESERVED_ENDS = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_bucket_name(bucket: str) -> None:
    """Refuse a name that S3 would not let a new bucket have.

    Raises:
        InvalidBucketName: 3 to 63 characters of `a-z0-9.-`, not like an IP address, not reserved by AWS.
    """
    fits = 3 <= len(bucket) <= 63 and _BUCKET.fullmatch(bucket) and not _IP_ADDRESS.fullmatch(bucket)
    if not fits or bucket.startswith(_RESERVED_STARTS) or bucket.endswith(_RESERVED_ENDS):
        raise InvalidBucketName("The specified bucket is not valid.")


def check_readable_bucket_name(bucket: str) -> None:
    """Refuse a name that no URL can hold unchanged; every bucket that exists has another.

    Raises:
        InvalidBucketName: 1 to 255 printable ASCII characters, no `/`, not `.` and not `..`.
    """
    fits = 1 <= len(bucket) <= _LONGEST_BUCKET_NAME and bucket.isascii() and bucket.isprintable()
    if not fits or " " in bucket or "/" in bucket or bucket in (".", ".."):
        raise InvalidBucketName("The specified bucket is not valid.")


def check_key(key: str) -> None:
    """Refuse a key that no URL can hold unchanged; empty stands for the bucket itself.

    Raises:
        InvalidArgument: It has more than 1,024 bytes, is no UTF-8, or has a segment `.` or `..`.
    """
    try:
        fits = len(key.encode()) <= KEY_BYTES
    except UnicodeEncodeError:
        fits = False
    if not fits or _DOTS.fullmatch(key):  # servers and proxies on the way resolve dots
        raise InvalidArgument(f"No object can have a key like {key[:80]!r}: {KEY_BYTES} bytes, no segment . or ..")


def split_prefix(prefix: str) -> tuple[str, str]:
    """Take a bundle's prefix apart into its folder and its name.

    Args:
        prefix: `win1` or `backups/2026/win1`.

    Returns:
        The folder, empty or ending in `/`, and the bundle's name; the bundle's files are `folder + name + …`.

    Raises:
        InvalidArgument: A segment is empty, begins with a dot or dash or has other characters; or it is too long.
    """
    *folders, name = prefix.split("/")
    if not all(_SEGMENT.fullmatch(segment) for segment in (*folders, name)):
        raise InvalidArgument(
            "A bundle's prefix has segments of A-Z a-z 0-9 . _ - between slashes, and none begins with a dot or a dash"
        )
    if len(name) > NAME_CHARACTERS or len(prefix) > KEY_BYTES - _LONGEST_ENDING:
        raise InvalidArgument(f"A bundle's name has at most {NAME_CHARACTERS} characters, its keys {KEY_BYTES}")
    return "".join(folder + "/" for folder in folders), name
