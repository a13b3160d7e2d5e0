"""Readers return data or raise a `BundleError` for any input; no other exception."""

import gzip
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from support.bundles.sample_bundles import BUNDLE_KEY, MemoryImage, bundle_of
from thrave.bundle.errors import BundleError
from thrave.bundle.gzip_stream import inflate
from thrave.bundle.manifest import read_manifest
from thrave.bundle.opener import decrypt
from thrave.bundle.side_file import read_side_file
from thrave.bundle.tar_reader import image_runs
from thrave.bundle.tar_writer import TarMember

BUNDLE = bundle_of(MemoryImage(b"data" * 1024, [(0, 512), (1024, 512)]))
SPARSE = b"".join(TarMember("disk", 1 << 20, [(1024 * i, 512) for i in range(30)]).header()) + bytes(512 * 32)
GZIP = gzip.compress(bytes(range(256)) * 100)
WORDS = [
    b"<image>",
    b"</image>",
    b"<a>",
    b"&amp;",
    b"&#0;",
    b"]]>",
    b"<!--",
    b"0",
    b"-1",
    b"9" * 30,
    b"\0",
    b"\xff",
    b"",
]


@st.composite
def mutations(draw, original, words=(b"",)):
    """Generate copies of the original with one to four ranges replaced by bytes, words or pieces of the original."""
    data = original
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 300)))
        source = draw(st.integers(0, len(original)))
        pieces = st.one_of(st.binary(max_size=20), st.sampled_from([*words]), st.just(original[source : source + 200]))
        data = data[:start] + draw(pieces) + data[end:]
    return data


def consume(items):
    for _ in items:
        pass


@settings(max_examples=300, deadline=None)
@given(mutations(BUNDLE.manifest, WORDS))
def test_read_manifest_raises_only_bundle_errors(xml):
    with suppress(BundleError):
        manifest = read_manifest(xml)
        assert [part.index for part in manifest.parts] == list(range(len(manifest.parts)))


@settings(max_examples=300, deadline=None)
@given(mutations(BUNDLE.side_file, [b'"', b"{", b"[", b"null", b"1e999", b"-0", b'"size": 1']))
def test_read_side_file_raises_only_bundle_errors(data):
    with suppress(BundleError):
        read_side_file(data)


@settings(max_examples=300, deadline=None)
@given(mutations(SPARSE), st.integers(1, 2000))
def test_image_runs_raises_only_bundle_errors(data, piece_size):
    end = 0
    with suppress(BundleError):
        for offset, run in image_runs((data[i : i + piece_size] for i in range(0, len(data), piece_size)), 1 << 20):
            assert end <= offset
            end = offset + len(run)
            assert end <= 1 << 20


@settings(max_examples=300, deadline=None)
@given(mutations(GZIP), st.integers(1, 2000))
def test_inflate_raises_only_bundle_errors(data, piece_size):
    with suppress(BundleError):
        consume(inflate(memoryview(data)[i : i + piece_size] for i in range(0, len(data), piece_size)))


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_decrypt_raises_only_bundle_errors(parts):
    with suppress(BundleError):
        consume(decrypt(parts, BUNDLE_KEY))
