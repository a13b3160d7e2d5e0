"""`skip_unused` on a Windows-like disk: what is left out and what is kept, compared with other readers of NTFS."""

import hashlib
import os
import random
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.bundles.sample_bundles import bundle_of, private_key
from support.disks.ntfs_disk import CLUSTER, HIBERNATION, SWAP, Damage, make_windows_disk, ntfs_tool
from support.required_programs import require
from thrave.bundle.opener import open_bundle
from thrave.demo.disk import PARTITION_OFFSET
from thrave.volumes import ntfs_scan
from thrave.volumes.base import Extent
from thrave.volumes.errors import ToolNotInstalled
from thrave.volumes.formats import open_volume
from thrave.volumes.ntfs_scan import claim_clusters, find_free_runs
from thrave.volumes.ntfs_volumes import FilteredVolume

DISPOSABLE = ["pagefile.sys", "hiberfil.sys", "swapfile.sys"]


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return make_windows_disk(tmp_path_factory.mktemp("windows") / "disk.raw")


@pytest.fixture(scope="module")
def opened(windows, tmp_path_factory):
    """The disk after it was sealed with `skip_unused` and opened again."""
    with open_volume(windows.path, "raw", skip_unused=True) as volume:
        bundle = bundle_of(volume)
    image = tmp_path_factory.mktemp("opened") / "disk.raw"
    open_bundle(bundle.manifest, bundle, private_key("user"), image, side_file=bundle.side_file)
    return image


@pytest.fixture(scope="module")
def ntfs(opened):
    """The partition of `opened` in its own file, for the tools of ntfs-3g."""
    path = opened.with_suffix(".ntfs")
    path.write_bytes(opened.read_bytes()[PARTITION_OFFSET:])
    return path


@pytest.fixture(scope="module")
def mounted(ntfs):
    """The volume, mounted by ntfs-3g."""
    folder = ntfs.with_suffix(".mnt")
    folder.mkdir()
    mount(ntfs, folder, "ro")
    yield folder
    subprocess.run([shutil.which("umount"), folder], check=True)


def mount(volume, folder, options):
    program = require("ntfs-3g", package="ntfs-3g")
    done = subprocess.run([program, "-o", options, volume, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")


def sha256(pieces):
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def unused_clusters(path):
    """The clusters of the volume that the scan leaves out."""
    damage = Damage.to(path)
    return {
        (offset - damage.at) // CLUSTER + index for offset, length in holes(path) for index in range(length // CLUSTER)
    }


def holes(path):
    with open_volume(path, "raw", skip_unused=True) as volume:
        return list(volume._unused)


def used_bits(bitmap):
    return {8 * index + bit for index, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


def test_skip_unused_keeps_content_of_every_file(windows, mounted):
    live = [file for file in windows.files if not file.deleted and file.path not in DISPOSABLE]
    assert len(live) > 200
    for file in live:
        with (mounted / file.path).open("rb") as content:
            assert hashlib.file_digest(content, "sha256").hexdigest() == sha256(windows.content(file)), file.path


def test_skip_unused_reads_swap_and_hibernation_files_as_zeros(windows, mounted):
    for name in DISPOSABLE:
        content = (mounted / name).read_bytes()
        assert content == bytes(len(content))
    sizes = [(mounted / name).stat().st_size for name in DISPOSABLE]
    pagefile = next(file.size for file in windows.files if file.path == "pagefile.sys")
    assert sizes == [pagefile, CLUSTER + 10_000 * len(HIBERNATION), 5_000 * len(SWAP)]


def test_skip_unused_produces_a_volume_that_ntfsfix_accepts(ntfs):
    assert b"processed successfully" in ntfs_tool("ntfsfix", "-n", ntfs)
    assert b"Accounting clusters" in ntfs_tool("ntfsresize", "--force", "--info", ntfs)


def test_skip_unused_leaves_no_deleted_or_swapped_data(windows, opened):
    before, after = windows.path.read_bytes(), opened.read_bytes()
    # Without texts: the demo's generator writes the same texts to several files.
    deleted = [file for file in windows.files if file.deleted and file.kind in {"program", "random"}]
    leaked = [content for file in deleted if (content := next(windows.content(file))[:2000]) in before]
    assert len(leaked) > 20
    assert [content for content in (*leaked, HIBERNATION, SWAP) if content in after] == []


def test_skip_unused_keeps_bytes_outside_the_file_system(windows, opened):
    before, after = windows.path.read_bytes(), opened.read_bytes()
    assert len(before) == len(after)
    assert before[:PARTITION_OFFSET] == after[:PARTITION_OFFSET]
    end = PARTITION_OFFSET + windows.volume_size
    assert before[end - 512 : end].count(b"NTFS    ") == 1  # the backup boot sector
    assert before[end - 512 :] == after[end - 512 :]


def test_skip_unused_keeps_or_zeroes_every_byte(windows, opened):
    before, after = bytearray(windows.path.read_bytes()), opened.read_bytes()
    for offset, length in holes(windows.path):
        before[offset : offset + length] = bytes(length)
    assert before == after


def test_bitmap_and_runs_agree_with_ntfs_3g(windows, ntfs):
    original = ntfs.with_suffix(".before")
    original.write_bytes(windows.path.read_bytes()[PARTITION_OFFSET:])
    used = used_bits(ntfs_tool("ntfscat", "--force", "--inode", 6, original))
    disposable = set()
    for name in DISPOSABLE:
        output = ntfs_tool("ntfscluster", "--force", "--filename", name, original).decode()
        runs = re.findall(r"^ +\d+ +(\d+) +(\d+)$", output, re.MULTILINE)
        assert runs
        disposable |= {int(first) + index for first, count in runs for index in range(int(count))}
    clusters = windows.volume_size // CLUSTER - 1
    assert unused_clusters(windows.path) == (set(range(clusters)) - used) | disposable


def test_bitmap_and_runs_agree_with_libfsntfs(windows):
    import pyfsntfs

    source = windows.path.with_suffix(".fsntfs")
    source.write_bytes(windows.path.read_bytes()[PARTITION_OFFSET:])
    volume = pyfsntfs.volume()
    volume.open(str(source))
    bitmap = volume.get_file_entry(6)
    used = used_bits(bitmap.read(bitmap.size))
    for name in DISPOSABLE:
        file = volume.get_file_entry_by_path(f"\\{name}")
        for offset, length, _ in map(file.get_extent, range(file.number_of_extents)):
            used -= set(range(offset // CLUSTER, (offset + length) // CLUSTER))
    clusters = windows.volume_size // CLUSTER - 1
    assert unused_clusters(windows.path) == set(range(clusters)) - used
    volume.close()


@pytest.fixture
def all_kinds(tmp_path):
    """A volume with files of each kind that NTFS stores differently."""
    path, folder = tmp_path / "volume.ntfs", tmp_path / "mnt"
    with path.open("wb") as volume:
        volume.truncate(24 << 20)
    folder.mkdir()
    ntfs_tool("mkntfs", "-F", "-Q", "-q", "-s", 512, "-p", 0, "-H", 255, "-S", 63, "-c", CLUSTER, path)
    mount(path, folder, "streams_interface=windows,compression")
    try:
        fill(folder)
    finally:
        subprocess.run([shutil.which("umount"), folder], check=True)
    return path


def fill(folder):
    source = random.Random(3)
    for number in range(2000):
        (folder / f"small {number}").write_bytes(source.randbytes(CLUSTER))
    for number in range(0, 2000, 2):
        (folder / f"small {number}").unlink()
    with (folder / "fragmented").open("wb", buffering=0) as fragmented:
        while os.statvfs(folder).f_bavail > 250:
            fragmented.write(source.randbytes(CLUSTER))
    for number in range(1, 2000, 4):
        (folder / f"small {number}").unlink()
    (folder / "compressed").mkdir()
    os.setxattr(folder / "compressed", "system.ntfs_attrib", (0x810).to_bytes(4, "little"))
    (folder / "compressed" / "file").write_bytes(b"again and again " * 20_000)
    (folder / "host").write_bytes(b"small")
    Path(f"{folder / 'host'}:stream").write_bytes(source.randbytes(50_000))
    (folder / "link").hardlink_to(folder / "host")
    with (folder / "sparse").open("wb") as sparse:
        sparse.seek(1 << 20)
        sparse.write(b"end")
    (folder / "many").mkdir()
    for number in range(500):
        (folder / "many" / f"an empty file with a long name, number {number}").touch()


def test_every_cluster_of_every_file_type_is_accounted_for(all_kinds, monkeypatch):
    """Attribute lists, streams, compression, sparse files, large folders: all used clusters belong to a file."""
    free_runs = []
    monkeypatch.setattr(ntfs_scan, "_limit_count", lambda runs: free_runs.extend(runs) or free_runs)
    source = Damage.to(all_kinds)
    source.read = lambda offset, length: source.disk[offset : offset + length]
    claimed = []
    monkeypatch.setattr(
        ntfs_scan, "claim_clusters", lambda bitmap, *run: claimed.append(run) or claim_clusters(bitmap, *run)
    )
    ntfs_scan.find_unused(source)
    free = sum(count for _, count in free_runs)
    assert sum(count for _, count in claimed) + free == ((24 << 20) - 512) // CLUSTER
    assert len(claimed) > 600
    assert b"Accounting clusters" in ntfs_tool("ntfsresize", "--force", "--info", all_kinds)


def test_open_volume_skips_nothing_by_default(windows):
    with open_volume(windows.path, "raw") as volume, open_volume(windows.path, "raw", skip_unused=False) as same:
        assert volume.extents() == same.extents()
        assert type(same) is type(volume)


def test_skip_unused_works_with_every_format(windows, tmp_path, nbd):
    image = tmp_path / "disk.qcow2"
    convert = [require("qemu-img", package="qemu-utils"), "convert", "-O", "qcow2", windows.path, image]
    subprocess.run(convert, check=True)
    with (
        open_volume(image, "qcow2", skip_unused=True) as qcow2,
        open_volume(windows.path, "raw", skip_unused=True) as raw,
    ):
        assert qcow2._unused == raw._unused
        hole = qcow2._unused[0]
        buffer = bytearray(b"?" * 1000)
        qcow2.read_into(hole.offset, memoryview(buffer))
        assert not any(buffer)


def test_swap_file_with_other_name_or_folder_keeps_its_content(windows):
    """A hard link of pagefile.sys with another name: the content is kept."""
    before = sum(length for _, length in holes(windows.path))
    path = windows.path.with_name("linked.raw")
    shutil.copy(windows.path, path)
    damage = Damage.to(path)
    record = damage.record_at_cluster(58961920 // CLUSTER)
    name = damage.attribute(record, 0x30)
    damage.put(name + damage.number(name + 20, "<H") + 66, "pagefile.old".encode("utf-16-le"))
    path.write_bytes(damage.disk[:])
    assert before - sum(length for _, length in holes(path)) == 839680


def test_skip_unused_names_package_of_missing_library(windows, monkeypatch):
    monkeypatch.setattr("thrave.volumes.ntfs_sandbox.find_spec", lambda _: None)
    with pytest.raises(ToolNotInstalled, match=r"pytsk3 is not installed: pip install 'thrave\[ntfs\]'"):
        holes(windows.path)


def test_scan_refuses_too_fragmented_free_space(windows, monkeypatch):
    monkeypatch.setattr(ntfs_scan, "MAX_HOLES", 5)
    damage = Damage.to(windows.path)
    source = Damage(bytearray(damage.disk[damage.at :]))
    source.read = lambda offset, length: bytes(source.disk[offset : offset + length])
    with pytest.raises(ntfs_scan.FileSystemUnsupportedError, match="more than 5 pieces: defragment"):
        ntfs_scan.find_unused(source)


RUNS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=8)


def placed(gaps_and_lengths):
    """Runs with gaps before them, ascending and not overlapping."""
    runs, end = [], 0
    for gap, length in gaps_and_lengths:
        runs.append(Extent(end + gap, length))
        end += gap + length
    return runs


class Pattern:
    """A volume without zeros, whose bytes depend on the offset."""

    size = 400

    def __init__(self, extents):
        self._extents = extents

    def extents(self):
        return self._extents

    def prefetch(self, offset, length):
        pass

    def close(self):
        pass

    def read_into(self, offset, buffer):
        buffer[:] = bytes(1 + at % 250 for at in range(offset, offset + len(buffer)))


@given(RUNS, RUNS, st.integers(0, 399), st.integers(0, 400))
def test_extents_and_reads_agree_with_a_model(data, unused, offset, length):
    data = [run for run in placed(data) if run.offset + run.length <= 400]
    unused = [run for run in placed(unused) if run.offset + run.length <= 400]
    volume = FilteredVolume(Pattern(data), unused)
    kept = {at for start, count in data for at in range(start, start + count)}
    gone = {at for start, count in unused for at in range(start, start + count)}
    extents = volume.extents()
    assert {at for start, count in extents for at in range(start, start + count)} == kept - gone
    assert all(first + count < then for (first, count), (then, _) in pairwise(extents))
    assert all(count > 0 for _, count in extents)
    buffer = bytearray(min(length, 400 - offset))
    volume.read_into(offset, memoryview(buffer))
    assert all(byte == (0 if offset + at in gone else 1 + (offset + at) % 250) for at, byte in enumerate(buffer))


def test_many_extents_and_holes_are_fast():
    """The time must not grow with extents times holes."""
    count = 50_000
    volume = FilteredVolume(
        Pattern([Extent(20 * index, 10) for index in range(count)]),
        [Extent(20 * index + 5, 5) for index in range(count)],
    )
    assert volume.extents() == [Extent(20 * index, 5) for index in range(count)]


@given(st.binary(min_size=4, max_size=40), st.data())
def test_bitmap_is_read_bit_by_bit(small_pieces, bitmap, data):
    clusters = data.draw(st.integers(1, 8 * len(bitmap)))
    free = {first + index for first, count in find_free_runs(bitmap, clusters) for index in range(count)}
    assert free == set(range(clusters)) - used_bits(bitmap)
    first = data.draw(st.integers(0, clusters - 1))
    count = data.draw(st.integers(1, clusters - first))
    left = bytearray(bitmap)
    wanted = set(range(first, first + count))
    assert claim_clusters(left, first, count) == (wanted <= used_bits(bitmap))
    if wanted <= used_bits(bitmap):
        assert used_bits(left) == used_bits(bitmap) - wanted
        assert not claim_clusters(left, first, count)


@pytest.fixture(scope="module")
def small_pieces():
    """Pieces of 16 clusters, so that runs cross their borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thrave.volumes.ntfs_scan._PIECE", 16)
        yield
