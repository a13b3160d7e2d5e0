"""The host loses its power at each step of an overlay: service, libvirtd and guests end at once.

One task meets all power losses, so each loss happens in the state that the earlier one has left. The service kills
itself at the step, and everything else is killed right after that.
"""

import pytest

from support.crashes.kill_sweep import failpoints_of
from support.libvirt.guest_disk import OFF
from support.libvirt.libvirt_service import LibvirtService

pytestmark = [pytest.mark.libvirt, pytest.mark.sweep]
MERGING = "overlay-merged, before"
MOMENTS = [
    *failpoints_of("overlay-recorded", "overlay-created", "instance-started"),
    "part-stored, after, 3",
    *failpoints_of("overlay-merged"),
]


def test_guest_and_bundle_survive_power_loss_at_each_overlay_step(libvirtd, guest, tmp_path):
    service = LibvirtService(tmp_path, libvirtd, capture_mode="overlay")
    web = service.domain("web", guest, parameters={"EVERY": 0.5}).start()
    definition, files = web.definition(), web.files()
    bundle = None
    try:
        first = web.await_boot()
        known = web.boots
        for moment in MOMENTS:
            service.start(failpoint=moment)
            bundle = bundle or service.bundle(web)
            service.await_crash()
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
    """Check that C: has every line that a boot has confirmed as written, also if it ran on an overlay."""
    written = {boot: domain.written(boot) for boot in domain.boots}  # read first: the guest keeps writing
    drive = domain.read_disk()
    assert len(written) > 2
    for boot, least in written.items():
        numbers = [word for word in drive.words(boot) if word != OFF]
        assert numbers == [str(number + 1) for number in range(len(numbers))]
        assert len(numbers) >= least
