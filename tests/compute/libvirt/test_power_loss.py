"""The host loses its power at each step that an overlay takes: service, libvirtd and guests are gone at once.

One task meets all of it, each time right where it has come to, so that every loss is met by what an earlier one has
left. The service is killed by itself at the step, and everything else a moment later.
"""

import pytest

from support.crashes.kill_sweep import failpoints_of
from support.libvirt.guest_disk import OFF
from support.libvirt.libvirt_service import LibvirtService

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]
MERGING = "overlay-merged, before"
MOMENTS = [
    *failpoints_of("overlay-recorded", "overlay-created", "instance-started"),
    "part-stored, after, 3",
    *failpoints_of("overlay-merged"),
]


def test_guest_and_bundle_survive_power_loss_at_each_overlay_step(libvirtd, guest, tmp_path):
    service = LibvirtService(tmp_path, libvirtd, capture_mode="overlay")
    web = service.domain("web", guest, told={"EVERY": 0.5}).start()
    definition, files = web.definition(), web.files()
    bundle = None
    try:
        first = web.await_boot()
        known = web.boots
        for moment in MOMENTS:
            service.start(failpoint=moment)
            bundle = bundle or service.bundle(web)
            service.await_death()
            if moment == MERGING:
                web.await_written(web.await_boot(after=known))
            libvirtd.lose_power()
            known = web.boots
            libvirtd.power_on()
        service.start()
        drive = bundle.completed().drive()
        assert drive.words(first)[-1] == OFF
        assert drive.is_clean()
        assert [drive.words(boot) for boot in known[1:]] == [[] for _ in known[1:]]
        web.await_written(web.await_boot(after=known))
        assert (web.definition(), web.files()) == (definition, files)
        check_that_nothing_written_is_lost(web)
    finally:
        service.stop()
        web.remove()


def check_that_nothing_written_is_lost(domain):
    """What each boot has seen to be on its disk is there, whatever it ran on and however it has ended."""
    written = {boot: domain.written(boot) for boot in domain.boots}  # it goes on writing after the look
    drive = domain.look()
    assert len(written) > 2
    for boot, least in written.items():
        numbers = [word for word in drive.words(boot) if word != OFF]
        assert numbers == [str(number + 1) for number in range(len(numbers))]
        assert len(numbers) >= least
