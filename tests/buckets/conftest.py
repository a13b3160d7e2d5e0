"""The drivers that the contract of buckets is checked against."""

import pytest

from thrave.buckets.directory import DirectoryBuckets


def _directory(tmp_path):
    return DirectoryBuckets(tmp_path / "buckets")


DRIVERS = {"directory": _directory}


@pytest.fixture(params=DRIVERS.values(), ids=DRIVERS.keys())
def buckets(request, tmp_path):
    """An empty store of each driver."""
    return request.param(tmp_path)
