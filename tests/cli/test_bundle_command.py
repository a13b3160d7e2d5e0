"""`thrave bundle`, and `open`, `verify` and `show` of its bundles."""

import os
import re
import signal
import subprocess
import sys
from random import Random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from support.bundles.sample_bundles import VECTORS
from support.disks.qemu_images import converted, encrypted, qemu_img, write_passphrase, written_to
from support.eventually import eventually

FAILED, USAGE, NOT_FOUND, REFUSED, DAMAGED, WRONG_KEY, INTERRUPTED = 1, 2, 3, 4, 10, 11, 130
KEYS = VECTORS / "keys"
MIB = 1024 * 1024


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.write(b"boot" * 1024)
        file.seek(5 * MIB)
        file.write(b"data" * 4096)
    return path


def sealing(image, folder, *more, prefix="winami"):
    return (
        "bundle", image, "--prefix", prefix, "--to", folder, "--account", "123456789012",
        "--user-certificate", KEYS / "user-cert.pem", "--service-certificate", KEYS / "cloud-cert.pem",
        "--signing-key", KEYS / "user-pk.pem", *more,
    )  # fmt: skip


@pytest.fixture
def bundle(thrave_json, image, tmp_path):
    """Seals a bundle into `tmp_path / "bundles"`; returns the JSON document."""
    return thrave_json(*sealing(image, tmp_path / "bundles"))


def checks(document):
    return {check["subject"]: check["checked"] for check in document["checks"]}


def test_open_with_either_key_returns_same_image(thrave_json, bundle, image, tmp_path):
    for owner in ("user", "cloud"):
        opened = thrave_json("open", bundle["manifest"], "--key", KEYS / f"{owner}-pk.pem", "-o", tmp_path / owner)
        assert opened["image"] == str(tmp_path / owner)
        assert (tmp_path / owner).read_bytes() == image.read_bytes()
        assert (tmp_path / owner).stat().st_blocks < 8 * MIB / 512


def test_bundle_prints_written_files(bundle, tmp_path):
    assert bundle["manifest"] == str(tmp_path / "bundles" / "winami.manifest.xml")
    assert bundle["sideFile"] == str(tmp_path / "bundles" / "winami.manifest.json")
    names = {"winami.manifest.xml", "winami.manifest.json", *(part["filename"] for part in bundle["parts"])}
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == names
    assert (bundle["prefix"], bundle["size"]) == ("winami", 8 * MIB)
    assert bundle["bundledSize"] == sum(part["size"] for part in bundle["parts"])


def test_bundle_accepts_qcow2_and_small_compression(thrave_json, image, tmp_path):
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, tmp_path / "disk.qcow2"], check=True)
    options = ("--format", "qcow2", "--compression", "small", "--architecture", "i386")
    made = thrave_json(*sealing(tmp_path / "disk.qcow2", tmp_path / "b", *options))
    thrave_json("open", made["manifest"], "--key", KEYS / "user-pk.pem", "-o", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert thrave_json("show", made["manifest"])["architecture"] == "i386"


def test_bundle_reads_encrypted_image_with_passphrase(thrave, thrave_json, image, tmp_path):
    secret_file = write_passphrase(image)
    disk = encrypted(image, "qcow2", secret_file)
    status, _, stderr = thrave(*sealing(disk, tmp_path / "b", "--format", "qcow2"))
    assert (status, "the file that holds its passphrase must be given" in stderr) == (FAILED, True)
    made = thrave_json(*sealing(disk, tmp_path / "b", "--format", "qcow2", "--secret-file", secret_file))
    thrave_json("open", made["manifest"], "--key", KEYS / "user-pk.pem", "-o", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_bundle_refuses_image_of_running_guest(thrave, image, tmp_path):
    with written_to(image, "raw"):
        status, _, stderr = thrave(*sealing(image, tmp_path / "b"))
    assert (status, "is in use by another program" in stderr) == (FAILED, True)


def test_verify_reports_checked_and_unchecked_subjects(thrave, thrave_json, bundle):
    manifest = bundle["manifest"]
    without = checks(thrave_json("verify", manifest))
    assert {subject for subject, checked in without.items() if not checked} == {
        "signature", "sideKey", "imageDigest", "imageSize",
    }  # fmt: skip
    everything = ("verify", manifest, "--certificate", KEYS / "user-cert.pem", "--key", KEYS / "user-pk.pem")
    assert all(checks(thrave_json(*everything)).values())
    _, stdout, _ = thrave("verify", manifest)
    assert "NOT CHECKED  no signer's certificate was given" in stdout


def test_verify_requires_valid_side_file_and_reports_missing_one(thrave, thrave_json, bundle, tmp_path):
    side_file = tmp_path / "bundles" / "winami.manifest.json"
    side_file.rename(tmp_path / "aside")
    assert checks(thrave_json("verify", bundle["manifest"]))["sideFile"] is False
    side_file.write_text("{}")
    status, stdout, stderr = thrave("verify", bundle["manifest"])
    assert (status, stdout) == (DAMAGED, "")
    assert "side file" in stderr


def test_given_side_key_signs_and_is_verified(thrave, thrave_json, image, tmp_path):
    key = Ed25519PrivateKey.generate()
    (tmp_path / "side.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "side.pub").write_bytes(public)
    mine = thrave_json(*sealing(image, tmp_path / "mine", "--side-key", tmp_path / "side.pem"))
    assert checks(thrave_json("verify", mine["manifest"], "--side-key", tmp_path / "side.pub"))["sideKey"]
    other = thrave_json(*sealing(image, tmp_path / "other"))
    status, _, stderr = thrave("verify", other["manifest"], "--side-key", tmp_path / "side.pub")
    assert (status, "another key" in stderr) == (DAMAGED, True)


def test_show_prints_manifest(thrave, thrave_json, bundle):
    shown = thrave_json("show", bundle["manifest"])
    assert (shown["name"], shown["accountId"], shown["size"]) == ("winami", "123456789012", 8 * MIB)
    assert [part["sha1"] for part in shown["parts"]] == [part["sha1"] for part in bundle["parts"]]
    _, stdout, _ = thrave("show", bundle["manifest"])
    assert "winami.part.0" in stdout


def test_show_escapes_control_characters_of_manifest(thrave, bundle, tmp_path):
    manifest = tmp_path / "bundles" / "winami.manifest.xml"
    manifest.write_bytes(manifest.read_bytes().replace(b"<type>machine", "<type>\x9b31m&#10;machine".encode()))
    _, stdout, _ = thrave("show", manifest)
    assert r"\u009b31m\u000amachine" in stdout


def test_show_counts_parts_that_are_not_listed(thrave, bundle, tmp_path):
    manifest = tmp_path / "bundles" / "winami.manifest.xml"
    part = "<part index='{0}'><filename>p{0}</filename><digest algorithm='SHA1'>" + "0" * 40 + "</digest></part>"
    parts = f"<parts count='23'>{''.join(part.format(i) for i in range(23))}</parts>"
    manifest.write_text(re.sub("<parts.*</parts>", parts, manifest.read_text()))
    _, stdout, _ = thrave("show", manifest)
    assert "and 3 more parts" in stdout


def test_verify_does_not_wait_for_side_file_that_is_a_pipe(thrave, bundle, tmp_path):
    side_file = tmp_path / "bundles" / "winami.manifest.json"
    side_file.unlink()
    os.mkfifo(side_file)
    status, _, stderr = thrave("verify", bundle["manifest"])
    assert (status, "not a regular file" in stderr) == (FAILED, True)


def damage_part(folder):
    part = folder / "winami.part.0"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def remove_part(folder):
    (folder / "winami.part.0").unlink()


def forge_manifest(folder):
    manifest = folder / "winami.manifest.xml"
    manifest.write_bytes(manifest.read_bytes().replace(b"123456789012", b"999999999999"))
    (folder / "winami.manifest.json").unlink()


def declare_entities(folder):
    (folder / "winami.manifest.xml").write_bytes(b"<!DOCTYPE manifest [<!ENTITY a 'a'>]><manifest>&a;</manifest>")


@pytest.mark.parametrize(
    ("damage", "failure"),
    [
        (damage_part, ("user", DAMAGED)),
        (forge_manifest, ("user", DAMAGED)),
        (declare_entities, ("user", DAMAGED)),
        (remove_part, ("user", NOT_FOUND)),
        (lambda _: None, ("wrong", WRONG_KEY)),
    ],
)
def test_open_failure_has_exit_code_one_line_and_no_output(thrave, bundle, tmp_path, damage, failure):
    key, code = failure
    damage(tmp_path / "bundles")
    (tmp_path / "out").mkdir()
    signer = ("--certificate", KEYS / "user-cert.pem")
    opening = ("open", bundle["manifest"], "--key", KEYS / f"{key}-pk.pem", *signer, "-o", tmp_path / "out" / "image")
    status, stdout, stderr = thrave(*opening)
    assert (status, stdout) == (code, "")
    assert stderr.startswith("thrave: ")
    assert stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_bundle_does_not_overwrite_existing_bundle(thrave, bundle, image, tmp_path):
    status, _, stderr = thrave(*sealing(image, tmp_path / "bundles"))
    assert (status, "exists" in stderr) == (REFUSED, True)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--account", "1234"),
        ("--prefix", "../escape"),
        ("--architecture", "a b"),
        ("--signing-key", "/etc/hostname"),
        ("--user-certificate", KEYS / "user-pk.pem"),
        ("--compression", "tiny"),
        ("--side-key", KEYS / "user-pk.pem"),
    ],
)
def test_bundle_rejects_wrong_option_before_writing(thrave, image, tmp_path, wrong):
    status, _, stderr = thrave(*sealing(image, tmp_path / "b", *wrong))
    assert (status, bool(stderr)) == (USAGE, True)
    assert not (tmp_path / "b").exists()


def test_bundle_reports_folder_that_cannot_be_created(thrave, image, tmp_path):
    status, _, stderr = thrave(*sealing(image, image / "b"))
    assert (status, "cannot write" in stderr) == (FAILED, True)


def test_bundle_removes_written_files_after_failure(thrave, image, tmp_path, monkeypatch):
    """The image is truncated while it is read."""
    from thrave.volumes.raw import RawVolume

    monkeypatch.setattr(RawVolume, "size", 9 * MIB)
    monkeypatch.setattr(RawVolume, "extents", lambda _: [(0, 9 * MIB)])
    status, _, stderr = thrave(*sealing(image, tmp_path / "b"))
    assert (status, "too early" in stderr) == (FAILED, True)
    assert list((tmp_path / "b").iterdir()) == []


def test_bundle_refuses_image_that_changes_while_it_is_read(thrave, image, tmp_path, monkeypatch):
    from thrave.volumes.raw import RawVolume

    read = RawVolume.read_into

    def read_and_change(self, offset, buffer):
        read(self, offset, buffer)
        with image.open("r+b") as disk:
            disk.write(b"WRITTEN MEANWHILE")

    monkeypatch.setattr(RawVolume, "read_into", read_and_change)
    status, _, stderr = thrave(*sealing(image, tmp_path / "b"))
    assert (status, "was changed while it was read" in stderr) == (FAILED, True)
    assert list((tmp_path / "b").iterdir()) == []


def test_bundle_reports_warnings_about_image(thrave, thrave_json, image, tmp_path):
    disk = converted(image, "qcow2")
    qemu_img("snapshot", "-c", "before", disk)
    made = thrave_json(*sealing(disk, tmp_path / "b", "--format", "qcow2"))
    (warning,) = made["warnings"]
    assert "internal snapshots" in warning
    _, _, stderr = thrave(*sealing(disk, tmp_path / "c", "--format", "qcow2"))
    assert f"warning: {warning}." in stderr


def test_bundle_reads_referenced_files_in_image_dir_only(thrave, thrave_json, image, tmp_path):
    templates = tmp_path / "templates"
    templates.mkdir()
    disk = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", image.rename(templates / "base.raw"), "-F", "raw", disk)
    status, _, stderr = thrave(*sealing(disk, tmp_path / "b", "--format", "qcow2"))
    assert (status, "nor one of the image directories" in stderr) == (FAILED, True)
    assert not (tmp_path / "b").exists()
    options = ("--format", "qcow2", "--image-dir", templates)
    made = thrave_json(*sealing(disk, tmp_path / "b", *options))
    thrave_json("open", made["manifest"], "--key", KEYS / "user-pk.pem", "-o", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (templates / "base.raw").read_bytes()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, -15), (signal.SIGHUP, -1)]
)
def test_signal_during_bundle_leaves_no_file(tmp_path, number, status):
    (tmp_path / "disk.raw").write_bytes(256 * Random(1).randbytes(MIB))  # takes seconds, also on an idle machine
    words = [*map(str, sealing(tmp_path / "disk.raw", tmp_path / "b", "--compression", "small"))]
    with subprocess.Popen([sys.executable, "-m", "thrave", *words], stderr=subprocess.DEVNULL) as thrave:

        def stored_parts():
            assert thrave.poll() is None
            return [*tmp_path.glob("b/*.part.*")]

        eventually(stored_parts, "a part is stored")
        thrave.send_signal(number)
        assert thrave.wait(60) == status
    assert list((tmp_path / "b").iterdir()) == []
