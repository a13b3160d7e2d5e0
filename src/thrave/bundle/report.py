"""What a reader of a bundle has checked, and what could not be checked and why.

Data only. A check that fails is an error, never an entry here.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from thrave.bundle.manifest import Manifest


class Subject(StrEnum):
    """What can be checked, in the order in which it is."""

    SIGNATURE = "signature"
    STRUCTURE = "structure"
    SIDE_FILE = "sideFile"
    SIDE_KEY = "sideKey"
    PART_SIZES = "partSizes"
    PART_DIGESTS = "partDigests"
    IMAGE_DIGEST = "imageDigest"
    IMAGE_SIZE = "imageSize"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        subject: what it is about.
        checked: True: it holds; False: it could not be checked.
        detail: what was found, or why nothing could be.
    """

    subject: Subject
    checked: bool
    detail: str


@dataclass(frozen=True)
class Verified:
    """A bundle in which nothing was found wrong.

    Attributes:
        manifest: what it says.
        checks: one for each subject that was looked at, in their order.
    """

    manifest: Manifest
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Opened(Verified):
    """A bundle that has been opened.

    Attributes:
        output: where its image is.
    """

    output: Path
