"""The drivers that the contract of buckets is checked against, each store started once."""

import pytest

from support import buckets, stores


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory):
    with stores.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(scope="session")
def rgw(tmp_path_factory):
    with stores.ceph_rgw(tmp_path_factory.mktemp("rgw")) as store:
        yield store


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
    return getattr(buckets, driver)(where)
