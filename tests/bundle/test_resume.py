"""A sealing that was interrupted after any part resumes with the same bytes, or raises ResumeError."""

import json
import random
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.bundles.sample_bundles import BUNDLE_KEY, MemoryImage
from thrave.bundle.errors import ResumeError
from thrave.bundle.gzip_stream import CHUNK
from thrave.bundle.model import Checkpoint, ResumePoint
from thrave.bundle.sealer import Sealer


def mixed_content(size, seed=1):
    source = random.Random(seed)
    runs = (source.randbytes(40000) if source.random() < 0.5 else b"text " * 8000 for _ in range(size // 40000 + 1))
    return b"".join(runs)[:size]


IMAGE = mixed_content(5 * CHUNK + 4567)


def new_sealer(content=IMAGE, part_size=64 * 1024, **options):
    return Sealer(MemoryImage(content), "image", bundle_key=BUNDLE_KEY, part_size=part_size, **options)


def resume_point_after(parts, count):
    checkpoint = next(part.checkpoint for part in reversed(parts[:count]) if part.checkpoint)
    stored_checkpoint = Checkpoint.from_json(json.loads(json.dumps(checkpoint.to_json())))
    return ResumePoint(stored_checkpoint, tuple(part.record for part in parts[: stored_checkpoint.parts]))


@given(count=st.integers(1, 10_000), part_size=st.sampled_from([4096, 65536, CHUNK]))
@settings(max_examples=25, deadline=None)
def test_resumed_parts_equal_those_of_an_uninterrupted_run(count, part_size):
    uninterrupted = new_sealer(part_size=part_size)
    parts = list(uninterrupted.parts())
    resume_point = resume_point_after(parts, min(count, len(parts) - 1))
    resumed = new_sealer(part_size=part_size, resume_point=resume_point)
    rest = list(resumed.parts())
    assert [bytes(part.data) for part in rest] == [bytes(part.data) for part in parts[resume_point.checkpoint.parts :]]
    assert resumed.sealed == uninterrupted.sealed


def test_sealer_can_be_interrupted_repeatedly():
    uninterrupted = new_sealer()
    parts = list(uninterrupted.parts())
    stored_parts, resume_point = [], None
    while True:
        run = new_sealer(resume_point=resume_point)
        stream = run.parts()
        new_parts = [part for part, _ in zip(stream, range(9), strict=False)]
        stream.close()
        stored_parts += new_parts
        if len(stored_parts) == len(parts):
            break
        resume_point = resume_point_after(stored_parts, len(stored_parts))
        stored_parts = stored_parts[: resume_point.checkpoint.parts]
    assert [bytes(part.data) for part in stored_parts] == [bytes(part.data) for part in parts]


def test_checkpoint_is_small_and_has_no_key():
    for part in new_sealer().parts():
        if part.checkpoint:
            stored_checkpoint = json.dumps(part.checkpoint.to_json())
            assert len(stored_checkpoint) < 500
            assert BUNDLE_KEY.key.hex() not in stored_checkpoint


@pytest.mark.parametrize("offset", [0, CHUNK // 2, 2 * CHUNK])
def test_resume_refuses_changed_disk(offset):
    parts = list(new_sealer().parts())
    resume_point = resume_point_after(parts, len(parts) * 3 // 4)
    assert offset < resume_point.checkpoint.chunk.offset
    changed = bytearray(IMAGE)
    changed[offset] ^= 1
    with pytest.raises(ResumeError, match="changed"):
        list(new_sealer(bytes(changed), resume_point=resume_point).parts())


def test_resume_refuses_disk_changed_after_the_first_crash():
    """After a resumed run, the known SHA-1 covers only the stream of the first run. The CRC-32 covers the rest."""
    parts = list(new_sealer().parts())
    second = list(new_sealer(resume_point=resume_point_after(parts, 8)).parts())
    checkpoint = [part.checkpoint for part in second if part.checkpoint][-1]
    assert checkpoint.chunk.hashed_size < checkpoint.chunk.offset
    changed = bytearray(IMAGE)
    changed[checkpoint.chunk.hashed_size + CHUNK] ^= 1
    resume_point = ResumePoint(checkpoint, tuple(part.record for part in parts[: checkpoint.parts]))
    with pytest.raises(ResumeError, match="changed"):
        list(new_sealer(bytes(changed), resume_point=resume_point).parts())


def test_resume_refuses_moved_holes():
    def with_data_at(offset, **options):
        image = MemoryImage(IMAGE[: 4 * CHUNK], [(offset, 2 * CHUNK)])
        return Sealer(image, "image", bundle_key=BUNDLE_KEY, part_size=4096, **options)

    parts = list(with_data_at(0).parts())
    with pytest.raises(ResumeError):
        list(with_data_at(CHUNK, resume_point=resume_point_after(parts, len(parts) - 2)).parts())


def test_resume_refuses_other_compression_before_encryption():
    parts = list(new_sealer().parts())
    with pytest.raises(ResumeError, match="other bytes"):
        next(new_sealer(compression="small", resume_point=resume_point_after(parts, 8)).parts())


def test_resume_refuses_forged_checkpoint():
    parts = list(new_sealer().parts())
    resume_point = resume_point_after(parts, 8)
    forged = replace(resume_point.checkpoint, skipped="0" * 64)
    with pytest.raises(ResumeError):
        list(new_sealer(resume_point=replace(resume_point, checkpoint=forged)).parts())


def test_refused_resume_leaves_no_thread():
    parts = list(new_sealer().parts())
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(ResumeError):
            list(new_sealer(b"\1" + IMAGE[1:], resume_point=resume_point_after(parts, len(parts) - 1)).parts())
    assert threading.active_count() == before
