"""A sealing that was cut off at any part goes on to the same bytes, or refuses to."""

import json
import random
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrave.bundle.errors import ResumeError
from thrave.bundle.gzip_stream import CHUNK
from thrave.bundle.model import BundleKey, Checkpoint, ResumePoint
from thrave.bundle.sealer import Sealer

SECRETS = BundleKey(b"k" * 16, b"i" * 16)


class MemoryImage:
    def __init__(self, content, extents=None):
        self.content, self.size = content, len(content)
        self._extents = extents or [(0, len(content))]

    def extents(self):
        return self._extents

    def prefetch(self, offset, length):
        pass

    def read_into(self, offset, buffer):
        buffer[:] = self.content[offset : offset + len(buffer)]


def mixed(size, seed=1):
    source = random.Random(seed)
    runs = (source.randbytes(40000) if source.random() < 0.5 else b"text " * 8000 for _ in range(size // 40000 + 1))
    return b"".join(runs)[:size]


IMAGE = mixed(5 * CHUNK + 4567)


def sealing(content=IMAGE, part_size=64 * 1024, **options):
    return Sealer(MemoryImage(content), "image", bundle_key=SECRETS, part_size=part_size, **options)


def cut_off_after(parts, count):
    checkpoint = next(part.checkpoint for part in reversed(parts[:count]) if part.checkpoint)
    kept = Checkpoint.from_json(json.loads(json.dumps(checkpoint.to_json())))
    return ResumePoint(kept, tuple(part.record for part in parts[: kept.parts]))


@given(count=st.integers(1, 10_000), part_size=st.sampled_from([4096, 65536, CHUNK]))
@settings(max_examples=25, deadline=None)
def test_resumed_parts_equal_those_of_an_uninterrupted_run(count, part_size):
    undisturbed = sealing(part_size=part_size)
    parts = list(undisturbed.parts())
    resume_point = cut_off_after(parts, min(count, len(parts) - 1))
    resumed = sealing(part_size=part_size, resume_point=resume_point)
    rest = list(resumed.parts())
    assert [bytes(part.data) for part in rest] == [bytes(part.data) for part in parts[resume_point.checkpoint.parts :]]
    assert resumed.sealed == undisturbed.sealed


def test_sealing_can_be_interrupted_repeatedly():
    undisturbed = sealing()
    parts = list(undisturbed.parts())
    done, resume_point = [], None
    while True:
        turn = sealing(resume_point=resume_point)
        stream = turn.parts()
        taken = [part for part, _ in zip(stream, range(9), strict=False)]
        stream.close()
        done += taken
        if len(done) == len(parts):
            break
        resume_point = cut_off_after(done, len(done))
        done = done[: resume_point.checkpoint.parts]
    assert [bytes(part.data) for part in done] == [bytes(part.data) for part in parts]


def test_checkpoint_is_small_and_has_no_key():
    for part in sealing().parts():
        if part.checkpoint:
            kept = json.dumps(part.checkpoint.to_json())
            assert len(kept) < 500
            assert SECRETS.key.hex() not in kept


@pytest.mark.parametrize("where", [0, CHUNK // 2, 2 * CHUNK])
def test_resume_refuses_changed_disk(where):
    parts = list(sealing().parts())
    resume_point = cut_off_after(parts, len(parts) * 3 // 4)
    assert where < resume_point.checkpoint.chunk.offset
    changed = bytearray(IMAGE)
    changed[where] ^= 1
    with pytest.raises(ResumeError, match="changed"):
        list(sealing(bytes(changed), resume_point=resume_point).parts())


def test_resume_refuses_disk_changed_after_the_first_crash():
    """The second time, the SHA-1 reaches only as far as the first; the CRC-32 covers the rest."""
    parts = list(sealing().parts())
    second = list(sealing(resume_point=cut_off_after(parts, 8)).parts())
    checkpoint = [part.checkpoint for part in second if part.checkpoint][-1]
    assert checkpoint.chunk.hashed_size < checkpoint.chunk.offset
    changed = bytearray(IMAGE)
    changed[checkpoint.chunk.hashed_size + CHUNK] ^= 1
    resume_point = ResumePoint(checkpoint, tuple(part.record for part in parts[: checkpoint.parts]))
    with pytest.raises(ResumeError, match="changed"):
        list(sealing(bytes(changed), resume_point=resume_point).parts())


def test_resume_refuses_moved_holes():
    def with_data_at(offset, **options):
        image = MemoryImage(IMAGE[: 4 * CHUNK], [(offset, 2 * CHUNK)])
        return Sealer(image, "image", bundle_key=SECRETS, part_size=4096, **options)

    parts = list(with_data_at(0).parts())
    with pytest.raises(ResumeError):
        list(with_data_at(CHUNK, resume_point=cut_off_after(parts, len(parts) - 2)).parts())


def test_resume_refuses_other_compression_before_encrypting():
    parts = list(sealing().parts())
    with pytest.raises(ResumeError, match="other bytes"):
        next(sealing(compression="small", resume_point=cut_off_after(parts, 8)).parts())


def test_resume_refuses_forged_checkpoint():
    parts = list(sealing().parts())
    resume_point = cut_off_after(parts, 8)
    forged = replace(resume_point.checkpoint, skipped="0" * 64)
    with pytest.raises(ResumeError):
        list(sealing(resume_point=replace(resume_point, checkpoint=forged)).parts())


def test_refused_resume_leaves_no_thread():
    parts = list(sealing().parts())
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(ResumeError):
            list(sealing(b"\1" + IMAGE[1:], resume_point=cut_off_after(parts, len(parts) - 1)).parts())
    assert threading.active_count() == before
