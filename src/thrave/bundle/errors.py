"""What can be wrong with a bundle, its parts and its keys.

Every error that the room raises about what it was given is one of these, with a message that says what was found
and where; none of them ever carries a key, an IV or deciphered data. The tree::

    BundleError
    ├── ImageError              the volume cannot be bundled
    ├── ResumeError             a sealing that was cut off cannot go on: begin again, with another key
    ├── UnwritableValueError    a manifest says something that cannot be written anew
    ├── NamingError             a prefix or a file name that must not be used
    ├── OutputError             the image cannot be written where it was asked for
    │   └── OutputExistsError   a file is there that may not be replaced
    ├── PartMissingError        a part is not where the bundle lies
    ├── WrongKeyError           the private key opens neither slot of the manifest
    └── DamagedError            the bundle is not what its maker wrote
        ├── ManifestError       no manifest, or one that contradicts itself
        ├── SignatureError      the manifest's signature does not verify
        ├── SideFileError       the side file is broken, missing though asked for, or contradicts the bundle
        ├── PartDamagedError    a part is not the one that the manifest describes
        └── ContentError        what the parts hold is no image, or not the one that the manifest describes
"""

from pathlib import Path


class BundleError(Exception):
    """Root of everything that is raised about a bundle."""


class ImageError(BundleError):
    """The volume is empty, or its extents contradict its size."""


class ResumeError(BundleError):
    """What is sealed, or how, is not what it was before the sealing was cut off."""


class UnwritableValueError(BundleError):
    """A value cannot be written into a manifest that every verifier accepts."""


class NamingError(BundleError):
    """A name that could escape its folder, break the manifest or not be stored."""


class OutputError(BundleError):
    """The opened image cannot be written where it was asked for."""


class OutputExistsError(OutputError):
    """A file is where the image was to go, and may not be replaced."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists; choose another file, or replace it with --force")


class PartMissingError(BundleError):
    """A part cannot be read where the bundle lies."""

    def __init__(self, filename: str, reason: str) -> None:
        super().__init__(f"part {filename!r} cannot be read: {reason}")


class WrongKeyError(BundleError):
    """The private key opens neither the user's nor the service's slot."""


class DamagedError(BundleError):
    """The bundle is not what its maker wrote."""


class ManifestError(DamagedError):
    """Not a manifest of a known version, or one that contradicts itself."""


class SignatureError(DamagedError):
    """The manifest is not signed by the certificate that it was checked against."""


class SideFileError(DamagedError):
    """The side file is broken, missing though asked for, or contradicts the bundle."""


class PartDamagedError(DamagedError):
    """A part's size or digest is not the recorded one."""

    def __init__(self, filename: str, reason: str) -> None:
        super().__init__(f"part {filename!r} is damaged: {reason}")


class ContentError(DamagedError):
    """The deciphered stream is no gzip, no tar with one member, or not the image that the manifest describes."""
