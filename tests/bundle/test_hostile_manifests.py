"""A manifest is untrusted: it cannot name files outside its folder, exhaust memory, or be read in two ways."""

import html
import os
import re

import pytest

from support.bundles.sample_bundles import VECTORS, MemoryImage, bundle_of, certificate, private_key
from thrave.bundle import manifest_xml
from thrave.bundle.base import DirectoryParts
from thrave.bundle.errors import BundleError, ManifestError, PartMissingError, SignatureError
from thrave.bundle.manifest import read_manifest
from thrave.bundle.opener import open_bundle, verify_bundle


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(MemoryImage(b"data" * 128))


def with_text(bundle, element, text):
    """Return the manifest with another text in the first element with this name."""
    start, end = re.search(rf"<{element}[^>]*>([^<]*)".encode(), bundle.manifest).span(1)
    return bundle.manifest[:start] + text.encode() + bundle.manifest[end:]


REJECTED_NAMES = [
    "../x", "/etc/passwd", "a/b", "..", ".", "", "x" * 256, "ä" * 128, "../../tmp/x", "a/", "/", " .. ",
]  # fmt: skip


@pytest.mark.parametrize("name", REJECTED_NAMES)
@pytest.mark.parametrize("element", ["filename", "image><name"])
def test_name_outside_folder_is_rejected(bundle, element, name):
    with pytest.raises(ManifestError, match="name"):
        read_manifest(with_text(bundle, element, name))


ACCEPTED_NAMES = [
    ".hid",
    "...",
    "a&amp;b",
    "a&lt;b",
    "it's",
    "my image",
    "a\\b",
    "-rf",
    "~",
    "$(x)",
    "%2F",
    "a&#10;b",
    "\x7f",
    "ä" * 127,
]


@pytest.mark.parametrize("name", ACCEPTED_NAMES)
@pytest.mark.parametrize("element", ["filename", "image><name"])
def test_unusual_name_in_folder_is_accepted(bundle, element, name):
    manifest = read_manifest(with_text(bundle, element, name))
    assert html.unescape(name) in (manifest.name, manifest.parts[0].filename)


@pytest.mark.parametrize("encoding", ["A0SCII", "hex", "utf-7", "utf-32", "gbk", "undefined"])
def test_unknown_encoding_is_rejected(bundle, encoding):
    with pytest.raises(ManifestError, match=r"encoding|well-formed"):
        read_manifest(f'<?xml version="1.0" encoding="{encoding}"?>'.encode() + bundle.manifest.partition(b"?>")[2])


def test_control_characters_are_rejected(bundle):
    for character in ("\0", "\1", "&#0;", "&#1;"):
        with pytest.raises(ManifestError):
            read_manifest(with_text(bundle, "filename", f"a{character}b"))


@pytest.mark.parametrize("name", ["; touch x ;", "$(touch x)", "`touch x`", "| touch x", "-rf", "a b'\"c"])
def test_part_name_is_never_executed(bundle, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = name.replace('"', "&quot;")
    with pytest.raises(PartMissingError):
        open_bundle(with_text(bundle, "filename", name), DirectoryParts(tmp_path), private_key("user"), tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


def test_part_that_is_a_fifo_is_rejected_without_blocking(bundle, tmp_path):
    (part,) = bundle.parts
    os.mkfifo(tmp_path / part)
    with pytest.raises(PartMissingError, match="not a regular file"):
        verify_bundle(bundle.manifest, DirectoryParts(tmp_path))


def test_too_large_part_is_rejected_without_reading_all(bundle, tmp_path):
    (part,) = bundle.parts
    (tmp_path / part).touch()
    os.truncate(tmp_path / part, 1 << 40)
    with pytest.raises(BundleError, match="more than"):
        verify_bundle(bundle.manifest, DirectoryParts(tmp_path))


BILLION_LAUGHS = "<!DOCTYPE manifest [<!ENTITY a 'ha'>{}]>".format(
    "".join(f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>" for i in range(20))
)
INVALID_DOCUMENTS = {
    "entity bomb": BILLION_LAUGHS + "<manifest>&u;</manifest>",
    "external entity": "<!DOCTYPE m [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><manifest><version>&x;</version></manifest>",
    "undeclared entity": "<manifest><version>&x;</version></manifest>",
    "external document type": "<!DOCTYPE manifest SYSTEM 'http://127.0.0.1/x.dtd'><manifest/>",
    "deep nesting": "<manifest>" + "<a>" * 100_000,
    "not closed": "<manifest><version>2007-10-10</version>",
    "two roots": "<manifest/><manifest/>",
    "another root": "<html/>",
    "empty": "",
    "not XML": "\x1f\x8b\x08",
    "unknown version": "<manifest><version>2011-06-17</version></manifest>",
    "no image": "<manifest><version>2007-10-10</version></manifest>",
}


@pytest.mark.parametrize("document", INVALID_DOCUMENTS)
def test_read_manifest_rejects_invalid_document(document):
    with pytest.raises(ManifestError):
        read_manifest(INVALID_DOCUMENTS[document].encode())


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*/*.manifest.xml")), ids=lambda path: path.parent.name)
def test_manifest_cut_at_any_byte_is_reported_as_truncated(path):
    xml = path.read_bytes().rstrip()
    for end in range(len(xml)):
        with pytest.raises(ManifestError, match="truncated"):
            read_manifest(xml[:end])


@pytest.mark.parametrize("text", [b"\x1f\x8b\x08", b"PK", b"\xa7" * 5000, b"\0\1\2"])
def test_binary_data_is_not_reported_as_truncated(text):
    with pytest.raises(ManifestError, match=r"not a manifest|NULs"):
        read_manifest(text)


def test_unknown_elements_and_attributes_are_skipped(bundle):
    changed = bundle.manifest.replace(
        b"<bundler>", b"<a b='1'><image><name>../x</name></image><a/></a><bundler c='2'>", 1
    )
    with pytest.raises(ManifestError):  # the first <image> in the text is not the signed one
        read_manifest(changed)
    changed = bundle.manifest.replace(b"</parts>", b"</parts><a b='1'>x<name>y</name><a/></a><a/>", 1)
    assert read_manifest(changed) == read_manifest(bundle.manifest)


def test_too_large_manifest_is_not_parsed(monkeypatch):
    monkeypatch.setattr(manifest_xml, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(ManifestError, match="1001 bytes"):
        read_manifest(b"<" * 1001)


@pytest.mark.parametrize("text", ["-1", "1e9", "0x10", "9" * 19, "1.5", "", "½"])
@pytest.mark.parametrize("element", ["size", "bundled_size"])
def test_invalid_sizes_are_rejected(bundle, element, text):
    with pytest.raises(ManifestError):
        read_manifest(with_text(bundle, element, text))


@pytest.mark.parametrize("count", ["0", "2", "-1", "999999999999", "9" * 40, "x"])
def test_wrong_part_count_is_rejected(bundle, count):
    with pytest.raises(ManifestError):
        read_manifest(bundle.manifest.replace(b"count='1'", f"count='{count}'".encode()))


def test_signature_is_checked_before_signed_content(bundle):
    manifest = with_text(bundle, "filename", "../../etc/passwd")
    with pytest.raises(ManifestError):
        verify_bundle(manifest, bundle)
    with pytest.raises(SignatureError):
        verify_bundle(manifest, bundle, certificate=certificate("user"))


def part(index, filename="p", digest="0" * 40):
    return f"<part index='{index}'><filename>{filename}</filename><digest algorithm='SHA1'>{digest}</digest></part>"


@pytest.mark.parametrize(
    "parts",
    [
        "",
        part(1),
        part(0) + part(2, "q"),
        part(0) + part(0, "q"),
        part(0) + part(1),
        part(-1),
        part(0, digest="0" * 39),
        part(0, digest="z" * 40),
        part(0).replace("SHA1", "MD5"),
        "<part index='0'><filename>p</filename></part>",
        "<part><filename>p</filename></part>",
        part(0).replace("</part>", "<filename>q</filename></part>"),
    ],
)
def test_invalid_part_list_is_rejected(bundle, parts):
    listed = re.sub(b"<part .*</part>", parts.encode(), bundle.manifest)
    with pytest.raises(ManifestError):
        read_manifest(listed.replace(b"count='1'", f"count='{parts.count('<part')}'".encode()))


IMAGE_ELEMENT = re.compile(rb"<image>.*</image>")


def ambiguous_manifests(manifest):
    """Return manifests in which a text search and an XML parser find different <image> elements, one of them signed."""
    signed = IMAGE_ELEMENT.search(manifest)[0]
    evil = signed.replace(b"<image><name>disk</name>", b"<image><name>evil</name>")
    evil_tag = evil.replace(b"<image>", b"<image a='1'>")
    return {
        "comment": manifest.replace(signed, evil).replace(b"<version>", b"<!--" + signed + b"--><version>", 1),
        "CDATA": manifest.replace(signed, evil).replace(b"thrave<", b"<![CDATA[" + signed + b"]]><"),
        "instruction": manifest.replace(signed, evil).replace(b"<version>", b"<?x " + signed + b"?><version>", 1),
        "inside another element": manifest.replace(signed, evil_tag).replace(b"thrave<", signed + b"<"),
        "twice": manifest.replace(signed, signed + evil),
        "before": manifest.replace(signed, evil + signed),
        "attribute": manifest.replace(signed, evil_tag),
        "only a comment": manifest.replace(signed, b"<!--" + signed + b"-->"),
        "wrapped": manifest.replace(signed, b"<image a='1'>" + signed + evil[len(b"<image>") :]),
    }


@pytest.mark.parametrize(
    "variant",
    [
        "comment",
        "CDATA",
        "instruction",
        "inside another element",
        "twice",
        "before",
        "attribute",
        "wrapped",
        "only a comment",
    ],
)
def test_ambiguous_signed_element_is_rejected(bundle, variant):
    verify_bundle(bundle.manifest, bundle, certificate=certificate("user"))
    with pytest.raises((ManifestError, SignatureError)):
        verify_bundle(ambiguous_manifests(bundle.manifest)[variant], bundle, certificate=certificate("user"))


def test_harmless_comment_is_accepted(bundle):
    manifest = bundle.manifest.replace(b"<version>", b"<!-- made by hand -->\n <version>", 1)
    verify_bundle(manifest, bundle, certificate=certificate("user"))


OLD_MANIFEST = """<manifest><version>{version}</version>
  <image><name>old</name><user>495219933132</user>
    <digest algorithm="SHA1">{zeros}</digest><size>1</size><bundled_size>1</bundled_size>
    <ec2_encrypted_key algorithm="AES-128-CBC">00</ec2_encrypted_key><ec2_encrypted_iv>00</ec2_encrypted_iv>
    <parts count="1"><part index="0"><filename>old.part.0</filename><digest>{zeros}</digest></part></parts>
  </image></manifest>"""


@pytest.mark.parametrize("version", ["3", "20070829", "2007-08-29", "2007-10-10"])
def test_old_versions_and_white_space_are_accepted(version):
    manifest = read_manifest(OLD_MANIFEST.format(version=version, zeros="0" * 40).encode())
    assert (manifest.architecture, manifest.type, manifest.is_signed) == ("i386", "machine", False)
    assert manifest.parts[0].filename == "old.part.0"


def test_all_elements_of_ec2_ami_tools_are_read(bundle):
    machine = (
        b"<machine_configuration><architecture>i386</architecture><block_device_mapping>"
        b"<mapping><virtual>ami</virtual><device>sda1</device></mapping>"
        b"<mapping><virtual>swap</virtual><device>sda3</device></mapping></block_device_mapping>"
        b"<kernel_id>aki-1</kernel_id><ramdisk_id>ari-1</ramdisk_id>"
        b"<product_codes><product_code>A,B</product_code><product_code>C</product_code></product_codes>"
        b"</machine_configuration>"
    )
    ancestry = b"<ancestry><ancestor_ami_id>ami-1</ancestor_ami_id><ancestor_ami_id>ami-2</ancestor_ami_id></ancestry>"
    xml = re.sub(b"<machine_conf.*tion>", machine, bundle.manifest).replace(b"</type>", b"</type>" + ancestry)
    manifest = read_manifest(xml)
    assert manifest.block_devices == (("ami", "sda1"), ("swap", "sda3"))
    assert (manifest.kernel_id, manifest.ramdisk_id) == ("aki-1", "ari-1")
    assert manifest.product_codes == ("A,B", "C")
    assert manifest.ancestry == ("ami-1", "ami-2")
