"""The contract of volumes, on every driver: the same disk in each format, compared with its raw content."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.disks.qemu_images import converted, passphrase_file_of
from thrave.volumes.errors import UnknownFormatError, VolumeUnreadableError
from thrave.volumes.formats import FORMATS, open_volume

ROUNDED_UP = {"vpc"}  # counts in cylinders, so the disk is a little larger than its content
NO_HOLES = {"vhdx", "luks"}  # QEMU 7.2 reports no holes for vhdx; LUKS encrypts zeros too


@pytest.fixture
def image(raw, image_format):
    return raw if image_format == "raw" else converted(raw, image_format)


@pytest.fixture
def volume(image, image_format):
    with open_volume(image, image_format, secret_file=passphrase_file_of(image, image_format)) as opened:
        yield opened


def read(volume, offset, length):
    buffer = bytearray(length)
    volume.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_size_is_that_of_the_disk(volume, raw, image_format):
    if image_format in ROUNDED_UP:
        assert raw.stat().st_size <= volume.size < raw.stat().st_size + (1 << 20)
    else:
        assert volume.size == raw.stat().st_size


def test_read_into_returns_every_byte_of_the_disk(volume, raw):
    content = raw.read_bytes()
    assert read(volume, 0, volume.size) == content.ljust(volume.size, b"\0")


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (511, 2), (65535, 65538), ((8 << 20) - 1, 1), (5 << 20, 3 << 20), (12345, 0)]
)
def test_read_into_reads_any_range(volume, raw, offset, length):
    assert read(volume, offset, length) == raw.read_bytes()[offset : offset + length]


def test_extents_are_sorted_separate_and_within_the_disk(volume):
    end = -1
    for offset, length in volume.extents():
        assert offset > end
        assert length > 0
        end = offset + length
    assert 0 < end <= volume.size


def test_bytes_outside_extents_are_zero(volume, raw):
    remaining = bytearray(raw.read_bytes())
    for offset, length in volume.extents():
        remaining[offset : offset + length] = bytes(len(remaining[offset : offset + length]))
    assert not any(remaining)


def test_extents_exclude_the_holes_of_the_format(volume, image_format):
    data = sum(extent.length for extent in volume.extents())
    assert data == volume.size if image_format in NO_HOLES else data < volume.size


def test_extents_can_be_read_again(volume):
    assert list(volume.extents()) == list(volume.extents())


def test_read_into_works_from_several_threads(volume, raw):
    content = raw.read_bytes()
    offsets = range(0, len(content), 1 << 18)
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda offset: read(volume, offset, 1 << 18), offsets))
    assert b"".join(pieces) == content


@pytest.mark.parametrize("beyond", [0, 1, 1 << 30])
def test_read_into_beyond_the_end_names_the_offset(volume, image, beyond):
    with pytest.raises(VolumeUnreadableError) as caught:
        read(volume, volume.size + beyond - 1, 2)
    assert str(image) in str(caught.value)
    assert caught.value.offset in {volume.size + beyond - 1, volume.size + beyond}


def test_read_into_works_after_a_failed_read(volume, raw):
    with pytest.raises(VolumeUnreadableError):
        read(volume, volume.size, 1)
    assert read(volume, 0, 16) == raw.read_bytes()[:16]


def test_close_may_be_repeated(volume):
    volume.close()
    volume.close()


def test_open_volume_names_missing_image(tmp_path, image_format):
    with (
        pytest.raises(VolumeUnreadableError, match=r"nowhere\.img.*No such file"),
        open_volume(tmp_path / "nowhere.img", image_format),
    ):
        pass


def test_empty_disk_has_no_extents(tmp_path, image_format):
    empty = tmp_path / "empty.raw"
    with empty.open("wb") as file:
        file.truncate(1 << 20)
    image = empty if image_format == "raw" else converted(empty, image_format)
    with open_volume(image, image_format, secret_file=passphrase_file_of(image, image_format)) as volume:
        assert read(volume, 0, 1 << 20) == bytes(1 << 20)
        assert not volume.extents() or image_format in NO_HOLES


@pytest.mark.parametrize("name", ["", "vdi", "RAW", "qcow2 ", "nbd", "LUKS"])
def test_open_volume_rejects_unknown_format(raw, name):
    with pytest.raises(UnknownFormatError, match="known are raw, qcow2"), open_volume(raw, name):
        pass


def test_formats_are_listed_with_raw_first():
    assert FORMATS[0] == "raw"
    assert "qcow2" in FORMATS
