"""The host loses its power at each step that an overlay takes: service, libvirtd and guests are gone at once.

One task meets all of it, each time right where it has come to, so that every loss is met by what an earlier one has
left. The service is killed by itself at the step, and everything else a moment later.
"""

import pytest

from support.drive import OFF
from support.killing import moments
from support.libvirt_service import LibvirtService

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]
STEPS = ("overlay noted", "root volume frozen", "instance started", "overlay merged")
MERGING = "overlay merged, before"


def test_a_guest_and_its_bundle_outlast_a_power_loss_at_each_step_of_an_overlay(libvirtd, guest, tmp_path):
    service = LibvirtService(tmp_path, libvirtd, downtime="overlay")
    web = service.domain("web", guest, told={"EVERY": 0.5}).start()
    definition, files = web.definition(), web.files()
    written, bundle = {}, None
    try:
        boot = web.await_boot()
        for moment in moments(*STEPS):
            service.start(crash_at=moment)
            bundle = bundle or service.bundle(web)
            service.await_death()
            if moment == MERGING:
                overlaid = web.await_boot(after=[boot])
                written[overlaid] = web.await_written(overlaid)
            libvirtd.lose_power()
            libvirtd.power_on()
        service.start()
        assert bundle.completed().drive().words(boot)[-1] == OFF
        assert bundle.drive().is_clean()
        assert bundle.drive().words(overlaid) == []
        again = web.await_boot(after=[boot, overlaid])
        web.await_written(again)
        assert (web.definition(), web.files()) == (definition, files)
        words = web.look().words(overlaid)
        assert words == [str(number + 1) for number in range(len(words))]
        assert len(words) >= written[overlaid]
    finally:
        service.stop()
        web.remove()
