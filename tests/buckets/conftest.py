"""The drivers that the contract of buckets is checked against."""

import pytest

from support.buckets import bucket_drivers

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
    where = tmp_path / "buckets" if server is None else request.getfixturevalue(server)
    return getattr(bucket_drivers, driver)(where)
