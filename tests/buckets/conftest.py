"""Stores of every driver, for the tests of the contract."""

import pytest

from support.buckets import bucket_drivers
from support.store_faults.fault_proxy import fault_proxy
from thrave.buckets import retrying_store

DRIVERS = [
    pytest.param(("directory", None), id="directory"),
    pytest.param(("owners", "seaweedfs"), id="seaweedfs-policy", marks=pytest.mark.s3),
    pytest.param(("service", "seaweedfs"), id="seaweedfs-service", marks=pytest.mark.s3),
    pytest.param(("owners", "rgw"), id="rgw-policy", marks=pytest.mark.rgw),
    pytest.param(("service", "rgw"), id="rgw-service", marks=pytest.mark.rgw),
]


@pytest.fixture(params=DRIVERS)
def store(request, tmp_path):
    """An empty store of each driver."""
    driver, server = request.param
    location = tmp_path / "buckets" if server is None else request.getfixturevalue(server)
    return getattr(bucket_drivers, driver)(location)


@pytest.fixture(scope="module")
def proxy(seaweedfs):
    """A proxy before SeaweedFS that can inject faults."""
    with fault_proxy(seaweedfs.url) as proxy:
        yield proxy


@pytest.fixture
def pauses(monkeypatch):
    """Record the waits of retries, in seconds, without waiting; the clock does not advance."""
    slept = []
    monkeypatch.setattr(retrying_store, "sleep", slept.append)
    monkeypatch.setattr(retrying_store, "monotonic", lambda: 1.0)
    return slept
