"""`Sealer`: sizes and names of parts, progress, cancellation, and errors of every stage."""

import gc
import hashlib
import threading
import time
from pathlib import Path
from random import Random

import pytest

from support.bundles.sample_bundles import BUNDLE_KEY, MemoryImage, PatternImage, bundle_of, private_key, seal
from thrave.bundle.errors import ImageError, NamingError
from thrave.bundle.gzip_stream import CHUNK, max_gzip_size
from thrave.bundle.model import BundleKey, manifest_filename, part_filename, part_width, side_filename, validate_prefix
from thrave.bundle.opener import open_bundle
from thrave.bundle.sealer import Sealer
from thrave.bundle.tar_writer import data_extents
from thrave.pipeline import StoppedError

MIB = 1024 * 1024
TIB = 1024**4
NOISE = Random(7).randbytes(4 * MIB)


def part_sizes(parts):
    return [part.size for part in parts]


def ciphertext_size(image):
    return sum(part_sizes(seal(image)[0]))


@pytest.mark.parametrize("size", [512, 513, 4096, CHUNK - 1536, CHUNK - 1024, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_image_of_any_size_opens_to_the_same_bytes(size, tmp_path):
    bundle = bundle_of(MemoryImage(NOISE[:size]))
    opened = open_bundle(bundle.manifest, bundle, private_key("user"), tmp_path / "image")
    assert opened.output.read_bytes() == NOISE[:size]


@pytest.mark.parametrize("parts", [1, 2, 3, 10])
@pytest.mark.parametrize("surplus", [-16, 0, 16])
def test_all_parts_but_the_last_are_full_and_none_is_empty(parts, surplus):
    """The ciphertext is one block shorter than, equal to, or one block longer than a number of parts."""
    image = MemoryImage(NOISE[:40960])
    total = ciphertext_size(image)
    part_size = (total - surplus) // parts // 16 * 16
    lengths = part_sizes(seal(image, part_size=part_size)[0])
    assert sum(lengths) == total
    assert set(lengths[:-1]) <= {part_size}
    assert 0 < lengths[-1] <= part_size


def test_ciphertext_of_exactly_one_part_is_one_part():
    image = MemoryImage(NOISE[:40960])
    total = ciphertext_size(image)
    assert part_sizes(seal(image, part_size=total)[0]) == [total]


def test_part_size_does_not_change_the_ciphertext():
    image = MemoryImage(NOISE[:300_000])
    expected = b"".join(part.data for part in seal(image)[0])
    for part_size in (16, 4096, 65536, 299_008):
        assert b"".join(part.data for part in seal(image, part_size=part_size)[0]) == expected


def test_number_of_threads_does_not_change_the_result():
    image = MemoryImage(NOISE)
    streams = {b"".join(part.data for part in seal(image, workers=workers)[0]) for workers in (1, 2, 5)}
    assert len(streams) == 1


def test_records_describe_parts():
    parts, sealed = seal(MemoryImage(NOISE[:100_000]), part_size=16384)
    assert sealed.parts == tuple(part.record for part in parts)
    assert [part.sha1 for part in parts] == [hashlib.sha1(part.data).hexdigest() for part in parts]
    assert [part.sha256 for part in parts] == [hashlib.sha256(part.data).hexdigest() for part in parts]
    assert (sealed.size, sealed.bundled_size) == (100_000, sum(part_sizes(parts)))
    assert [part.index for part in parts] == list(range(len(parts)))


def test_part_keeps_its_bytes_while_later_parts_are_sealed():
    sealer = Sealer(MemoryImage(NOISE), "disk", part_size=65536)
    parts = [(part.data, part.sha1) for part in sealer.parts()]
    assert all(hashlib.sha1(data).hexdigest() == sha1 for data, sha1 in parts)


@pytest.mark.parametrize(("parts", "width"), [(1, 1), (9, 1), (10, 2), (11, 2), (99, 2), (100, 3), (1025, 4)])
def test_part_numbers_are_padded_as_by_ec2_ami_tools(parts, width):
    assert part_width(parts * 10, 10) == width


def test_part_names_sort_in_order_for_any_compression_ratio():
    compressible, _ = seal(PatternImage(MIB, [(0, MIB)]), part_size=64)
    incompressible, _ = seal(MemoryImage(NOISE[:MIB]), part_size=64)
    names = [part.filename for part in incompressible]
    assert sorted(names) == names
    assert [part.filename for part in compressible] == names[: len(compressible)]


@pytest.mark.parametrize("compression", ["fast", "small"])
def test_stream_size_is_within_limit_for_incompressible_data(compression):
    image = MemoryImage(NOISE)
    parts, _ = seal(image, compression=compression)
    assert sum(part_sizes(parts)) <= max_gzip_size(len(NOISE) + 10240) + 16
    assert sum(part_sizes(parts)) < len(NOISE) * 1.0002 + 10240


def test_empty_disk_of_terabytes_takes_a_few_hundred_bytes():
    parts, sealed = seal(PatternImage(2 * TIB, []))
    assert (len(parts), sealed.size) == (1, 2 * TIB)
    assert sealed.bundled_size < 1024


def test_too_many_extents_are_merged_across_the_smallest_holes():
    spans = [(i * 4096, 512) for i in range(40)] + [(100 * MIB, 512)]
    merged = data_extents(PatternImage(101 * MIB, spans), max_extents=10)
    assert len(merged) <= 10
    assert merged[-1][0] == 100 * MIB
    assert all(any(start <= at < start + length for start, length in merged) for at, _ in spans)


def test_extents_are_aligned_to_sectors_within_the_image():
    image = PatternImage(10_000, [(0, 1), (600, 400), (1024, 1), (4000, 200), (9999, 1)])
    assert data_extents(image) == [(0, 1536), (3584, 1024), (9728, 272)]


@pytest.mark.parametrize("image", [PatternImage(0, []), PatternImage(-1, [])])
def test_empty_image_is_rejected(image):
    with pytest.raises(ImageError, match="empty"):
        Sealer(image, "disk")


@pytest.mark.parametrize(
    "spans", [[(0, 2048)], [(512, 512), (0, 512)], [(0, 512), (256, 512)], [(-512, 512)], [(0, 0)], [(0, -1)]]
)
def test_invalid_extents_are_rejected(spans):
    with pytest.raises(ImageError, match="extent"):
        Sealer(PatternImage(1024, spans), "disk")


@pytest.mark.parametrize("part_size", [0, -16, 1, 17, 1000])
def test_part_size_must_be_a_multiple_of_the_cipher_block(part_size):
    with pytest.raises(ValueError, match="16"):
        Sealer(PatternImage(1024, []), "disk", part_size=part_size)


@pytest.mark.parametrize(
    "prefix", ["", "a/b", "../a", ".a", " a", "ä", "a&b", "a<b", "a'b", 'a"b', "a\0b", "a\n", "x" * 300]
)
def test_invalid_prefix_is_rejected(prefix):
    with pytest.raises(NamingError):
        Sealer(PatternImage(1024, []), prefix)


def test_longest_prefix_leaves_space_for_every_file_name():
    longest = max(length for length in range(1, 256) if is_valid_prefix("x" * length))
    assert len(side_filename("x" * longest)) == 255
    assert len(manifest_filename("x" * longest)) <= 255
    assert len(part_filename("x" * longest, 9_999_999, 7)) <= 255


def is_valid_prefix(prefix):
    try:
        return bool(validate_prefix(prefix))
    except NamingError:
        return False


def test_bundle_key_is_random_and_not_in_repr():
    first, second = BundleKey.generate(), BundleKey.generate()
    assert first != second
    parts, sealed = seal(PatternImage(1024, []))
    text = repr((BUNDLE_KEY, sealed, parts))
    assert BUNDLE_KEY.key.hex() not in text
    assert repr(BUNDLE_KEY.key) not in text


def test_progress_grows_from_zero_to_one():
    sealer = Sealer(MemoryImage(NOISE * 3), "disk", part_size=65536)
    values = [sealer.progress]
    values += [sealer.progress for _ in sealer.parts()]
    values.append(sealer.progress)
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0, 1)
    assert len(set(values)) > 3


def test_sealed_record_is_unavailable_before_last_part():
    sealer = Sealer(MemoryImage(NOISE), "disk", part_size=65536)
    parts = sealer.parts()
    next(parts)
    with pytest.raises(RuntimeError, match="not sealed"):
        _ = sealer.sealed
    parts.close()


def bundle_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bundle-")]


def open_file_count():
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("parts_taken", [0, 1, 5])
def test_close_stops_every_thread_and_closes_files(parts_taken):
    files_before = open_file_count()
    for _ in range(20):
        parts = Sealer(MemoryImage(NOISE), "disk", part_size=65536).parts()
        for _ in range(parts_taken):
            next(parts)
        parts.close()
        assert bundle_threads() == []
    assert open_file_count() == files_before


def test_garbage_collection_of_parts_stops_threads():
    parts = Sealer(MemoryImage(NOISE), "disk", part_size=65536).parts()
    next(parts)
    del parts
    gc.collect()
    assert bundle_threads() == []


def test_cancel_from_other_thread_wakes_consumer():
    reading, resume = threading.Event(), threading.Event()

    def wait(_):
        reading.set()
        resume.wait(10)

    sealer = Sealer(MemoryImage(NOISE, on_read=wait), "disk")

    def cancel():
        reading.wait(10)
        sealer.cancel()
        resume.set()

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(StoppedError):
        next(sealer.parts())
    other.join()
    assert bundle_threads() == []


class DiskError(Exception):
    pass


@pytest.mark.parametrize("at", [0, MIB, 3 * MIB])
def test_disk_error_is_raised_to_consumer(at):
    def fail(offset):
        if offset >= at:
            raise DiskError(offset)

    with pytest.raises(DiskError):
        list(Sealer(MemoryImage(NOISE, on_read=fail), "disk", part_size=65536).parts())
    assert bundle_threads() == []


@pytest.mark.parametrize("stage", ["deflate", "PartCutter.add"])
def test_error_of_any_stage_is_raised_to_consumer(stage, monkeypatch):
    def fail(*_):
        raise DiskError(stage)

    monkeypatch.setattr(f"thrave.bundle.sealer.{stage}", fail)
    with pytest.raises(DiskError, match=stage):
        list(Sealer(MemoryImage(NOISE), "disk").parts())
    assert bundle_threads() == []


def test_read_ahead_is_limited_with_slow_consumer():
    """The read-ahead is limited, so memory does not depend on the size of the image."""
    read = []
    parts = Sealer(MemoryImage(bytes(64 * MIB), on_read=read.append), "disk", workers=1, part_size=16).parts()
    next(parts)
    time.sleep(0.2)
    assert len(read) < 20
    parts.close()
