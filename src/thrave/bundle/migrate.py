"""Makes a bundle out to another service: new slots, a new signature, and not one part touched.

The parts stay under the key that they were enciphered with, so whoever could open the bundle before still can, if they
kept the old manifest. What ec2-migrate-manifest of ec2-ami-tools 1.5.3 does is kept: nothing is signed again whose
signature did not hold, and the manifest is written anew as version 2007-10-10. That one leaves the slots alone, which
served EC2's regions, as they shared a key; two services do not.
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
    """Who a bundle is made out to, and what is called otherwise there; None leaves it as it is.

    Attributes:
        service: certificate of the service that the image will be registered with.
        user: of the account.
        account_id: whose bundle it is then, 12 digits.
        kernel_id: the new service's ``aki-…`` in place of the old one's; empty takes it out.
        ramdisk_id: likewise ``ari-…``.
    """

    service: Certificate
    user: Certificate | None = None
    account_id: str | None = None
    kernel_id: str | None = None
    ramdisk_id: str | None = None


@dataclass(frozen=True)
class Signers:
    """Who vouches for it: the manifest's key, which also vouches for the side file's."""

    manifest: RSAPrivateKey
    side_file: Ed25519PrivateKey


@dataclass(frozen=True)
class MigratedBundle:
    """A bundle's new documents.

    Attributes:
        manifest: its XML.
        side_file: None where there was none: the parts would have to be read for it.
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
    """Return the documents that make a bundle out to other readers.

    Args:
        manifest: its XML.
        side_file: the side file where there is one; it is insisted on.
        private_key: opens the bundle now, the user's or the old service's.
        certificate: of who signed it; without that signature nobody may be led to trust the new one.
        readers: who can open it afterwards.
        signers: who signs it now.

    Raises:
        DamagedError: a signature does not hold.
        UnwritableValueError: the manifest says something that cannot be written anew, an unusual name for instance.
        WrongKeyError: the key opens neither slot.
        NamingError: the account id is none.
    """
    verified = verify_manifest(manifest, side_file, Trust(certificate))
    xml = signed_manifest(_made_out(verified.manifest, private_key, readers), signers.manifest)
    if verified.side is None:
        return MigratedBundle(xml, None)
    side = sign_digests(verified.side.parts, xml, side_key=signers.side_file, signing_key=signers.manifest)
    return MigratedBundle(xml, side)


def _made_out(manifest: Manifest, private_key: RSAPrivateKey, readers: NewReaders) -> Manifest:
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
