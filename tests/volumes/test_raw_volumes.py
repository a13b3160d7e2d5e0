"""Raw volumes: extents, other types of files, files that change, I/O errors."""

import os
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrave.volumes.base import Extent, merge_extents
from thrave.volumes.errors import VolumeChangedError, VolumeUnreadableError
from thrave.volumes.formats import open_volume
from thrave.volumes.raw import RawVolume

PAGE = 4096


@pytest.mark.parametrize("kind", ["folder", "fifo", "character device", "dangling link"])
def test_open_volume_rejects_other_file_types_at_once(tmp_path, kind):
    path = tmp_path / "thing"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "character device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to("nowhere")
    with pytest.raises(VolumeUnreadableError, match="thing"):
        RawVolume(path)


def test_file_that_shrinks_while_read_raises_error(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 10000)
    with suppress(VolumeChangedError), open_volume(path, "raw") as volume:
        os.truncate(path, 6000)
        with pytest.raises(VolumeUnreadableError, match=r"disk\.raw at byte 6000: the file ends here"):
            volume.read_into(5000, memoryview(bytearray(2000)))


def test_io_error_names_file_and_offset():
    with open_volume("/proc/self/mem", "raw") as volume:  # nothing is mapped at 0, so the kernel returns EIO
        with pytest.raises(VolumeUnreadableError, match="/proc/self/mem at byte 0: Input/output error") as caught:
            volume.read_into(0, memoryview(bytearray(16)))
        assert caught.value.offset == 0


def test_last_extent_ends_with_the_file(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 5000)
    with open_volume(path, "raw") as volume:
        assert volume.extents() == [Extent(0, 5000)]


def test_empty_file_is_an_empty_disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.touch()
    with open_volume(path, "raw") as volume:
        assert (volume.size, volume.extents()) == (0, [])


@settings(max_examples=40, deadline=None)
@given(pages=st.lists(st.booleans(), min_size=1, max_size=40), tail=st.integers(0, PAGE - 1))
def test_extents_are_the_written_pages(tmp_path_factory, pages, tail):
    path = tmp_path_factory.mktemp("pages") / "disk.raw"
    with path.open("wb") as file:
        for number, written in enumerate(pages):
            if written:
                os.pwrite(file.fileno(), b"x" * PAGE, number * PAGE)
        file.truncate(len(pages) * PAGE + tail)
    with open_volume(path, "raw") as volume:
        assert volume.extents() == merge_extents([(i * PAGE, PAGE) for i, written in enumerate(pages) if written])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_joined_extents_cover_the_same_bytes_and_never_touch(steps):
    runs, end = [], 0
    for gap, length in steps:
        runs.append((end + gap, length))
        end += gap + length
    extents = merge_extents(runs)
    assert {byte for offset, length in extents for byte in range(offset, offset + length)} == {
        byte for offset, length in runs for byte in range(offset, offset + length)
    }
    assert all(a.offset + a.length < b.offset for a, b in pairwise(extents))
