"""Guests that ignore a shutdown request, or react late, or have an agent, through the whole service."""

import pytest

from support.libvirt.guest_disk import OFF
from support.libvirt.libvirt_service import LibvirtService

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]
LATE = 8  # seconds; the first shutdown request is certainly lost


@pytest.fixture
def service(libvirtd, tmp_path):
    """A service that each test starts with its own settings."""
    service = LibvirtService(tmp_path, libvirtd)
    yield service
    service.stop()


def guest_of(service, guest, name, **parameters):
    return service.domain(name, guest, parameters={"EVERY": 0.5, **parameters}).start()


def test_guest_that_ignores_shutdown_stays_up_or_loses_power_by_setting(service, guest):
    stuck = guest_of(service, guest, "stuck", DEAF=1)
    service.start(shutdown_timeout=3, shutdown_timeout_action="fail")
    try:
        boot = stuck.await_boot()
        assert service.bundle(stuck).failure() == (
            "Server.InstanceNotStopped",
            "The guest did not power off within 3 seconds.",
        )
        written = stuck.await_written(boot)
        service.stop()
        service.start(shutdown_timeout_action="power-off")
        cut = service.bundle(stuck).completed()
        assert "its power was cut, and what it had not written is lost" in cut.warning()
        assert "it is marked as dirty" in cut.warning()
        assert stuck.runs()
        drive = cut.drive()
        assert not drive.is_clean()
        words = drive.words(boot)
        assert words == [str(number + 1) for number in range(len(words))]
        assert len(words) >= written
        service.stop()
        service.start(unclean_volume="refuse")
        assert service.bundle(stuck).failure()[0] == "Server.VolumeError"
        assert stuck.runs()
        assert "SHUTDOWN-ASKED" not in stuck.output
    finally:
        stuck.remove()


def test_shutdown_request_is_repeated_until_guest_has_booted(service, guest):
    service.start()
    late = guest_of(service, guest, "late", HEARS_AFTER=LATE)
    try:
        bundle = service.bundle(late).completed()
        *numbers, last = bundle.drive().words(late.boots[0])
        assert last == OFF
        assert numbers
        assert late.runs()
    finally:
        late.remove()


def test_agent_shuts_down_and_runs_sysprep(service, guest):
    sysprep = ["/bin/sysprep", "/generalize", "/oobe", "/shutdown"]
    clerk = guest_of(service, guest, "clerk", DEAF=1, AGENT=1)
    service.start()
    try:
        boot = clerk.await_boot()
        drive = service.bundle(clerk).completed().drive()
        assert drive.words(boot)[-1] == OFF
        assert "SHUTDOWN-ASKED -h -P +0" in clerk.output  # as the agent calls it; a button has no arguments
        service.stop()
        service.start(sysprep_command=sysprep)
        again = clerk.await_boot(after=[boot])
        drive = service.bundle(clerk).completed().drive()
        assert drive.read("sysprep.txt") == f"{again} sysprep {' '.join(sysprep[1:])}\n"
        assert (drive.words(again)[-1], drive.is_clean()) == (OFF, True)
        assert clerk.runs()
    finally:
        clerk.remove()
