"""Migrating a bundle to another service: which keys open it, and whether other programs accept its manifest."""

import hashlib
import re
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from support.bundles.sample_bundles import SIDE_KEY, VECTORS, MemoryImage, bundle_of, certificate, private_key
from support.required_programs import require
from thrave.bundle.base import DirectoryParts
from thrave.bundle.errors import NamingError, SideFileError, SignatureError, UnwritableValueError, WrongKeyError
from thrave.bundle.manifest import read_manifest
from thrave.bundle.manifest_xml import sign, verify_signature
from thrave.bundle.migrate import NewReaders, Signers, migrate
from thrave.bundle.opener import open_bundle
from thrave.identity.certificates import self_signed

SIGNERS = Signers(private_key("user"), SIDE_KEY)
OTHER_SERVICE = self_signed("another service", private_key("wrong"))
FOR_CLOUD = NewReaders(certificate("cloud"))
IMAGE = bytes(range(256)) * 100
KEYS_AND_SIGNATURE = re.compile(rb"(<(?:ec2|user)_encrypted_(?:key|iv)[^>]*>|<signature>)[0-9a-f]+")
REXML_PROGRAM = "require 'rexml/document'; print REXML::Document.new($stdin.read).to_s"
SIGNED_VECTORS = {
    "ec2-ami-tools-1.5.3-dense-2-parts": "0fc3b64b0304d6e6da8ed6d9b445371c34570f51",
    "ec2-ami-tools-1.5.3-sparse": "c9a6ef082b2daa44ba5aac84f19197a6f07870de",
    "euca2ools-3.4.1": "58bf0107d43bc5b1cc409c14598d4200527d674a",
    "go_ami_tools": "58bf0107d43bc5b1cc409c14598d4200527d674a",
}


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(MemoryImage(IMAGE), part_size=256)


def unsigned(bundle) -> bytes:
    """Return the manifest of a bundle up to its image, without the signature."""
    return bundle.manifest[: bundle.manifest.index(b"<signature>")]


def vector_manifest(name):
    (manifest,) = (VECTORS / name).glob("*.manifest.xml")
    return manifest.read_bytes()


def migrate_with_test_keys(xml, side_file=None, key="user", signer="user", readers=FOR_CLOUD, signers=SIGNERS):
    return migrate(
        xml, side_file, private_key(key), certificate=certificate(signer), readers=readers, signers=signers
    )  # fmt: skip


def test_migrated_bundle_opens_for_user_and_new_service_only(bundle, tmp_path):
    """The bundle was encrypted for "user" and "cloud". Migrated, it is encrypted for "user" and "wrong"."""
    migrated = migrate_with_test_keys(bundle.manifest, bundle.side_file, key="cloud", readers=NewReaders(OTHER_SERVICE))
    trust = {"certificate": certificate("user"), "side_file": migrated.side_file}
    for reader in ("user", "wrong"):
        opened = open_bundle(migrated.manifest, bundle, private_key(reader), tmp_path / reader, **trust)
        assert opened.output.read_bytes() == IMAGE
        assert all(check.checked for check in opened.checks)
    with pytest.raises(WrongKeyError):
        open_bundle(migrated.manifest, bundle, private_key("cloud"), tmp_path / "cloud", **trust)


@pytest.mark.parametrize("name", SIGNED_VECTORS)
def test_migrated_bundle_of_other_program_opens_with_new_key(name, tmp_path):
    migrated = migrate_with_test_keys(vector_manifest(name), readers=NewReaders(OTHER_SERVICE))
    parts = DirectoryParts(VECTORS / name)
    opened = open_bundle(
        migrated.manifest, parts, private_key("wrong"), tmp_path / "image", certificate=certificate("user")
    )
    assert hashlib.sha1(opened.output.read_bytes()).hexdigest() == SIGNED_VECTORS[name]
    assert migrated.side_file is None


@pytest.mark.parametrize("name", [name for name in SIGNED_VECTORS if name.startswith("ec2")])
def test_migrate_changes_only_keys_and_signature_of_ec2_ami_tools_manifest(name):
    before = vector_manifest(name)
    after = migrate_with_test_keys(before).manifest
    assert KEYS_AND_SIGNATURE.sub(rb"\1", after) == KEYS_AND_SIGNATURE.sub(rb"\1", before)


FULL = """<manifest><version>2007-10-10</version><bundler><name>b</name><version>1</version></bundler>
<machine_configuration><architecture>i386</architecture><block_device_mapping>
<mapping><virtual>ami</virtual><device>sda1</device></mapping>
<mapping><virtual>ephemeral0</virtual><device>sdb</device></mapping></block_device_mapping>
<kernel_id>aki-1</kernel_id><ramdisk_id>ari-1</ramdisk_id><product_codes><product_code>A</product_code>
<product_code>B</product_code></product_codes></machine_configuration>"""


def test_migrate_keeps_all_other_elements(bundle):
    image = unsigned(bundle)[bundle.manifest.index(b"<image>") :].decode()
    extra = "<type>kernel</type><kernel_name>vmlinuz</kernel_name><ancestry><ancestor_ami_id>ami-1</ancestor_ami_id>"
    xml = (FULL + image.replace("<type>machine</type>", f"{extra}</ancestry>")).encode()
    xml = signed(xml)
    before, after = read_manifest(xml), read_manifest(migrate_with_test_keys(xml).manifest)
    changed = {name for name in vars(before) if vars(before)[name] != vars(after)[name]}
    assert changed == {"ec2_slot", "signature"}


def signed(xml: bytes) -> bytes:
    """Return the manifest with the user's signature; `xml` ends after the image."""
    return xml + f"<signature>{sign(xml, private_key('user')).hex()}</signature></manifest>".encode()


@pytest.mark.parametrize(("new_kernel_id", "kernel"), [(None, "aki-1"), ("eki-2", "eki-2"), ("", None)])
def test_migrate_replaces_or_removes_kernel_id(bundle, new_kernel_id, kernel):
    image = unsigned(bundle)[bundle.manifest.index(b"<image>") :].decode()
    readers = NewReaders(certificate("cloud"), kernel_id=new_kernel_id)
    manifest = read_manifest(migrate_with_test_keys(signed((FULL + image).encode()), readers=readers).manifest)
    assert (manifest.kernel_id, manifest.ramdisk_id) == (kernel, "ari-1")


def test_migrate_upgrades_manifest_version(bundle):
    image = unsigned(bundle)[bundle.manifest.index(b"<image>") :]
    xml = b"<manifest><version>3</version>" + image.replace(b"<type>machine</type>", b"")
    xml = signed(xml)
    manifest = read_manifest(migrate_with_test_keys(xml).manifest)
    assert (manifest.version, manifest.architecture, manifest.type) == ("2007-10-10", "i386", "machine")


def test_rexml_writes_same_bytes_as_migrate(bundle):
    """ec2-ami-tools verifies the signature over the manifest as REXML writes it, not over the original bytes."""
    ruby = require("ruby", package="ruby")
    manifest = migrate_with_test_keys(vector_manifest("euca2ools-3.4.1")).manifest
    rewritten = subprocess.run([ruby, "-e", REXML_PROGRAM], input=manifest, capture_output=True, check=True).stdout
    assert rewritten == manifest


def test_openssl_decrypts_same_key_from_migrated_manifest(bundle, tmp_path):
    openssl = require("openssl", package="openssl")
    manifest = read_manifest(migrate_with_test_keys(bundle.manifest).manifest)

    def decrypt(encrypted: bytes, key: str) -> bytes:
        command = [openssl, "pkeyutl", "-decrypt", "-inkey", str(VECTORS / "keys" / f"{key}-pk.pem")]
        return subprocess.run(command, input=encrypted, capture_output=True, check=True).stdout

    for attribute in ("key", "iv"):
        new = decrypt(getattr(manifest.ec2_slot, attribute), "cloud")
        assert new == decrypt(getattr(manifest.user_slot, attribute), "user")


def test_migrate_can_change_account_and_user_certificate(bundle, tmp_path):
    readers = NewReaders(certificate("cloud"), OTHER_SERVICE, "999999999999")
    signers = Signers(private_key("wrong"), Ed25519PrivateKey.generate())
    migrated = migrate_with_test_keys(bundle.manifest, bundle.side_file, readers=readers, signers=signers)
    assert read_manifest(migrated.manifest).user == "999999999999"
    trust = {"certificate": OTHER_SERVICE, "side_file": migrated.side_file}
    open_bundle(migrated.manifest, bundle, private_key("wrong"), tmp_path / "new", **trust)
    with pytest.raises(WrongKeyError):
        open_bundle(migrated.manifest, bundle, private_key("user"), tmp_path / "old", **trust)


def test_migrate_fills_empty_user_slot(bundle):
    emptied = re.sub(rb"(<user_encrypted_(key|iv)[^>]*>)[0-9a-f]+", rb"\1", unsigned(bundle))
    manifest = read_manifest(migrate_with_test_keys(signed(emptied), key="cloud").manifest)
    assert manifest.user_slot == manifest.ec2_slot


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (WrongKeyError, {"key": "wrong"}),
        (SignatureError, {"signer": "cloud"}),
        (NamingError, {"readers": NewReaders(certificate("cloud"), account_id="12-34")}),
        (SideFileError, {"side_file": b"{}"}),
    ],
)
def test_migrate_rejects_invalid_key_signer_account_or_side_file(bundle, error, arguments):
    with pytest.raises(error):
        migrate_with_test_keys(bundle.manifest, **arguments)


def test_migrate_rejects_unsigned_bundle():
    with pytest.raises(SignatureError, match="not signed"):
        migrate_with_test_keys(vector_manifest("euca2ools-3.4.1-unsigned"), key="cloud")


@pytest.mark.parametrize("text", ["a&amp;b", "it&apos;s", "a&#10;b"])
def test_migrate_rejects_ambiguous_xml(bundle, text):
    changed = unsigned(bundle).replace(b"<architecture>x86_64", b"<architecture>" + text.encode())
    with pytest.raises(UnwritableValueError, match="every verifier"):
        migrate_with_test_keys(signed(changed))


def test_migrated_manifest_has_valid_signature(bundle):
    manifest = migrate_with_test_keys(bundle.manifest).manifest
    verify_signature(manifest, read_manifest(manifest).signature, certificate("user"))
