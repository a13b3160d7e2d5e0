"""The disks of the demo, checked with ntfs-3g and sfdisk."""

import hashlib
import os
import re
import struct
import subprocess
from itertools import pairwise
from pathlib import PurePosixPath

import pytest

from support.required_programs import require
from thrave.demo import disk as demo
from thrave.demo.disk import Contents

SIZE = 64 << 20
SHA256 = "10e9d8dd4864108cc93688f264e562aa9b75a12138d98e5c8b6d1817cc526177"  # of the default seed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return demo.make_demo_disk(tmp_path_factory.mktemp("demo") / "root.raw", SIZE)


@pytest.fixture(scope="module")
def volume(made):
    """The partition as a file, which the tools of ntfs-3g need."""
    path = made.path.with_name("volume.ntfs")
    with made.path.open("rb") as image, path.open("wb") as volume:
        image.seek(demo.PARTITION_OFFSET)
        volume.write(image.read(made.volume_size))
    return path


def ntfs(program, *words):
    return subprocess.run(
        [require(program, package="ntfs-3g"), *map(str, words)], capture_output=True, check=True, text=False
    ).stdout


def sha256(pieces):
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sha256_of(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_default_disk_has_known_sha256(made):
    assert sha256_of(made.path) == SHA256


def test_seed_determines_contents(made, tmp_path):
    paths = [tmp_path / str(number) for number in range(3)]
    for path, seed in zip(paths, [7, 7, 8], strict=True):
        demo.make_demo_disk(path, SIZE, seed)
    first, again, other = map(sha256_of, paths)
    assert first == again
    assert len({first, other, sha256_of(made.path)}) == 3


def test_partition_table_has_one_active_ntfs_partition(made):
    sector = made.path.read_bytes()[:512]
    status, first_chs, kind, last_chs, start, count = struct.unpack_from("<B3sB3sII", sector, 446)
    assert (status, kind, start, count) == (0x80, 0x07, 2048, made.volume_size // 512)
    assert sector[462:] == bytes(48) + b"\x55\xaa"
    assert demo.PARTITION_OFFSET + made.volume_size == SIZE
    for chs, lba in ((first_chs, start), (last_chs, start + count - 1)):
        head, sector_and_high, low = chs
        cylinder = low | (sector_and_high & 0xC0) << 2
        assert (cylinder * 255 + head) * 63 + (sector_and_high & 0x3F) - 1 == lba


def test_sfdisk_reads_partition_table(made):
    listed = subprocess.run(
        [require("sfdisk", package="fdisk"), "--dump", made.path], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(rf"start= *2048, size= *{made.volume_size // 512}, type=7, bootable", listed)


def test_volume_is_clean_for_ntfsfix(volume):
    said = ntfs("ntfsfix", "-n", volume).decode()
    assert "was processed successfully" in said
    assert "BAD" not in said


def test_bitmap_and_records_agree_for_ntfsresize(volume):
    assert b"Accounting clusters" in ntfs("ntfsresize", "--info", "--force", volume)


def test_volume_has_windows_folders(volume):
    listed = ntfs("ntfsls", "-p", "Windows/System32", volume).decode().split()
    assert {"ntoskrnl.exe", "config", "drivers", "Sysprep"} <= {*listed}
    assert ntfs("ntfscat", volume, "Users/Public/Documents/日本語 файл ünïcode.txt").decode() == "héllo wörld\r\n"


@pytest.mark.parametrize("kind", ["program", "text", "random", "zeros"])
def test_files_have_generated_contents(made, volume, kind):
    files = [file for file in made.files if file.kind == kind and not file.deleted]
    for file in files[:3] + files[-3:]:
        assert sha256([ntfs("ntfscat", volume, file.path)]) == sha256(made.content(file)), file.path


def test_deleted_files_are_in_free_clusters_only(made, volume):
    deleted = [file for file in made.files if file.deleted]
    assert len(deleted) > 20
    names = {PurePosixPath(file.path).name for file in deleted}
    assert names <= {line.split()[-1] for line in ntfs_undelete(volume)}
    used, content = used_clusters(volume), volume.read_bytes()
    for file in deleted:
        stored = b"".join(content[run.offset : run.offset + run.length] for run in file.runs)
        assert sha256([stored[: file.size]]) == sha256(made.content(file))
        assert not any(used[cluster] for run in file.runs for cluster in clusters(run))


def test_clusters_of_existing_files_are_in_use(made, volume):
    used = used_clusters(volume)
    for file in made.files:
        assert file.deleted or all(used[cluster] for run in file.runs for cluster in clusters(run))


def ntfs_undelete(volume):
    done = subprocess.run(
        [require("ntfsundelete", package="ntfs-3g"), "--force", volume], capture_output=True, text=True, check=False
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def used_clusters(volume):
    """Return $Bitmap of the volume: one value for each cluster."""
    bitmap = ntfs("ntfscat", "-i", "6", volume)
    return [byte >> bit & 1 for byte in bitmap for bit in range(8)]


def clusters(run):
    return range(run.offset // 4096, (run.offset + run.length) // 4096)


def test_half_of_the_disk_is_data(made):
    assert 0.4 < sum(file.size for file in made.files) / SIZE < 0.6
    assert made.path.stat().st_blocks * 512 < 0.7 * SIZE


def test_some_data_is_zeros_without_hole(made):
    zeros = [file for file in made.files if file.kind == "zeros"]
    with made.path.open("rb") as image:
        for run in zeros[0].runs:
            offset = demo.PARTITION_OFFSET + run.offset
            assert os.lseek(image.fileno(), offset, os.SEEK_DATA) == offset
    assert 0.05 < sum(file.size for file in zeros) / SIZE < 0.2


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("program", 0.4, 0.65), ("text", 0.05, 0.3), ("random", 1.0, 1.01), ("zeros", 0, 0.01)]
)
def test_contents_are_as_compressible_as_real_files(kind, least, most):
    import zlib

    content = b"".join(Contents(1).chunks("a file", kind, 2 << 20))
    assert least <= len(zlib.compress(content, 6)) / len(content) <= most


@pytest.mark.parametrize("kind", ["program", "random", "text"])
def test_pieces_of_files_differ(kind):
    contents = Contents(1)
    pieces = [*contents.chunks("one", kind, 3 << 20), *contents.chunks("two", kind, 3 << 20)]
    assert len(set(pieces)) == 6


def test_larger_disk_has_largest_volume_that_fits(tmp_path):
    made = demo.make_demo_disk(tmp_path / "root.raw", SIZE + (1 << 20) + 512)
    assert made.path.stat().st_size == SIZE + (1 << 20) + 512
    assert made.volume_size == SIZE - demo.PARTITION_OFFSET


@pytest.mark.parametrize("disk_size", demo.TEMPLATE_SIZES)
def test_each_size_has_small_template(disk_size):
    from importlib.resources import files

    from thrave.demo.disk import open_template

    name = demo.template_name(disk_size)
    assert files("thrave.demo").joinpath("templates", name).stat().st_size < 300_000
    with open_template(name) as source:
        template = source.template
        assert template.size == disk_size - demo.PARTITION_OFFSET
        placed = [*template.metadata, *(run for file in template.files for run in file.runs)]
        assert all(run.offset % 4096 == 0 and run.length > 0 for run in placed)
        assert sum(len(block) for _, block in source.metadata()) == sum(run.length for run in template.metadata)
    ends = sorted((run.offset, run.offset + run.length) for run in placed)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= template.size


@pytest.mark.parametrize("size", [0, 512, SIZE - 512, SIZE + 1])
def test_make_demo_disk_rejects_invalid_size(tmp_path, size):
    with pytest.raises(demo.DemoDiskError, match=f"not {size} bytes"):
        demo.make_demo_disk(tmp_path / "root.raw", size)
    assert not (tmp_path / "root.raw").exists()


def test_ephemeral_disk_has_mark_in_every_sector(made, tmp_path):
    demo.make_ephemeral_disk(tmp_path / "ephemeral0.raw", 1 << 20)
    content = (tmp_path / "ephemeral0.raw").read_bytes()
    assert content.count(demo.EPHEMERAL_MARK) == 2048
    assert all(content[offset : offset + 512].startswith(demo.EPHEMERAL_MARK) for offset in range(0, 1 << 20, 512))
    assert demo.EPHEMERAL_MARK not in made.path.read_bytes()
