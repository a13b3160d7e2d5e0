"""Chunks deflated by themselves make one gzip member, with whatever library a machine has."""

import gzip
import subprocess
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.bundles.sample_bundles import MemoryImage, bundle_of, private_key
from thrave.bundle.gzip_stream import (
    COMPRESSIONS,
    FAST,
    GZIP_HEADER,
    SMALL,
    STDLIB,
    deflate,
    gzip_trailer,
    max_gzip_size,
)
from thrave.bundle.opener import open_bundle

LIBRARIES = {"isal": FAST, "zlib-ng": SMALL, "zlib": STDLIB}
KINDS = {
    "zeros": bytes,
    "text": lambda size: (b"the same words again " * (size // 20 + 1))[:size],
    "noise": lambda size: Random(size).randbytes(size),
}


def member(chunks, library):
    crc = 0
    for chunk in chunks:
        crc = library.crc32(memoryview(chunk), crc)
    packed = b"".join(deflate(memoryview(chunk), library) for chunk in chunks)
    return GZIP_HEADER + packed + gzip_trailer(crc, sum(map(len, chunks)))


@pytest.mark.parametrize("name", LIBRARIES)
@settings(max_examples=30, deadline=None)
@given(runs=st.lists(st.tuples(st.sampled_from([*KINDS]), st.integers(1, 200_000)), min_size=1, max_size=5))
def test_chunks_of_any_content_make_one_member_within_its_size_limit(name, runs):
    chunks = [KINDS[kind](size) for kind, size in runs]
    made = member(chunks, LIBRARIES[name])
    assert gzip.decompress(made) == b"".join(chunks)
    assert len(made) <= sum(max_gzip_size(len(chunk)) for chunk in chunks)


@pytest.mark.parametrize("name", LIBRARIES)
def test_gunzip_accepts_the_stream_without_warning(name):
    made = member([kind(100_000) for kind in KINDS.values()], LIBRARIES[name])
    checked = subprocess.run(["gunzip", "--test"], input=made, capture_output=True, check=True)
    assert checked.stderr == b""


def test_standard_library_replaces_missing_wheel(monkeypatch, tmp_path):
    monkeypatch.setitem(COMPRESSIONS, "fast", STDLIB)
    image = MemoryImage(b"".join(kind(2_000_000) for kind in KINDS.values()))
    bundle = bundle_of(image)
    opened = open_bundle(bundle.manifest, bundle, private_key("user"), tmp_path / "image")
    assert opened.output.read_bytes() == image.data


def test_compression_small_is_smaller():
    text = b"".join(Random(i).choice([b"key", b"value", b"other"]) + str(i).encode() for i in range(50_000))
    sizes = {name: len(deflate(memoryview(text), COMPRESSIONS[name])) for name in COMPRESSIONS}
    assert sizes["small"] < sizes["fast"]
