"""Encrypts the key of a bundle for another service: new slots and a new signature; the parts stay unchanged.

The parts remain encrypted with the same key, so earlier readers who kept the old manifest can still open the bundle.
As ec2-migrate-manifest of ec2-ami-tools 1.5.3 does, this signs nothing whose old signature was wrong, and writes
version 2007-10-10. That program keeps the slots, since the regions of EC2 shared a key; two services do not.
"""

from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate

from thrave.bundle.manifest import Manifest, signed_manifest
from thrave.bundle.manifest_xml import rsa_key
from thrave.bundle.model import KeySlot, decrypt_key, encrypt_key, validate_account_id
from thrave.bundle.side_file import sign_digests
from thrave.bundle.verifier import Trust, verify_manifest


@dataclass(frozen=True)
class NewReaders:
    """Who can open a bundle after the migration, and ids that change. None keeps a value.

    Attributes:
        service: Certificate of the service where the image will be registered.
        user: Certificate of the account.
        account_id: New owner, 12 digits.
        kernel_id: ``aki-…`` of the new service; empty removes the id.
        ramdisk_id: ``ari-…`` of the new service; empty removes the id.
    """

    service: Certificate
    user: Certificate | None = None
    account_id: str | None = None
    kernel_id: str | None = None
    ramdisk_id: str | None = None


@dataclass(frozen=True)
class Signers:
    """The keys that sign: the manifest's key also certifies the side file's."""

    manifest: RSAPrivateKey
    side_file: Ed25519PrivateKey


@dataclass(frozen=True)
class MigratedBundle:
    """The new documents of a bundle.

    Attributes:
        manifest: Its XML.
        side_file: None if the bundle had none, since a new one would require reading the parts.
    """

    manifest: bytes
    side_file: bytes | None


def migrate(
    manifest: bytes,
    side_file: bytes | None,
    private_key: RSAPrivateKey,
    *,
    certificate: Certificate,
    readers: NewReaders,
    signers: Signers,
) -> MigratedBundle:
    """Return a manifest and side file with which other readers can open a bundle.

    Args:
        manifest: Its XML.
        side_file: The side file, if the bundle has one. It must then be correct.
        private_key: Of the user or the old service; decrypts the present slots.
        certificate: Of the signer. The old signature must be correct: the new one would hide a forged manifest.
        readers: Who can open the bundle afterwards.
        signers: Keys for the new signatures.

    Raises:
        DamagedError: A signature is wrong.
        UnwritableValueError: The manifest has a value that cannot be written, an unusual name for instance.
        WrongKeyError: The key decrypts neither slot.
        NamingError: The account id is not valid.
    """
    verified = verify_manifest(manifest, side_file, Trust(certificate))
    xml = signed_manifest(_with_new_readers(verified.manifest, private_key, readers), signers.manifest)
    if verified.side is None:
        return MigratedBundle(xml, None)
    side = sign_digests(verified.side.parts, xml, side_key=signers.side_file, signing_key=signers.manifest)
    return MigratedBundle(xml, side)


def _with_new_readers(manifest: Manifest, private_key: RSAPrivateKey, readers: NewReaders) -> Manifest:
    bundle_key = decrypt_key((manifest.user_slot, manifest.ec2_slot), private_key)
    ec2_slot = encrypt_key(bundle_key, rsa_key(readers.service))
    user_slot = manifest.user_slot if readers.user is None else encrypt_key(bundle_key, rsa_key(readers.user))
    return replace(
        manifest,
        user=manifest.user if readers.account_id is None else validate_account_id(readers.account_id),
        kernel_id=manifest.kernel_id if readers.kernel_id is None else readers.kernel_id,
        ramdisk_id=manifest.ramdisk_id if readers.ramdisk_id is None else readers.ramdisk_id,
        ec2_slot=ec2_slot,
        user_slot=ec2_slot if user_slot == KeySlot(b"", b"") else user_slot,
    )
