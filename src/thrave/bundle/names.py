"""The names of a bundle's files: which are safe to write and to read, and how parts are numbered.

A name in a manifest is a stranger's word: it is used only as a bare file name beside the manifest. Nothing here
touches a disk.
"""

import hashlib
import re
import secrets

from thrave.bundle.errors import NamingError

PART_SIZE = 10 * 1024 * 1024
"""Bytes of each part but the last, as ec2-ami-tools and every other known bundler cuts them."""

MANIFEST_SUFFIX = ".manifest.xml"
SIDE_FILE_SUFFIX = ".manifest.json"

_SERIES_DIGITS = 12
_BINDING_DIGITS = 32  # hexadecimal ones of the manifest's SHA-256
_LONGEST = 255
_LONGEST_SUFFIX = max(len(".part.") + 7, len(MANIFEST_SUFFIX), len(SIDE_FILE_SUFFIX))

_ACCOUNT_ID = re.compile(r"[0-9]{12}")
_WORD = re.compile(r"[A-Za-z0-9._-]+")
_PREFIX = re.compile(r"""(?![ .])(?:(?![/\\&<>"'])[ -~])+""")


def checked_prefix(prefix: str) -> str:
    """Return the prefix if a bundle may be written under it.

    It becomes the image's name, the tar member's and the stem of every file name, so it is a bare file name: ASCII
    without control characters, slashes and the five characters that XML escapes (verifiers that re-serialise the
    manifest, as ec2-ami-tools does, would not reproduce them), without a leading dot, and short enough to leave
    room for ``.part.NNNNNNN`` and ``.manifest.json`` in 255 bytes. The folder of an S3 prefix is the caller's affair.

    Raises:
        NamingError: it may not be used.
    """
    if not _PREFIX.fullmatch(prefix):
        raise NamingError(
            f"the prefix {prefix!r} must be a plain ASCII file name:"
            " no slash, no leading dot or space, none of & < > \" '"
        )
    if len(prefix) > _LONGEST - _LONGEST_SUFFIX:
        raise NamingError(f"the prefix is {len(prefix)} characters long; at most {_LONGEST - _LONGEST_SUFFIX} fit")
    return prefix


def checked_account_id(account_id: str) -> str:
    """Return the account id if it is one: 12 digits, without the hyphens that EC2 refuses in a manifest.

    Raises:
        NamingError: it is none.
    """
    if not _ACCOUNT_ID.fullmatch(account_id):
        raise NamingError(f"the account id {account_id!r} is not 12 digits")
    return account_id


def checked_architecture(architecture: str) -> str:
    """Return the architecture if it is a plain word, as EC2's ``x86_64``, ``i386`` and ``arm64`` are.

    Raises:
        NamingError: it is none.
    """
    if not _WORD.fullmatch(architecture):
        raise NamingError(f"the architecture {architecture!r} is not a plain word")
    return architecture


def checked_filename(filename: str) -> str:
    """Return a part's file name as a manifest gives it, if it names a file in the manifest's own folder.

    Old bundles have names with a leading dot, blanks, ``&`` or quotes. Any name is read that Linux lets a file have;
    what is printed of one is escaped.

    Raises:
        NamingError: It is empty, ``.`` or ``..``, has a slash or NUL in it, or more than 255 bytes of UTF-8.
    """
    bare = filename not in {"", ".", ".."} and not set(filename) & set("/\0")
    if not bare or len(filename.encode(errors="surrogatepass")) > _LONGEST:
        raise NamingError(f"{filename[:80]!r} is not a bare file name")
    return filename


def part_width(stream_length: int, part_size: int = PART_SIZE) -> int:
    """Return how many digits the part numbers of a bundle have.

    Names must sort in their order and the first is stored before the last is known, so the width follows from the
    most parts that can come of a stream. That ec2-ami-tools pads to the digits of the count (nine parts ``.part.0``,
    ten ``.part.00``) is kept for that most.

    Args:
        stream_length: the most bytes of ciphertext that there can be.
        part_size: bytes of each part but the last.
    """
    return len(str(-(-stream_length // part_size)))


def part_filename(prefix: str, index: int, width: int, series: str = "") -> str:
    """Return the file name of a part: ``PREFIX.part.007`` for index 7 and width 3.

    Args:
        prefix: the bundle's name.
        index: from 0.
        width: digits of the index.
        series: digits before the index; see ``new_series``.
    """
    return f"{prefix}.part.{series}{index:0{width}}"


def new_series() -> str:
    """Return digits that keep the names of a bundle's parts apart from those of every other bundle of its prefix.

    They stand before the part's index, so the names match ``PREFIX.part.[0-9]+`` as those of every known bundler do,
    and sort in their order. They are longer than any index, so no such name is one without a series.
    """
    return f"{1 + secrets.randbelow(9)}" + "".join(str(secrets.randbelow(10)) for _ in range(_SERIES_DIGITS - 1))


def own_part(prefix: str) -> re.Pattern[str]:
    """Return a pattern of the names that the parts of a bundle may have: no other file is ever copied or removed."""
    return re.compile(re.escape(prefix) + r"\.part\.[0-9]+")


def manifest_filename(prefix: str) -> str:
    """Return the file name of the manifest, which every tool derives from the prefix."""
    return prefix + MANIFEST_SUFFIX


def side_filename(prefix: str) -> str:
    """Return the usual file name of the side file, which old tools ignore."""
    return prefix + SIDE_FILE_SUFFIX


def bound_side_filename(prefix: str, manifest_xml: bytes) -> str:
    """Return the file name of a side file that belongs to one manifest: ``PREFIX.manifest.DIGEST.json``.

    A bundle that replaces another one has it, so that the side file of neither is ever read with the manifest of the
    other. Readers look for it first, then for the usual name.
    """
    return f"{prefix}.manifest.{hashlib.sha256(manifest_xml).hexdigest()[:_BINDING_DIGITS]}.json"
