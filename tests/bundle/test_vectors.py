"""Bundles made by other programs, byte for byte, open to their original images."""

import hashlib

import pytest
from cryptography import x509

from support.bundles.sample_bundles import VECTORS, certificate, private_key
from thrave.bundle.base import DirectoryParts
from thrave.bundle.errors import DamagedError, SignatureError, WrongKeyError
from thrave.bundle.manifest import read_manifest
from thrave.bundle.manifest_xml import verify_signature
from thrave.bundle.opener import open_bundle, verify_bundle
from thrave.bundle.verifier import CheckSubject

SMALL_IMAGE = ("58bf0107d43bc5b1cc409c14598d4200527d674a", 4194304)
BUNDLES = {
    "ec2-ami-tools-1.5.3-dense-2-parts": ("0fc3b64b0304d6e6da8ed6d9b445371c34570f51", 25165824),
    "ec2-ami-tools-1.5.3-sparse": ("c9a6ef082b2daa44ba5aac84f19197a6f07870de", 67108864),
    "ec2-ami-tools-1.5.3-all-hole": ("57b587e1bf2d09335bdac6db18902d43dfe76449", 33554432),
    "euca2ools-3.4.1": SMALL_IMAGE,
    "euca2ools-3.4.1-empty-last-part": SMALL_IMAGE,
    "euca2ools-3.4.1-unsigned": SMALL_IMAGE,
    "go_ami_tools": SMALL_IMAGE,
}
ONE_READER = {"euca2ools-3.4.1-unsigned": "cloud", "go_ami_tools": "user"}
UNSIGNED = "euca2ools-3.4.1-unsigned"
READERS = [(name, reader) for name in BUNDLES for reader in ("user", "cloud") if ONE_READER.get(name, reader) == reader]
WRONG_READERS = [(name, "wrong") for name in BUNDLES]
WRONG_READERS += [(UNSIGNED, "user"), ("go_ami_tools", "cloud")]


def read_vector(name):
    (manifest,) = (VECTORS / name).glob("*.manifest.xml")
    return manifest.read_bytes(), DirectoryParts(VECTORS / name)


@pytest.mark.parametrize(("name", "reader"), READERS)
def test_vector_opens_to_its_image_for_each_reader(name, reader, tmp_path):
    manifest, parts = read_vector(name)
    opened = open_bundle(manifest, parts, private_key(reader), tmp_path / "image")
    image = opened.output.read_bytes()
    assert (hashlib.sha1(image).hexdigest(), len(image)) == BUNDLES[name]


@pytest.mark.parametrize(("name", "reader"), WRONG_READERS)
def test_vector_rejects_key_of_other_reader(name, reader, tmp_path):
    manifest, parts = read_vector(name)
    with pytest.raises(WrongKeyError):
        open_bundle(manifest, parts, private_key(reader), tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(BUNDLES.keys() - {UNSIGNED}))
def test_vector_signature_verifies_with_its_signer_only(name):
    manifest, _ = read_vector(name)
    verify_signature(manifest, read_manifest(manifest).signature, certificate("user"))
    with pytest.raises(SignatureError):
        verify_signature(manifest, read_manifest(manifest).signature, certificate("cloud"))


def test_unsigned_vector_verifies_only_without_certificate():
    manifest, parts = read_vector(UNSIGNED)
    verified = verify_bundle(manifest, parts)
    assert [check.detail for check in verified.checks if check.subject is CheckSubject.SIGNATURE] == [
        "the bundle is not signed"
    ]
    with pytest.raises(SignatureError, match="not signed"):
        verify_bundle(manifest, parts, certificate=certificate("user"))


def test_vector_holes_are_restored(tmp_path):
    manifest, parts = read_vector("ec2-ami-tools-1.5.3-sparse")
    opened = open_bundle(manifest, parts, private_key("user"), tmp_path / "image")
    assert opened.output.stat().st_blocks * 512 < 2 * 1024 * 1024


class TestBundleOf2009:
    """A bundle made by ec2-ami-tools 1.3-26357 in 2009. Its part 0 is lost, and no key that opens it is known."""

    folder = VECTORS / "ec2-ami-tools-1.3-26357-real-2009"

    def certificate(self):
        return x509.load_pem_x509_certificate((self.folder / "user-cert.pem").read_bytes())

    def test_signature_and_digest_of_last_part_are_correct(self):
        manifest = (self.folder / "test-file.manifest.xml").read_bytes()
        verify_signature(manifest, read_manifest(manifest).signature, self.certificate())
        part = read_manifest(manifest).parts[1]
        assert hashlib.sha1((self.folder / part.filename).read_bytes()).hexdigest() == part.sha1

    def test_signature_of_reformatted_manifest_fails(self):
        manifest = (self.folder / "reformatted-signature-must-fail.xml").read_bytes()
        with pytest.raises(DamagedError):
            verify_bundle(manifest, DirectoryParts(self.folder), certificate=self.certificate())
