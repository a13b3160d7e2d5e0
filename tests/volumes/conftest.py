"""Disks for the tests of every driver."""

import pytest

from support.disks.raw_disk import make_disk
from support.required_programs import require_libnbd
from thrave.volumes.formats import QEMU_FORMATS


@pytest.fixture
def raw(tmp_path):
    """A disk of runs of data and holes, with a hole at its end."""
    path = make_disk(tmp_path / "disk.raw", 6 << 20)
    with path.open("r+b") as disk:
        disk.truncate(8 << 20)
    return path


@pytest.fixture(scope="session")
def nbd():
    """Skip the test without libnbd, which every format except raw needs."""
    require_libnbd()


@pytest.fixture(params=["raw", *QEMU_FORMATS])
def image_format(request):
    """Each format; QEMU's formats only if QEMU and libnbd are installed."""
    if request.param != "raw":
        request.getfixturevalue("nbd")
    return request.param
