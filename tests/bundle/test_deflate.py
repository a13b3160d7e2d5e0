"""Separately compressed chunks form one gzip member, with each compression library."""

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
CONTENTS = {
    "zeros": bytes,
    "text": lambda size: (b"the same words again " * (size // 20 + 1))[:size],
    "noise": lambda size: Random(size).randbytes(size),
}


def member(chunks, library):
    crc = 0
    for chunk in chunks:
        crc = library.crc32(memoryview(chunk), crc)
    deflated = b"".join(deflate(memoryview(chunk), library) for chunk in chunks)
    return GZIP_HEADER + deflated + gzip_trailer(crc, sum(map(len, chunks)))


@pytest.mark.parametrize("name", LIBRARIES)
@settings(max_examples=30, deadline=None)
@given(runs=st.lists(st.tuples(st.sampled_from([*CONTENTS]), st.integers(1, 200_000)), min_size=1, max_size=5))
def test_deflate_forms_one_member_within_size_limit(name, runs):
    chunks = [CONTENTS[content](size) for content, size in runs]
    data = member(chunks, LIBRARIES[name])
    assert gzip.decompress(data) == b"".join(chunks)
    assert len(data) <= sum(max_gzip_size(len(chunk)) for chunk in chunks)


@pytest.mark.parametrize("name", LIBRARIES)
def test_gunzip_accepts_stream_without_warning(name):
    data = member([content(100_000) for content in CONTENTS.values()], LIBRARIES[name])
    result = subprocess.run(["gunzip", "--test"], input=data, capture_output=True, check=True)
    assert result.stderr == b""


def test_stdlib_codec_seals_bundle(monkeypatch, tmp_path):
    monkeypatch.setitem(COMPRESSIONS, "fast", STDLIB)
    image = MemoryImage(b"".join(content(2_000_000) for content in CONTENTS.values()))
    bundle = bundle_of(image)
    opened = open_bundle(bundle.manifest, bundle, private_key("user"), tmp_path / "image")
    assert opened.output.read_bytes() == image.data


def test_compression_small_makes_smaller_output():
    text = b"".join(Random(i).choice([b"key", b"value", b"other"]) + str(i).encode() for i in range(50_000))
    sizes = {name: len(deflate(memoryview(text), COMPRESSIONS[name])) for name in COMPRESSIONS}
    assert sizes["small"] < sizes["fast"]
