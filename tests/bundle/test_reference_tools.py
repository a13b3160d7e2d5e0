"""Bundles of Thrave are read by GNU tar, openssl and gunzip, and keep their bytes when REXML writes the manifest."""

import hashlib
import os
import subprocess
from xml.etree import ElementTree as ET

import pytest

from support.bundles.sample_bundles import BUNDLE_KEY, VECTORS, PatternImage, bundle_of, certificate, seal
from thrave.bundle.gzip_stream import inflate
from thrave.bundle.manifest_xml import signed_bytes, verify_signature
from thrave.bundle.opener import decrypt
from thrave.bundle.tar_writer import TarMember, data_extents
from thrave.volumes.formats import open_volume

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
GNU_TAR = ["tar", "-cS", "--owner=root:0", "--group=root:0", "--mode=0644", "--mtime=@0"]

# Name: size and extents of data. Offsets are multiples of 4 KiB, the granularity of holes in Linux file systems.
LAYOUTS = {
    "dense": (3 * MIB, [(0, 3 * MIB)]),
    "dense-odd-size": (100_001, [(0, 100_001)]),
    "a-sector": (512, [(0, 512)]),
    "all-hole": (5 * MIB, []),
    "hole-first": (MIB, [(512 * KIB, 512 * KIB)]),
    "hole-last": (MIB, [(0, 64 * KIB)]),
    "odd-end-after-hole": (MIB + 1000, [(0, 4 * KIB), (MIB, 1000)]),
    "three-extents-fill-the-header": (MIB, [(i * 64 * KIB, 4 * KIB) for i in range(3)]),
    "four-extents-need-a-block": (MIB, [(i * 64 * KIB, 4 * KIB) for i in range(4)]),
    "twenty-four-fill-the-block": (4 * MIB, [(i * 64 * KIB, 4 * KIB) for i in range(24)]),
    "twenty-five-need-another": (4 * MIB, [(i * 64 * KIB, 4 * KIB) for i in range(25)]),
    "hundred": (8 * MIB, [(i * 64 * KIB, 8 * KIB) for i in range(100)]),
    "beyond-8-gib": (20 * GIB, [(0, 4 * KIB), (9 * GIB, 8 * KIB), (19 * GIB, 4 * KIB)]),
}


@pytest.fixture(params=LAYOUTS)
def raw_file(request, tmp_path):
    size, extents = LAYOUTS[request.param]
    path = tmp_path / request.param
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in extents:
            file.seek(offset)
            file.write(hashlib.shake_128(str(offset).encode()).digest(length))
    return path


def run(*command, stdin=None, cwd=None):
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True, cwd=cwd).stdout


def assert_same_files(*paths):
    """Compare size, extents and data of two files. Holes are not read, so files of 20 GiB take no time."""
    contents = []
    for path in paths:
        with open_volume(path, "raw") as volume, path.open("rb") as file:
            extents = volume.extents()
            contents.append((volume.size, extents, [os.pread(file.fileno(), e.length, e.offset) for e in extents]))
    assert contents[0] == contents[1]


def tar_stream(parts):
    return b"".join(inflate(decrypt([bytes(part.data) for part in parts], BUNDLE_KEY)))


def test_tar_stream_equals_gnu_tar(raw_file):
    with open_volume(raw_file, "raw") as volume:
        parts, sealed = seal(volume, raw_file.name)
    expected = run(*GNU_TAR, raw_file.name, cwd=raw_file.parent)
    assert tar_stream(parts) == expected
    assert sealed.digest == hashlib.sha1(expected).hexdigest()


def test_long_member_name_is_written_as_by_gnu_tar(tmp_path):
    for length in (99, 100, 101, 200):
        path = tmp_path / ("n" * length)
        path.write_bytes(b"x" * 512)
        with open_volume(path, "raw") as volume:
            parts, _ = seal(volume, path.name)
        assert tar_stream(parts) == run(*GNU_TAR, path.name, cwd=tmp_path)


def test_header_of_member_above_8_gib_equals_gnu_tar(tmp_path):
    size = 8 * GIB + 4 * KIB
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", size)
    member = TarMember("large", size, data_extents(PatternImage(size, [(0, size)])))
    with subprocess.Popen([*GNU_TAR[:1], "-c", *GNU_TAR[2:], "large"], cwd=tmp_path, stdout=subprocess.PIPE) as tar:
        expected = tar.stdout.read(512)
        tar.kill()
    assert b"".join(member.header()) == expected


@pytest.mark.parametrize("compression", ["fast", "small"])
def test_openssl_gunzip_and_tar_open_bundle(raw_file, compression, tmp_path):
    with open_volume(raw_file, "raw") as volume:
        parts, _ = seal(volume, raw_file.name, compression=compression, part_size=256 * KIB)
    decrypt_command = ["openssl", "enc", "-d", "-aes-128-cbc", "-K", BUNDLE_KEY.key.hex(), "-iv", BUNDLE_KEY.iv.hex()]
    target = tmp_path / "opened"
    target.mkdir()
    compressed = run(*decrypt_command, stdin=b"".join(part.data for part in parts))
    run("tar", "-xS", stdin=run("gunzip", stdin=compressed), cwd=target)
    assert_same_files(raw_file, target / raw_file.name)


def serialize_like_rexml(element):
    """Return an element as REXML writes it.

    ec2-ami-tools 1.5.3 verifies the signature over a manifest in this form.
    """
    attributes = "".join(f" {name}='{value}'" for name, value in element.attrib.items())
    content = (element.text or "") + "".join(serialize_like_rexml(child) + (child.tail or "") for child in element)
    return f"<{element.tag}{attributes}>{content}</{element.tag}>" if content else f"<{element.tag}{attributes}/>"


def test_signature_is_valid_after_rexml_writes_manifest():
    bundle = bundle_of(PatternImage(MIB, [(0, 4 * KIB)]), part_size=64)
    document = ET.fromstring(bundle.manifest)
    rewritten = ("<?xml version='1.0'?>" + serialize_like_rexml(document)).encode()
    assert rewritten == bundle.manifest
    verify_signature(rewritten, bytes.fromhex(document.findtext("signature")), certificate("user"))


def test_openssl_verifies_signature_over_two_elements(tmp_path):
    bundle = bundle_of(PatternImage(MIB, []))
    (tmp_path / "signature").write_bytes(bytes.fromhex(ET.fromstring(bundle.manifest).findtext("signature")))
    start, end = bundle.manifest.index(b"<machine_conf"), bundle.manifest.index(b"<signature>")
    assert signed_bytes(bundle.manifest) == bundle.manifest[start:end]
    (tmp_path / "key.pem").write_bytes(run("openssl", "pkey", "-pubout", "-in", str(VECTORS / "keys" / "user-pk.pem")))
    check = ["openssl", "dgst", "-sha1", "-verify", "key.pem", "-signature", "signature"]
    assert run(*check, stdin=bundle.manifest[start:end], cwd=tmp_path).strip() == b"Verified OK"


def test_manifest_has_element_order_of_ec2_ami_tools():
    image = ET.fromstring(bundle_of(PatternImage(MIB, [])).manifest)
    assert [child.tag for child in image] == ["version", "bundler", "machine_configuration", "image", "signature"]
    assert [child.tag for child in image.find("image")] == [
        "name", "user", "type", "digest", "size", "bundled_size", "ec2_encrypted_key", "user_encrypted_key",
        "ec2_encrypted_iv", "user_encrypted_iv", "parts",
    ]  # fmt: skip
