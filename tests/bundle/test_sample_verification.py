"""`verify_sample` reads some parts, checks the size of all, and reports how many parts it read."""

import pytest

from support.bundles.sample_bundles import MemoryImage, bundle_of, certificate
from thrave.bundle.errors import ManifestError, PartDamagedError, PartMissingError
from thrave.bundle.manifest import read_manifest
from thrave.bundle.verifier import CheckSubject, Sample, Trust, verify_manifest, verify_sample

NO_TRUST = Trust()


class RecordingParts:
    """The parts of a bundle; records which parts are read."""

    def __init__(self, bundle):
        self.parts = dict(bundle.parts)
        self.names_read = []

    def size(self, filename):
        if filename not in self.parts:
            raise PartMissingError(filename, "removed by the test")
        return len(self.parts[filename])

    def read(self, filename):
        self.names_read.append(filename)
        return self.parts[filename]


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(MemoryImage(bytes(range(256)) * 4000), part_size=64)


@pytest.fixture
def parts(bundle):
    return RecordingParts(bundle)


def verify(bundle, parts, sample, trust=NO_TRUST, **options):
    return verify_sample(
        verify_manifest(bundle.manifest, bundle.side_file, trust), parts, sample, read_ahead=3, **options
    )


def test_sample_reads_requested_share_of_parts(bundle, parts):
    count = len(bundle.parts)
    assert count > 40
    progress = []
    verify(bundle, parts, Sample(10, seed=1), on_progress=progress.append)
    assert len(parts.names_read) == -(-count // 10)
    assert progress[-1] == sum(len(parts.parts[name]) for name in parts.names_read)


def test_sample_depends_on_seed(bundle):
    manifest = read_manifest(bundle.manifest)
    first = Sample(20, seed=1).choose(manifest)
    assert first == Sample(20, seed=1).choose(manifest)
    assert first != Sample(20, seed=2).choose(manifest)


@pytest.mark.parametrize(("percent", "count"), [(0.0001, 1), (100, None)])
def test_sample_has_at_least_one_and_at_most_all_parts(bundle, parts, percent, count):
    verify(bundle, parts, Sample(percent, seed=1))
    assert len(parts.names_read) == (count or len(bundle.parts))


def test_report_states_which_checks_were_not_made(bundle, parts):
    report = verify(bundle, parts, Sample(5, seed=7), trust=Trust(certificate("user")))
    checks = {check.subject: check for check in report.checks}
    count, sampled = len(bundle.parts), len(parts.names_read)
    assert {subject for subject, check in checks.items() if not check.checked} == {
        CheckSubject.PART_DIGESTS, CheckSubject.IMAGE_DIGEST, CheckSubject.IMAGE_SIZE,
    }  # fmt: skip
    assert checks[CheckSubject.PART_DIGESTS].detail == (
        f"{sampled} of {count} parts are correct (sample with seed 7); {count - sampled} were not read"
    )


def test_sample_of_all_parts_is_a_full_verification(bundle, parts):
    report = verify(bundle, parts, Sample(100, seed=1))
    assert {check.subject: check.checked for check in report.checks}[CheckSubject.PART_DIGESTS]


def test_damaged_part_in_sample_is_detected(bundle, parts):
    sample = Sample(5, seed=1)
    name = sample.choose(read_manifest(bundle.manifest))[0].filename
    parts.parts[name] = parts.parts[name][:-1] + b"x"
    with pytest.raises(PartDamagedError, match=name):
        verify(bundle, parts, sample)


def test_missing_part_outside_sample_is_detected(bundle, parts):
    sampled = {part.filename for part in Sample(5, seed=1).choose(read_manifest(bundle.manifest))}
    parts.parts.pop(next(name for name in bundle.parts if name not in sampled))
    with pytest.raises(PartMissingError):
        verify(bundle, parts, Sample(5, seed=1))


def test_part_of_wrong_size_outside_sample_is_detected(bundle, parts):
    sampled = {part.filename for part in Sample(5, seed=1).choose(read_manifest(bundle.manifest))}
    shorter, longer = [name for name in bundle.parts if name not in sampled][:2]
    parts.parts[shorter] = parts.parts[shorter][1:]
    with pytest.raises(ManifestError, match="bytes together"):
        verify(bundle, parts, Sample(5, seed=1))
    parts.parts[longer] += b"x"
    with pytest.raises(PartDamagedError, match="size"):
        verify(bundle, parts, Sample(5, seed=1))
