"""Fixtures for pytest, which loads this module if Thrave is installed. Imports nothing until a test uses a fixture.

`thrave_service` is one service for all tests of a session. Every other fixture that begins with `thrave_` except
`thrave_server` belongs to the account of one test. The marker `thrave_fault(name, …)` injects a fault into the service
for one test; the [table of faults](test-faults.md) has the names.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from thrave.compute.instance import Instance
    from thrave.testing import ServiceAccount, ServiceClock, ThraveServer, ThraveService

_FAULT = "thrave_fault"
_OTHER_SETTINGS = (
    "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT",
)  # fmt: skip
"""Variables that would send requests elsewhere, or with other credentials."""
_START = datetime(2026, 1, 1, tzinfo=UTC)  # upload policies made after this moment have not expired


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", f"{_FAULT}(name, **options): inject a fault into thrave_service (docs/reference/test-faults.md)"
    )


@pytest.fixture
def thrave_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ThraveServer]:
    """`thrave serve` on a free port with its own data directory; stopped after the test. The test can restart it."""
    from thrave.testing import ThraveServer  # noqa: PLC0415 (every pytest run on this machine loads this module)

    if request.node.get_closest_marker(_FAULT) is not None:
        pytest.fail(
            f"The marker {_FAULT} has no effect on thrave_server. Use thrave_ec2 or thrave_account.", pytrace=False
        )
    with ThraveServer.running(tmp_path / "thrave") as server:
        yield server


@pytest.fixture(scope="session")
def thrave_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThraveService]:
    """One service for all tests of the session; with pytest-xdist, for those of one worker."""
    from thrave.testing import ThraveService  # noqa: PLC0415 (see thrave_server)

    with ThraveService.running(tmp_path_factory.mktemp("thrave")) as service:
        yield service


@pytest.fixture
def thrave_account(
    request: pytest.FixtureRequest, thrave_service: ThraveService, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServiceAccount]:
    """A new account for one test.

    Its credentials and the URLs of the service are in the environment, so clients that the code under test creates
    use the service. After the test its tasks, instances and buckets are removed.
    """
    account = thrave_service.new_account()
    for name in _OTHER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(thrave_service.data.root / "no-file"))
    for name, value in account.environment().items():
        monkeypatch.setenv(name, value)
    if "boto3" in sys.modules:  # its default session keeps the credentials of its first use
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    try:
        for marker in reversed([*request.node.iter_markers(_FAULT)]):
            thrave_service.inject(*marker.args, **marker.kwargs)
        yield account
    finally:
        account.close()


@pytest.fixture
def thrave_ec2(thrave_account: ServiceAccount) -> Any:  # noqa: ANN401 (boto3 ships no types)
    """boto3's client for EC2 in the account of the test."""
    return thrave_account.client("ec2")


@pytest.fixture
def thrave_s3(thrave_account: ServiceAccount) -> Any:  # noqa: ANN401 (boto3 ships no types)
    """boto3's client for S3 in the account of the test."""
    return thrave_account.client("s3")


@pytest.fixture
def thrave_instance(thrave_account: ServiceAccount) -> Instance:
    """A running Windows instance in the account of the test, with a disk of 4 MiB."""
    return thrave_account.instance()


@pytest.fixture
def thrave_clock(thrave_account: ServiceAccount) -> ServiceClock:
    """The clock of the service. It stands at 2026-01-01 00:00 UTC, and a task changes its state only by `advance`."""
    from thrave.testing import ServiceClock  # noqa: PLC0415 (see thrave_server)

    clock = ServiceClock(thrave_account.service)
    clock.set(_START)
    clock.hold()
    return clock
