"""What need not be written: zeros in whole grains, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.bundles.sample_bundles import MemoryImage, bundle_of, private_key
from thrave.bundle.image_output import GRAIN, skip_zeros
from thrave.bundle.opener import open_bundle
from thrave.bundle.tar_reader import ImageRun

KIB = 1024


def stretches(*runs):
    return [(offset, bytes(data)) for offset, data in skip_zeros(ImageRun(o, memoryview(d)) for o, d in runs)]


@pytest.mark.parametrize(
    ("runs", "left"),
    [
        ([(0, bytes(3 * GRAIN))], []),
        ([(0, b"x" * 3 * GRAIN)], [(0, b"x" * 3 * GRAIN)]),
        ([(0, bytes(GRAIN) + b"x" * GRAIN + bytes(GRAIN))], [(GRAIN, b"x" * GRAIN)]),
        ([(0, b"x" * GRAIN + bytes(GRAIN) + b"x")], [(0, b"x" * GRAIN), (2 * GRAIN, b"x")]),
        ([(0, bytes(GRAIN - 1) + b"x")], [(0, bytes(GRAIN - 1) + b"x")]),
        ([(GRAIN - 512, bytes(512) + b"x" * GRAIN + bytes(512))], [(GRAIN, b"x" * GRAIN)]),
        ([(512, bytes(600) + b"x")], [(512, bytes(600) + b"x")]),
        ([(0, b"x"), (GRAIN, bytes(GRAIN)), (5 * GRAIN, b"y")], [(0, b"x"), (5 * GRAIN, b"y")]),
    ],
    ids=["zeros", "none", "around", "between", "one-byte", "grains-are-the-images", "part-of-a-grain", "runs"],
)
def test_zero_blocks_are_left_out(runs, left):
    assert stretches(*runs) == left


@given(
    st.lists(st.tuples(st.integers(0, 3 * GRAIN), st.integers(0, 2 * GRAIN), st.booleans()), max_size=6),
    st.integers(0, GRAIN),
)
def test_remaining_extents_read_the_same(pieces, first):
    data = b"".join(bytes(zeros) + (b"\1" if one else b"") + b"x" * count for zeros, count, one in pieces)
    image = bytearray(len(data))
    last = 0
    for offset, left in stretches((first, data)):
        assert offset >= last
        image[offset - first : offset - first + len(left)] = left
        last = offset + len(left)
    assert image == data


def test_written_zeros_are_holes_in_the_opened_image(tmp_path):
    data = bytes(200 * KIB) + b"\1" + bytes(300 * KIB)
    bundle = bundle_of(MemoryImage(data))
    open_bundle(bundle.manifest, bundle, private_key("user"), tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == data
    assert (tmp_path / "image").stat().st_blocks * 512 <= 64 * KIB
