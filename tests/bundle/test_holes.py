"""`skip_zeros` leaves out aligned grains of zeros, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.bundles.sample_bundles import MemoryImage, bundle_of, private_key
from thrave.bundle.image_output import GRAIN, skip_zeros
from thrave.bundle.opener import open_bundle
from thrave.bundle.tar_reader import ImageRun

KIB = 1024


def nonzero_runs(*runs):
    return [(offset, bytes(data)) for offset, data in skip_zeros(ImageRun(o, memoryview(d)) for o, d in runs)]


@pytest.mark.parametrize(
    ("runs", "expected"),
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
    ids=["zeros", "none", "around", "between", "one-byte", "aligned-to-image", "part-of-a-grain", "runs"],
)
def test_skip_zeros_leaves_out_grains_of_zeros(runs, expected):
    assert nonzero_runs(*runs) == expected


@given(
    st.lists(st.tuples(st.integers(0, 3 * GRAIN), st.integers(0, 2 * GRAIN), st.booleans()), max_size=6),
    st.integers(0, GRAIN),
)
def test_skip_zeros_keeps_content(pieces, first):
    data = b"".join(bytes(zeros) + (b"\1" if has_one else b"") + b"x" * count for zeros, count, has_one in pieces)
    image = bytearray(len(data))
    end = 0
    for offset, run in nonzero_runs((first, data)):
        assert offset >= end
        image[offset - first : offset - first + len(run)] = run
        end = offset + len(run)
    assert image == data


def test_opened_image_has_holes_for_zeros(tmp_path):
    data = bytes(200 * KIB) + b"\1" + bytes(300 * KIB)
    bundle = bundle_of(MemoryImage(data))
    open_bundle(bundle.manifest, bundle, private_key("user"), tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == data
    assert (tmp_path / "image").stat().st_blocks * 512 <= 64 * KIB
