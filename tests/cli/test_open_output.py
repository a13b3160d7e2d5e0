"""`thrave open`: output to a pipe and in other formats than raw."""

import json
import os
import pty
import subprocess
import sys
from random import Random

import pytest

from support.bundles.sample_bundles import VECTORS, MemoryImage, bundle_of
from support.disks.qemu_images import qemu_img
from support.required_programs import require_libnbd
from thrave.cli.open_commands import FORMATS
from thrave.volumes.qemu_nbd import WRITABLE_FORMATS

FAILED, USAGE, NOT_FOUND, REFUSED, DAMAGED, WRONG_KEY = 1, 2, 3, 4, 10, 11
KEYS = VECTORS / "keys"
MIB = 1024 * 1024
# Much more than the buffers between the first check and the output, whose content is dropped after a failure.
DATA = Random(3).randbytes(30 * MIB) + bytes(MIB) + Random(4).randbytes(2 * MIB) + bytes(MIB)
TRUST = ("--certificate", KEYS / "user-cert.pem")
KEY = ("--key", KEYS / "user-pk.pem")


@pytest.fixture
def manifest(tmp_path):
    """Path of the manifest of a bundle with eleven parts."""
    made = bundle_of(MemoryImage(DATA, [(0, 30 * MIB), (31 * MIB, 2 * MIB)]), part_size=3 * MIB)
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "disk.manifest.xml").write_bytes(made.manifest)
    (folder / "disk.manifest.json").write_bytes(made.side_file)
    for name, data in made.parts.items():
        (folder / name).write_bytes(data)
    return folder / "disk.manifest.xml"


@pytest.fixture
def qemu():
    require_libnbd()


def piped(manifest, *options, key="user"):
    words = map(str, ("open", manifest, "--key", KEYS / f"{key}-pk.pem", *options))
    done = subprocess.run([sys.executable, "-m", "thrave", *words], capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("words", [("--stdout",), ("-o", "-")])
def test_open_stdout_has_only_image(manifest, words):
    status, stdout, stderr = piped(manifest, *TRUST, *words)
    assert (status, stdout == DATA) == (0, True)
    assert "signature    ok" in stderr


def test_open_stdout_prints_json_report_on_stderr(manifest):
    _, _, stderr = piped(manifest, *TRUST, "--stdout", "--output", "json")
    document = json.loads(stderr)
    assert (document["image"], document["format"]) == ("-", "raw")
    assert all(check["checked"] for check in document["checks"])


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def other_digest(manifest):
    text = manifest.read_text()
    start = text.index(">", text.index("<digest")) + 1
    manifest.write_text(text[:start] + "0" * 40 + text[start + 40 :])
    manifest.with_name("disk.manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "status", "comes_out"),
    [
        (lambda manifest: flip(manifest.with_name("disk.part.00")), DAMAGED, False),
        (lambda manifest: flip(manifest.with_name("disk.part.10")), DAMAGED, True),
        (lambda manifest: manifest.with_name("disk.part.10").unlink(), NOT_FOUND, True),
        (other_digest, DAMAGED, True),
    ],
    ids=["first part", "late part", "missing part", "digest of the whole"],
)
def test_open_stdout_failure_truncates_image_and_warns(manifest, damage, status, comes_out):
    damage(manifest)
    code, stdout, stderr = piped(manifest, "--stdout")
    assert (code, bool(stdout)) == (status, comes_out)
    assert DATA.startswith(stdout)
    assert len(stdout) < len(DATA)
    assert "the image on stdout is incomplete" in stderr
    assert "Traceback" not in stderr


def test_open_stdout_with_wrong_key_is_empty(manifest):
    assert piped(manifest, "--stdout", key="wrong")[:2] == (WRONG_KEY, b"")


def test_open_refuses_terminal(manifest):
    terminal, end = pty.openpty()
    words = map(str, ("open", manifest, *KEY, "--stdout"))
    done = subprocess.run([sys.executable, "-m", "thrave", *words], stdout=end, stderr=subprocess.PIPE, check=False)
    os.close(end)
    os.close(terminal)
    assert (done.returncode, b"cannot write an image to a terminal" in done.stderr) == (USAGE, True)


@pytest.mark.parametrize(
    "words", [(), ("--stdout", "-o", "image"), ("--stdout", "--format", "qcow2"), ("-o", "image", "--format", "vhdx")]
)
def test_open_rejects_wrong_options_before_writing(manifest, thrave, tmp_path, monkeypatch, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, stdout, _ = thrave("open", manifest, *KEY, *words)
    assert (status, stdout) == (USAGE, "")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.usefixtures("qemu")
@pytest.mark.parametrize("image_format", WRITABLE_FORMATS)
def test_open_writes_other_formats(manifest, thrave_json, tmp_path, image_format):
    (tmp_path / "out").mkdir()
    image = tmp_path / "out" / "disk"
    document = thrave_json("open", manifest, *KEY, "--format", image_format, "-o", image)
    assert (document["image"], document["format"]) == (str(image), image_format)
    (tmp_path / "disk.raw").write_bytes(DATA)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", image_format, tmp_path / "disk.raw", image)
    if image_format != "vpc":  # VPC has no such check
        assert "No errors" in qemu_img("check", "-f", image_format, image)
    assert image.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in image.parent.iterdir()] == ["disk"]


@pytest.mark.usefixtures("qemu")
def test_open_keeps_holes_unallocated_in_qcow2(manifest, thrave_json, tmp_path):
    thrave_json("open", manifest, *KEY, "--format", "qcow2", "-o", tmp_path / "disk")
    mapped = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", tmp_path / "disk"))
    data = [(run["start"], run["length"]) for run in mapped if run["data"]]
    assert data == [(0, 30 * MIB), (31 * MIB, 2 * MIB)]


@pytest.mark.usefixtures("qemu")
@pytest.mark.parametrize("damage", [lambda m: flip(m.with_name("disk.part.10")), other_digest])
def test_open_of_damaged_bundle_keeps_existing_qcow2(manifest, thrave, tmp_path, damage):
    damage(manifest)
    (tmp_path / "out").mkdir()
    image = tmp_path / "out" / "disk"
    image.write_text("old")
    status, stdout, stderr = thrave("open", manifest, *KEY, "--format", "qcow2", "-o", image, "--force")
    assert (status, stdout) == (DAMAGED, "")
    (line,) = [
        line for line in stderr.splitlines() if not line.startswith("opening ")
    ]  # the progress of a slow machine
    assert line.startswith("thrave: ")
    assert [path.name for path in image.parent.iterdir()] == ["disk"]
    assert image.read_text() == "old"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("there", [b"old", bytes(len(DATA))])
def test_open_replaces_existing_image_only_with_force(manifest, thrave, tmp_path, image_format, there):
    if image_format != "raw":
        require_libnbd()
    image = tmp_path / "disk"
    image.write_bytes(there)
    words = ("open", manifest, *KEY, "--format", image_format, "-o", image)
    status, stdout, stderr = thrave(*words)
    assert (status, stdout) == (REFUSED, "")
    assert f"{image} exists; choose another file, or replace it with --force" in stderr
    assert image.read_bytes() == there
    assert thrave(*words, "--force")[0] == 0
    assert image.read_bytes() != there
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "disk"}


def test_open_accepts_existing_image_with_same_content(manifest, thrave, tmp_path):
    words = ("open", manifest, *KEY, "-o", tmp_path / "disk")
    assert thrave(*words)[0] == 0
    before = (tmp_path / "disk").stat()
    assert thrave(*words)[0] == 0
    after = (tmp_path / "disk").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_open_does_not_create_missing_folder(manifest, thrave, tmp_path):
    status, _, stderr = thrave("open", manifest, *KEY, "-o", tmp_path / "no" / "disk")
    assert (status, f"the folder {tmp_path / 'no'} does not exist" in stderr) == (FAILED, True)
    assert not (tmp_path / "no").exists()


def test_formats_are_those_that_qemu_nbd_can_create():
    assert ("raw", *WRITABLE_FORMATS) == FORMATS
