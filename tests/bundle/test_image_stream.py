"""Opening to a pipe writes the complete image, or a part of it and fails. No byte of an unverified part is written."""

import dataclasses
import os
import threading
import zlib
from random import Random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from support.bundles.bundle_damage import PART_DAMAGES
from support.bundles.sample_bundles import BUNDLE_KEY, MemoryImage, bundle_of, certificate, private_key
from thrave.bundle.errors import BundleError, ContentError, OutputError, PartDamagedError, PartMissingError
from thrave.bundle.image_output import image_stream
from thrave.bundle.opener import open_bundle_to

PART = 4096
HEADER = 512  # bytes of the tar header of a member without holes
KIB = 1024
DATA = Random(7).randbytes(20_000) + bytes(480)


@pytest.fixture(scope="module")
def bundle():
    bundle = bundle_of(MemoryImage(DATA), part_size=PART)
    assert len(bundle.parts) > 4
    return bundle


class Pipe:
    """A pipe that a thread reads to its end."""

    def __enter__(self):
        reading, self.end = os.pipe()
        self._reader = os.fdopen(reading, "rb")
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self):
        with self._reader:
            self.content = self._reader.read()

    def __exit__(self, *_):
        os.close(self.end)
        self._thread.join()

    def make_image(self, size):
        return image_stream(self.end, size)


def open_to_pipe(bundle, **trust):
    """Open a bundle to a pipe; return the bytes written and the error, or None."""
    with Pipe() as pipe:
        error = None
        try:
            open_bundle_to(pipe.make_image, bundle.manifest, bundle, private_key("user"), **trust)
        except BundleError as caught:
            error = caught
    return pipe.content, error


def open_to_pipe_with_all_checks(bundle):
    return open_to_pipe(bundle, certificate=certificate("user"), side_file=bundle.side_file)


def verified_bytes(bundle, count):
    """Return how many bytes of the image the first `count` parts have; `count` is less than all parts."""
    decryptor = Cipher(algorithms.AES(BUNDLE_KEY.key), modes.CBC(BUNDLE_KEY.iv)).decryptor()
    plain = decryptor.update(b"".join(list(bundle.parts.values())[:count]))
    return max(0, len(zlib.decompressobj(31).decompress(plain)) - HEADER)


@pytest.mark.parametrize(
    ("size", "spans"),
    [
        (1 << 20, [(0, 1 << 20)]),
        (3 << 20, []),
        (3 << 20, [(1 << 20, 4096)]),
        (2 << 20, [(0, 4096), (1 << 20, 64 * KIB)]),
        ((2 << 20) + 100, [(4096, 8192), (2 << 20, 100)]),
    ],
    ids=["dense", "all-hole", "holes-around", "hole-last", "odd-end"],
)
def test_stream_has_complete_image_with_zeros_for_holes(size, spans):
    content = bytearray(size)
    for offset, length in spans:
        content[offset : offset + length] = Random(offset).randbytes(length)
    assert open_to_pipe_with_all_checks(bundle_of(MemoryImage(bytes(content), spans))) == (content, None)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("damage", [*PART_DAMAGES, "missing"])
def test_stream_ends_before_damaged_part(bundle, index, damage):
    name = list(bundle.parts)[index]
    parts = dict(bundle.parts)
    if damage == "missing":
        del parts[name]
    else:
        parts[name] = PART_DAMAGES[damage](parts[name])
    content, error = open_to_pipe_with_all_checks(dataclasses.replace(bundle, parts=parts))
    assert isinstance(error, PartMissingError if damage == "missing" else PartDamagedError)
    assert DATA.startswith(content)
    assert len(content) <= verified_bytes(bundle, index)


def test_stream_has_most_data_before_damaged_part():
    data = Random(8).randbytes(8 << 20)
    bundle = bundle_of(MemoryImage(data), part_size=1 << 20)
    name = list(bundle.parts)[-1]
    content, error = open_to_pipe_with_all_checks(dataclasses.replace(bundle, parts={**bundle.parts, name: b""}))
    assert isinstance(error, PartDamagedError)
    assert data.startswith(content)
    assert len(content) >= 5 << 20


@pytest.mark.parametrize("hole_at_the_end", [False, True])
def test_stream_is_incomplete_if_last_check_fails(hole_at_the_end):
    data = Random(9).randbytes(3 << 20)
    image = MemoryImage(data + bytes(1 << 20), [(0, 3 << 20)]) if hole_at_the_end else MemoryImage(data)
    bundle = bundle_of(image)
    forged = bundle.manifest.replace(bundle.sealed.digest.encode(), b"0" * 40)
    content, error = open_to_pipe(dataclasses.replace(bundle, manifest=forged))
    assert isinstance(error, ContentError)
    assert "SHA-1 of the tar" in str(error)
    assert 0 < len(content) < 3 << 20
    assert data.startswith(content)


def test_wrong_signature_writes_nothing(bundle):
    forged = bundle.manifest.replace(b"x86_64", b"x86_65")
    content, error = open_to_pipe(dataclasses.replace(bundle, manifest=forged), certificate=certificate("user"))
    assert (content, type(error).__name__) == (b"", "SignatureError")


def test_closed_pipe_raises_output_error(bundle):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with pytest.raises(OutputError, match="Broken pipe"):
            open_bundle_to(
                lambda size: image_stream(writing, size), bundle.manifest, bundle, private_key("user")
            )  # fmt: skip
    finally:
        os.close(writing)
