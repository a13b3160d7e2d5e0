"""Sparse members in PAX's format, as GNU tar and bsdtar write them, and as a stranger might."""

import subprocess
import tracemalloc

import pytest

from support.components import require
from support.tars import read_tar, tar_of
from thrave.bundle.errors import ContentError
from thrave.bundle.untar import MOST_EXTENTS, image_runs

KIB, MIB = 1024, 1024 * 1024
SECTOR = b"s" * 512
VERSION = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}


@pytest.fixture
def disk(tmp_path):
    """A file of holes and data, more extents than a block of the map holds."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 * MIB + 1000)
        for number in range(100):
            file.seek(number * 128 * KIB)
            file.write(bytes([1 + number]) * 8 * KIB)
        file.seek(16 * MIB + 900)
        file.write(b"end" * 33)
    return path


def archived(*command, cwd):
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("detection", ["seek", "raw"])
@pytest.mark.parametrize("bite", [100, 512, MIB])
def test_what_gnu_tar_writes_is_read(disk, detection, bite):
    data = archived("tar", "-cS", "--format=posix", f"--hole-detection={detection}", "disk", cwd=disk.parent)
    assert b"GNU.sparse.major=1" in data
    assert read_tar(data, disk.stat().st_size, bite) == disk.read_bytes()


def test_what_bsdtar_writes_is_read(disk):
    program = require("bsdtar", package="libarchive-tools")
    data = archived(program, "-c", "--format=pax", "-f", "-", "disk", cwd=disk.parent)
    assert b"GNU.sparse.major=1" in data
    assert read_tar(data, disk.stat().st_size) == disk.read_bytes()


@pytest.mark.parametrize("version", ["0.0", "0.1"])
def test_older_versions_are_refused_by_name(disk, version):
    data = archived("tar", "-cS", "--format=posix", f"--sparse-version={version}", "disk", cwd=disk.parent)
    with pytest.raises(ContentError, match="another version"):
        read_tar(data, disk.stat().st_size)


def sparse(size, numbers, data=b"", **records):
    """A member with this map and this data."""
    said = {**VERSION, "GNU.sparse.realsize": str(size), **records}
    text = numbers if isinstance(numbers, bytes) else b"".join(b"%d\n" % number for number in numbers)
    lines = b"".join(record(key, value) for key, value in said.items() if value is not None)
    header = tar_of(lines, type=b"x")[: 512 + len(lines) + -len(lines) % 512]
    return header + tar_of(text + bytes(-len(text) % 512) + data)


def record(key, value):
    rest = f" {key}={value}\n".encode()
    for digits in (1, 2, 3):
        line = str(len(rest) + digits).encode() + rest
        if len(line) == len(rest) + digits:
            return line
    raise AssertionError


def test_one_made_by_hand_is_read():
    image = read_tar(sparse(4096, [2, 512, 512, 4096, 0], SECTOR), 4096)
    assert image == bytes(512) + SECTOR + bytes(3072)


def test_one_without_data_is_a_hole():
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
        [MOST_EXTENTS + 1],
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
        "less-than-stored", "too-many", "far-too-many", "negative", "no-number", "empty", "absurd", "endless", "none",
    ],
)  # fmt: skip
def test_a_map_that_is_wrong_is_refused_before_any_data(numbers):
    with pytest.raises(ContentError, match="map"):
        next(image_runs([sparse(4096, numbers, SECTOR)], 4096))


def test_a_map_that_ends_early_is_refused():
    data = sparse(4096, [200, *range(400)])
    with pytest.raises(ContentError):
        read_tar(data[: 3 * 512 + 512], 4096)


def test_a_map_of_many_extents_costs_no_more_than_they_do():
    numbers = [100_000, *(number for i in range(100_000) for number in (1024 * i, 0))]
    data = sparse(1 << 30, numbers)
    tracemalloc.start()
    try:
        assert list(image_runs([data], 1 << 30)) == []
        assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    finally:
        tracemalloc.stop()


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
def test_records_that_do_not_say_what_is_needed_are_refused(records):
    with pytest.raises(ContentError, match="PAX"):
        read_tar(sparse(4096, [1, 0, 512], SECTOR, **records), 4096)


def test_another_size_than_the_manifests_is_refused_before_any_data():
    with pytest.raises(ContentError, match="the manifest says"):
        next(image_runs([sparse(4096, [1, 0, 512], SECTOR)], 8192))
