"""A bundle's manifest as data, of any of its three versions.

Nothing is read, written, trusted or verified here: ``reading.py`` makes manifests of XML, ``writing.py`` XML of what
was sealed, ``signatures.py`` says whether to believe one.
"""

from dataclasses import dataclass, field

from thrave.bundle.secrets import KeySlot

VERSION = "2007-10-10"
"""The version that is written; never superseded."""

READABLE_VERSIONS = ("3", "20070829", "2007-08-29", VERSION)
"""The versions that ec2-ami-tools 1.2 to 1.5.3 wrote or accepted."""

UNSIGNED = "UNSIGNED"
"""Stands in place of a signature where euca2ools made a bundle without the user's key."""


@dataclass(frozen=True)
class Bundler:
    """The program that made a bundle, as far as it says; any word may be empty. Not signed."""

    name: str = ""
    version: str = ""
    release: str = ""

    def __str__(self) -> str:
        return " ".join(word for word in (self.name, self.version, self.release) if word)


@dataclass(frozen=True, slots=True)  # there may be 200,000
class ManifestPart:
    """One line of the list of parts.

    Attributes:
        index: from 0, the order of the parts.
        filename: bare name, beside the manifest.
        sha1: lower-case hex SHA-1 of the ciphertext.
    """

    index: int
    filename: str
    sha1: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says; whether it is true is another question.

    Attributes:
        version: one of ``READABLE_VERSIONS``.
        bundler: the program that made it.
        architecture: ``x86_64``, ``i386``, …; ``i386`` in version 3, which does not say.
        block_devices: (virtual, device) as the guest knew them.
        kernel_id: ``aki-…`` where given.
        ramdisk_id: ``ari-…`` where given.
        product_codes: as given.
        name: the image's name, which is the prefix without its folder.
        user: account id of whoever made it.
        type: ``machine``, ``kernel`` or ``ramdisk``.
        kernel_name: of a kernel, where given.
        ancestry: ``ami-…`` of the images that it descends from, oldest first.
        digest: lower-case hex SHA-1 of the tar stream.
        size: bytes of the image.
        bundled_size: bytes of all parts.
        user_slot: key and IV for the user's private key.
        ec2_slot: the same for the service's.
        parts: in the order of their indexes.
        signature: the bytes, empty where there are none.
    """

    version: str
    bundler: Bundler
    architecture: str
    block_devices: tuple[tuple[str, str], ...] = ()
    kernel_id: str | None = None
    ramdisk_id: str | None = None
    product_codes: tuple[str, ...] = ()
    name: str
    user: str
    type: str = "machine"
    kernel_name: str | None = None
    ancestry: tuple[str, ...] = ()
    digest: str
    size: int
    bundled_size: int
    user_slot: KeySlot = field(repr=False)
    ec2_slot: KeySlot = field(repr=False)
    parts: tuple[ManifestPart, ...] = field(repr=False)
    signature: bytes = field(default=b"", repr=False)

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature at all; it may still be false."""
        return bool(self.signature)
