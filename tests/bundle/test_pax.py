"""Sparse tar members in PAX format: as written by GNU tar and bsdtar, and with invalid maps."""

import subprocess
import tracemalloc

import pytest

from support.bundles.tar_streams import read_tar, tar_of
from support.required_programs import require
from thrave.bundle.errors import ContentError
from thrave.bundle.tar_reader import MAX_MAP_EXTENTS, image_runs

KIB, MIB = 1024, 1024 * 1024
SECTOR = b"s" * 512
VERSION = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}


@pytest.fixture
def disk(tmp_path):
    """A file with holes and with more extents than fit into one block of the map."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 * MIB + 1000)
        for number in range(100):
            file.seek(number * 128 * KIB)
            file.write(bytes([1 + number]) * 8 * KIB)
        file.seek(16 * MIB + 900)
        file.write(b"end" * 33)
    return path


def create_archive(*command, cwd):
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("detection", ["seek", "raw"])
@pytest.mark.parametrize("piece_size", [100, 512, MIB])
def test_archive_of_gnu_tar_is_read(disk, detection, piece_size):
    data = create_archive("tar", "-cS", "--format=posix", f"--hole-detection={detection}", "disk", cwd=disk.parent)
    assert b"GNU.sparse.major=1" in data
    assert read_tar(data, disk.stat().st_size, piece_size) == disk.read_bytes()


def test_archive_of_bsdtar_is_read(disk):
    program = require("bsdtar", package="libarchive-tools")
    data = create_archive(program, "-c", "--format=pax", "-f", "-", "disk", cwd=disk.parent)
    assert b"GNU.sparse.major=1" in data
    assert read_tar(data, disk.stat().st_size) == disk.read_bytes()


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
@pytest.mark.parametrize("name", ["disk", "disk" * 60])
def test_each_sparse_version_of_gnu_tar_is_read_as_by_bsdtar(disk, tmp_path, version, name):
    disk.rename(tmp_path / name)
    options = ("--format=posix", f"--sparse-version={version}", "--hole-detection=raw")
    data = create_archive("tar", "-cS", *options, name, cwd=tmp_path)
    assert f"GNU.sparse.{'major=1' if version == '1.0' else 'size'}".encode() in data
    image = read_tar(data, (tmp_path / name).stat().st_size, 1000)
    program = require("bsdtar", package="libarchive-tools")
    assert image == subprocess.run([program, "-xOf", "-"], input=data, stdout=subprocess.PIPE, check=True).stdout


def sparse(size, numbers, data=b"", **records):
    """Return a tar stream of one sparse member with this map (PAX 1.0) and data."""
    all_records = {**VERSION, "GNU.sparse.realsize": str(size), **records}
    text = numbers if isinstance(numbers, bytes) else b"".join(b"%d\n" % number for number in numbers)
    lines = b"".join(record(key, value) for key, value in all_records.items() if value is not None)
    header = tar_of(lines, type=b"x")[: 512 + len(lines) + -len(lines) % 512]
    return header + tar_of(text + bytes(-len(text) % 512) + data)


def record(key, value):
    rest = f" {key}={value}\n".encode()
    for digits in range(1, 9):
        line = str(len(rest) + digits).encode() + rest
        if len(line) == len(rest) + digits:
            return line
    raise AssertionError


def test_sparse_map_is_read():
    image = read_tar(sparse(4096, [2, 512, 512, 4096, 0], SECTOR), 4096)
    assert image == bytes(512) + SECTOR + bytes(3072)


def test_archive_without_data_is_a_hole():
    assert list(image_runs([sparse(1 << 59, [0])], 1 << 59)) == []


@pytest.mark.parametrize(
    "numbers",
    [
        [2, 512, 512, 0, 512],
        [2, 0, 1024, 512, 512],
        [1, 0, 8192],
        [1, 8192, 512],
        [2, 0, 100, 1024, 412],
        [1, 0, 1024],
        [0],
        [MAX_MAP_EXTENTS + 1],
        [10**17],
        b"-1\n",
        b"1\n0\nz\n",
        b"\n",
        b"9" * 30 + b"\n",
        b"9" * 600,
        b"",
    ],
    ids=[
        "descending", "overlapping", "too-long", "beyond-the-end", "odd-in-the-middle", "more-than-stored",
        "less-than-stored", "too-many", "far-too-many", "negative", "no-digits", "empty", "absurd", "endless", "none",
    ],
)  # fmt: skip
def test_wrong_sparse_map_is_rejected_before_any_data(numbers):
    with pytest.raises(ContentError, match="map"):
        next(image_runs([sparse(4096, numbers, SECTOR)], 4096))


def test_truncated_sparse_map_is_rejected():
    data = sparse(4096, [200, *range(400)])
    with pytest.raises(ContentError):
        read_tar(data[: 3 * 512 + 512], 4096)


def test_memory_of_sparse_map_is_limited():
    numbers = [100_000, *(number for i in range(100_000) for number in (1024 * i, 512))]
    data = sparse(1 << 30, numbers)
    tracemalloc.start()
    try:
        with pytest.raises(ContentError, match="map has"):
            list(image_runs([data], 1 << 30))
        assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    finally:
        tracemalloc.stop()


def sparse_with_map_in_header(lines, data=SECTOR):
    """Return a tar stream of one sparse member whose map is in its PAX header (PAX 0.0 and 0.1)."""
    text = b"".join(record(key, value) for key, value in lines)
    return tar_of(text, type=b"x")[: 512 + len(text) + -len(text) % 512] + tar_of(data)


SIZE, OFFSET, BYTES = ("GNU.sparse.size", 4096), "GNU.sparse.offset", "GNU.sparse.numbytes"
TEXT = "GNU.sparse.map"


@pytest.mark.parametrize(
    "lines",
    [
        [SIZE, (OFFSET, 512), (BYTES, 512), (OFFSET, 4096), (BYTES, 0)],
        [SIZE, ("GNU.sparse.numblocks", 1), (OFFSET, 512), (BYTES, 512)],
        [SIZE, (TEXT, "512,512,4096,0")],
        [("GNU.sparse.major", 0), ("GNU.sparse.minor", 1), SIZE, (TEXT, "512,512")],
    ],
)
def test_sparse_map_in_pax_header_is_read(lines):
    assert read_tar(sparse_with_map_in_header(lines), 4096) == bytes(512) + SECTOR + bytes(3072)


@pytest.mark.parametrize(
    "lines",
    [
        [(TEXT, "512,512")],
        [SIZE],
        [SIZE, (OFFSET, 512)],
        [SIZE, (BYTES, 512)],
        [SIZE, (OFFSET, 512), (OFFSET, 512), (BYTES, 512)],
        [SIZE, (OFFSET, "9" * 5000), (BYTES, 512)],
        [SIZE, (TEXT, "512")],
        [SIZE, (TEXT, "512,x")],
        [SIZE, (TEXT, "9" * 5000 + ",1")],
        [SIZE, (TEXT, "512,,512")],
        [SIZE, (TEXT, "0,256,256,256")],
        [SIZE, (TEXT, ",".join(["512,0"] * 17) + ",512,512")],
        [SIZE, (TEXT, "512,512"), (TEXT, "1024,512")],
        [SIZE, ("GNU.sparse.numblocks", 2), (TEXT, "512,512")],
        [SIZE, ("GNU.sparse.major", 2), ("GNU.sparse.minor", 0), (TEXT, "512,512")],
        [("GNU.sparse.size", "1" * 5000), (TEXT, "512,512")],
        [*[(f"comment{i}", i) for i in range(1001)], SIZE, (TEXT, "512,512")],
    ],
)  # fmt: skip
def test_wrong_sparse_map_in_pax_header_is_rejected(lines):
    with pytest.raises(ContentError, match=r"PAX|map"):
        next(image_runs([sparse_with_map_in_header(lines)], 4096))


def test_second_pax_header_of_a_member_is_rejected():
    member = sparse_with_map_in_header([SIZE, (TEXT, "512,512")])
    with pytest.raises(ContentError, match="second PAX header"):
        next(image_runs([member[:1024], member], 4096))


@pytest.mark.parametrize("length", ["0" * 4400 + "10", "0000000010", "99999999999", "9" * 4500, "x", ""])
def test_pax_record_with_invalid_length_is_rejected(length):
    text = f"{length} size=5\n".encode()
    header = tar_of(text, type=b"x")[: 512 + len(text) + -len(text) % 512]
    with pytest.raises(ContentError, match="PAX header"):
        next(image_runs([header, tar_of(SECTOR)], 512))


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.realsize": None},
        {"GNU.sparse.realsize": "x"},
        {"GNU.sparse.minor": "1"},
        {"GNU.sparse.major": None},
        {"GNU.sparse.major": "2"},
    ],
)
def test_pax_records_without_required_fields_are_rejected(records):
    with pytest.raises(ContentError, match="PAX"):
        read_tar(sparse(4096, [1, 0, 512], SECTOR, **records), 4096)


def test_size_that_differs_from_manifest_is_rejected_before_any_data():
    with pytest.raises(ContentError, match="the manifest states"):
        next(image_runs([sparse(4096, [1, 0, 512], SECTOR)], 8192))
