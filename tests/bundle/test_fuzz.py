"""Whatever a stranger writes, a reader answers with one of our errors or with data: never with anything else."""

import gzip
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from support.bundles.sample_bundles import SECRETS, MemoryImage, bundle_of
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
    """The original with a few stretches replaced by others: bytes, words, or pieces of itself."""
    data = original
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 300)))
        own = draw(st.integers(0, len(original)))
        pieces = st.one_of(st.binary(max_size=20), st.sampled_from([*words]), st.just(original[own : own + 200]))
        data = data[:start] + draw(pieces) + data[end:]
    return data


def exhaust(items):
    for _ in items:
        pass


@settings(max_examples=300, deadline=None)
@given(mutations(BUNDLE.manifest, WORDS))
def test_any_manifest_raises_only_our_errors(xml):
    with suppress(BundleError):
        manifest = read_manifest(xml)
        assert [part.index for part in manifest.parts] == list(range(len(manifest.parts)))


@settings(max_examples=300, deadline=None)
@given(mutations(BUNDLE.side_file, [b'"', b"{", b"[", b"null", b"1e999", b"-0", b'"size": 1']))
def test_any_side_file_raises_only_our_errors(data):
    with suppress(BundleError):
        read_side_file(data)


@settings(max_examples=300, deadline=None)
@given(mutations(SPARSE), st.integers(1, 2000))
def test_any_tar_stream_raises_only_our_errors(data, bite):
    end = 0
    with suppress(BundleError):
        for offset, run in image_runs((data[i : i + bite] for i in range(0, len(data), bite)), 1 << 20):
            assert end <= offset
            end = offset + len(run)
            assert end <= 1 << 20


@settings(max_examples=300, deadline=None)
@given(mutations(GZIP), st.integers(1, 2000))
def test_any_gzip_stream_raises_only_our_errors(data, bite):
    with suppress(BundleError):
        exhaust(inflate(memoryview(data)[i : i + bite] for i in range(0, len(data), bite)))


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_any_ciphertext_raises_only_our_errors(parts):
    with suppress(BundleError):
        exhaust(decrypt(parts, SECRETS))
