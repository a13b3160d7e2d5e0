"""An image that is sealed and opened again has the same bytes and about the same holes."""

import tempfile
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from support.bundles.sample_bundles import MemoryImage, bundle_of, certificate, private_key
from thrave.bundle.opener import open_bundle

BLOCK = 4096


@st.composite
def images(draw):
    """Generate images of up to 1 MiB with holes and three kinds of data; the size may be odd."""
    runs = draw(
        st.lists(st.tuples(st.sampled_from(["hole", "zeros", "text", "noise"]), st.integers(1, 12)), max_size=20)
    )
    content, spans = b"", []
    for number, (kind, blocks) in enumerate(runs):
        length = blocks * BLOCK
        if kind != "hole":
            spans.append((len(content), length))
        noise = Random(number).randbytes(length)
        content += {"noise": noise, "text": b"text" * (length // 4)}.get(kind, bytes(length))
    tail_size = draw(st.integers(1, BLOCK))
    spans.append((len(content), tail_size))
    return MemoryImage(content + b"\x01" * tail_size, spans)


@settings(max_examples=60, deadline=None)
@given(
    image=images(),
    part_size=st.sampled_from([16, 160, 4096, 65536, 1 << 20]),
    compression=st.sampled_from(["fast", "small"]),
    reader=st.sampled_from(["user", "cloud"]),
)
def test_opened_bundle_equals_the_image(image, part_size, compression, reader):
    bundle = bundle_of(image, part_size=max(part_size, image.size // 400 // 16 * 16), compression=compression)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_bundle(
            bundle.manifest, bundle, private_key(reader), Path(folder) / "image",
            certificate=certificate("user"), side_file=bundle.side_file,
        )  # fmt: skip
        assert opened.output.read_bytes() == image.data
        assert all(check.checked for check in opened.checks)
        assert opened.output.stat().st_blocks * 512 <= sum(length for _, length in image.spans) + 2 * BLOCK
