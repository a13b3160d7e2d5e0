"""Errors of a bundle, its parts and its keys.

Every error about the input is one of these. Its message says what was found and where, and never contains a key, an
IV or decrypted data. The tree::

    BundleError
    ├── ImageError              the volume cannot be bundled
    ├── ResumeError             an interrupted sealing cannot resume: start again with another key
    ├── UnwritableValueError    a value of a manifest cannot be written without escaping
    ├── NamingError             a prefix or a file name that must not be used
    ├── OutputError             the opened image cannot be written
    │   └── OutputExistsError   a file exists there and may not be replaced
    ├── PartMissingError        a part cannot be read
    ├── WrongKeyError           the private key decrypts neither slot of the manifest
    └── DamagedError            the bundle is not as its maker wrote it
        ├── ManifestError       not a manifest, or one that contradicts itself
        ├── SignatureError      the manifest's signature is wrong
        ├── SideFileError       the side file is damaged, required but missing, or contradicts the bundle
        ├── PartDamagedError    a part differs from the manifest
        └── ContentError        the parts contain no image, or not the one of the manifest
"""

from pathlib import Path


class BundleError(Exception):
    """Base of all errors about a bundle."""


class ImageError(BundleError):
    """The volume is empty, or its extents contradict its size."""


class ResumeError(BundleError):
    """The image or the compression differs from before the interruption."""


class UnwritableValueError(BundleError):
    """A value cannot be written into a manifest that every verifier accepts."""


class NamingError(BundleError):
    """A name that could leave its folder, break the manifest, or not be stored."""


class OutputError(BundleError):
    """The opened image cannot be written to the output path."""


class OutputExistsError(OutputError):
    """A file exists at the output path and may not be replaced."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists; choose another file, or replace it with --force")


class PartMissingError(BundleError):
    """A part does not exist or cannot be read."""

    def __init__(self, filename: str, reason: str) -> None:
        super().__init__(f"part {filename!r} cannot be read: {reason}")


class WrongKeyError(BundleError):
    """The private key decrypts neither the user's nor the service's slot."""


class DamagedError(BundleError):
    """The bundle is not as its maker wrote it."""


class ManifestError(DamagedError):
    """Not a manifest of a known version, or one that contradicts itself."""


class SignatureError(DamagedError):
    """The manifest is not signed with the key of the given certificate."""


class SideFileError(DamagedError):
    """The side file is damaged, required but missing, or contradicts the bundle."""


class PartDamagedError(DamagedError):
    """The size or a digest of a part is wrong."""

    def __init__(self, filename: str, reason: str) -> None:
        super().__init__(f"part {filename!r} is damaged: {reason}")


class ContentError(DamagedError):
    """The decrypted stream is not gzip, not tar with one member, or not the image of the manifest."""
