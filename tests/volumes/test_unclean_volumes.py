"""`find_unclean`: which NTFS volumes of a disk were not unmounted, and which cannot be checked."""

import random
import struct
import sys

import pytest

from support.disks.ntfs_damage import (
    BASIC,
    DYNAMIC,
    RESERVED,
    STORAGE_SPACES,
    boot,
    flags,
    gpt,
    hibernation_head,
    log,
    partition_entry,
)
from support.disks.ntfs_disk import CLUSTER, RECORD, Damage, make_windows_disk, restart_page
from support.disks.qemu_images import converted
from thrave.volumes import ntfs_format, ntfs_sandbox, ntfs_scan
from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.formats import open_volume
from thrave.volumes.ntfs_format import BootSector
from thrave.volumes.ntfs_volumes import Verdict, find_unclean

MESSAGE = struct.Struct("<cQQ")
NAME = ntfs_scan.HIBERNATION_FILE.encode("utf-16-le")
GEOMETRY = BootSector(cluster_size=CLUSTER, clusters=1000, mft=4, mft_mirror=500, record_size=RECORD)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return make_windows_disk(tmp_path_factory.mktemp("windows") / "disk.raw").path


@pytest.fixture
def damage(windows):
    return Damage.to(windows)


def messages_of(damage):
    return [found.message for found in find_unclean(damage)]


def not_checked(damage):
    found = find_unclean(damage)
    return [each.message for each in found if each.verdict is Verdict.NOT_CHECKED]


def hibernation_name(damage):
    """Offset of the name of hiberfil.sys in its MFT record."""
    return damage.disk.find(NAME, damage.record(24))


def hibernate_with_name(name):
    def change(damage):
        hibernation_head(b"hibr")(damage)
        damage.put(hibernation_name(damage), name.encode("utf-16-le"))

    return change


def hibernate_in_another_folder(damage):
    hibernation_head(b"hibr")(damage)
    damage.put(hibernation_name(damage) - 66, struct.pack("<IHH", 24, 0, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        flags(0x8000),
        log(restart_page()),
        hibernation_head(b"wake"),
        hibernation_head(b"\0\0\0\0"),
        hibernate_with_name("hibernot.sys"),
        hibernate_in_another_folder,
        gpt((BASIC, 1 << 20, 63 << 20)),
        gpt((RESERVED, 20 << 10, 1 << 19), (BASIC, 1 << 20, 63 << 20)),  # as Windows creates it
    ],
)
def test_clean_volume_has_no_findings(damage, change):
    change(damage)
    assert find_unclean(damage) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (boot(3, "8s", b"-FVE-FS-"), "volume at byte 1048576: it is encrypted with BitLocker"),
        (
            boot(424, "16s", ntfs_format._BITLOCKER_TO_GO),
            "volume at byte 1048576: it is encrypted with BitLocker",
        ),
        (boot(3, "8s", b"ReFS"), "volume at byte 1048576: its file system is ReFS"),
        (boot(3, "8s", b"MSDOS5.0"), "volume at byte 1048576: no file system is known"),
        (boot(13, "<B", 256 - 8), "volume at byte 1048576: its clusters have 128 KiB"),
        (partition_entry(1, 0x42, 0, 0), "it is a dynamic disk"),
        (gpt((DYNAMIC, 1 << 20, 63 << 20)), "it is a dynamic disk"),
        (gpt((STORAGE_SPACES, 1 << 20, 63 << 20)), "it belongs to Storage Spaces"),
        (gpt(), "it has no partition"),
        (partition_entry(0, 0x00, 0, 0), "volume at byte 0: no file system is known"),
    ],
)
def test_find_unclean_names_what_it_cannot_check(damage, change, message):
    change(damage)
    (found,) = not_checked(damage)
    assert found.startswith(f"not checked whether it is clean: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flags(0x0001), "it is marked as dirty: have Windows check it"),
        (flags(0x4000), "it is marked as dirty"),
        (log(restart_page(clients=0)), "its log was not closed"),
        (log(restart_page(version=(2, 0))), "its log has version 2.0: shut Windows down fully"),
        (hibernation_head(b"hibr"), "Windows is hibernated on it"),
        (hibernation_head(b"HIBR"), "Windows is hibernated on it"),
        (hibernation_head(b"RSTR"), "Windows is hibernated on it"),
        (hibernate_with_name("HiberFil.Sys"), "Windows is hibernated on it"),
        (log(bytes(4096)), "its log has no restart page"),
        (boot(48, "<Q", 1 << 40), "its boot sector does not describe a volume"),
    ],
)
def test_find_unclean_reports_the_problem(damage, change, message):
    change(damage)
    (found,) = messages_of(damage)
    assert found.startswith(f"volume at byte {damage.at}: {message}")
    assert not not_checked(damage)


def test_find_unclean_reports_every_problem(damage):
    for change in (flags(1), log(restart_page(clients=0)), hibernation_head(b"hibr")):
        change(damage)
    found = messages_of(damage)
    assert [text in message for text, message in zip(("dirty", "log", "hibernated"), found, strict=True)] == [True] * 3


def test_findings_before_an_error_are_kept(damage):
    flags(1)(damage)
    log(bytes(4096))(damage)
    found = messages_of(damage)
    assert [text in message for text, message in zip(("dirty", "restart page"), found, strict=True)] == [True] * 2


def test_each_volume_has_its_own_findings(damage):
    size = len(damage.disk) - damage.at
    second = damage.at + size
    damage.disk = bytearray(damage.disk[:]) + damage.disk[damage.at :]
    partition_entry(1, 0x07, second // 512, size // 512)(damage)
    flags(1)(Damage(damage.disk, second))
    (found,) = messages_of(damage)
    assert f"volume at byte {second}: it is marked as dirty" in found
    boot(3, "8s", b"-FVE-FS-")(damage)
    assert messages_of(damage) == [*not_checked(damage), found]
    assert len(messages_of(damage)) == 2


def test_volume_without_partition_table_is_checked(damage):
    bare = Damage(bytearray(damage.disk[damage.at :]), 0)
    assert messages_of(bare) == []
    flags(1)(bare)
    assert "volume at byte 0: it is marked as dirty" in messages_of(bare)[0]


def test_invalid_partitions_are_reported(damage):
    partition_entry(1, 0x07, 2048, 1)(damage)
    assert messages_of(damage) == [f"the partition at byte {damage.at} overlaps another or leaves the disk"]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1 << 20])
@pytest.mark.parametrize("signature", [b"\0\0", b"\x55\xaa"])
def test_disk_with_other_content_is_not_checked(size, signature):
    noise = bytearray(random.Random(size).randbytes(size))
    noise[510:512] = signature[: max(0, size - 510)]
    assert not_checked(Damage(noise)) == messages_of(Damage(noise))
    assert len(messages_of(Damage(noise))) == 1


def test_findings_are_the_same_in_every_format(damage, windows, nbd, tmp_path):
    hibernation_head(b"hibr")(damage)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(damage.disk[:])
    image = converted(raw, "qcow2")
    with open_volume(image, "qcow2") as volume:
        ((_, found),) = find_unclean(volume)
    assert found.startswith(f"volume at byte {damage.at}: Windows is hibernated")


def test_find_unclean_reports_a_timeout(damage, monkeypatch):
    monkeypatch.setattr(ntfs_sandbox, "SCAN_TIMEOUT", 0.01)
    (found,) = messages_of(damage)
    assert "reading it took too long" in found


def test_find_unclean_reports_missing_library(damage, monkeypatch):
    monkeypatch.setattr("thrave.volumes.ntfs_sandbox.find_spec", lambda _: None)
    (found,) = messages_of(damage)
    assert "whether Windows was shut down fully is unknown: pytsk3 is not installed: pip install" in found
    assert not_checked(damage) == [found]


def test_find_unclean_raises_read_errors_of_the_disk(damage):
    whole = damage.read_into

    def fail(offset, buffer):
        if offset > damage.at + 4096:
            raise VolumeUnreadableError("disk.raw", "the disk is broken", offset=offset)
        whole(offset, buffer)

    damage.read_into = fail
    with pytest.raises(VolumeUnreadableError, match="the disk is broken"):
        messages_of(damage)


def problem(text):
    return MESSAGE.pack(b"c", 0, len(text)) + text


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (problem(b"zz \x1b[2Jz\n") + MESSAGE.pack(b".", 0, 0), ["zz \ufffd[2Jz\ufffd"]),
        (problem(b"zz") * 9, ["zz"] * ntfs_sandbox.MAX_PROBLEMS + ["invalid message"]),
        (MESSAGE.pack(b"c", 0, 1 << 40), ["invalid message"]),
        (MESSAGE.pack(b"u", 0, 4096), ["invalid message"]),
        (problem(b"zz") + MESSAGE.pack(b"x", 1, 1) + b"b", ["zz", "not checked"]),
        (problem(b"zz") + MESSAGE.pack(b"x", 0, 2) + b"yy", ["zz", "yy"]),
        (problem(b"zz"), ["zz", "exit status 0"]),
    ],
)
def test_output_of_the_reader_is_validated(damage, output, expected, tmp_path, monkeypatch):
    """As if the guest controlled the process that reads the file system."""
    (tmp_path / "output").write_bytes(output)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nexec cat '{tmp_path / 'output'}'\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    found = messages_of(damage)
    assert [text in message for text, message in zip(expected, found, strict=True)] == [True] * len(expected)


class Records:
    """A volume with this $MFT."""

    def __init__(self, records):
        self._records = records

    def records(self, boot):
        yield 0, self._records


@pytest.mark.parametrize("replaced", [None, *range(0, len(NAME), 2)])
def test_file_name_is_found_across_a_fixup(replaced):
    record = bytearray(RECORD)
    struct.pack_into("<4s18xH8xQ", record, 0, b"FILE", 1, 0)
    at = 300 if replaced is None else 510 - replaced
    record[at : at + len(NAME)] = NAME.upper()
    if replaced is not None:
        record[510:512] = b"\x07\x00"
    assert list(ntfs_scan._find_hibernation_records(GEOMETRY, Records(bytes(RECORD) + record))) == [1]


def test_file_name_in_extension_record_is_found():
    record = bytearray(RECORD)
    struct.pack_into("<4s18xH8xQ", record, 0, b"FILE", 1, 7 << 48 | 42)
    record[400 : 400 + len(NAME)] = NAME
    assert list(ntfs_scan._find_hibernation_records(GEOMETRY, Records(bytes(RECORD) + record))) == [42]


def test_file_name_in_unused_record_is_ignored():
    record = bytearray(RECORD)
    struct.pack_into("<4s18xH8xQ", record, 0, b"FILE", 0, 0)
    record[400 : 400 + len(NAME)] = NAME
    assert list(ntfs_scan._find_hibernation_records(GEOMETRY, Records(bytes(record)))) == []
