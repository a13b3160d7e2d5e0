"""Overlays on real QEMU and a real libvirtd, which are killed at any step. No guest is needed."""

from dataclasses import replace
from itertools import count
from xml.etree.ElementTree import canonicalize

import psutil
import pytest

from support.eventually import eventually
from support.libvirt.guestless_domain import GuestlessDomain
from thrave.compute.errors import (
    HoldLostError,
    HypervisorError,
    HypervisorUnavailable,
    IncorrectInstanceState,
    OverlayNotSupported,
    RootVolumeInUse,
)
from thrave.compute.instance import InstanceState
from thrave.compute.libvirt import connection, overlay_files
from thrave.compute.libvirt.driver import LibvirtDriver

pytestmark = pytest.mark.libvirt

ACCOUNT = "123456789012"


@pytest.fixture
def open_driver(libvirtd, tmp_path):
    """Return a function that opens the driver, as each process does."""
    drivers = []

    def open_another():
        drivers.append(LibvirtDriver(libvirtd.uri, lock_folder=tmp_path / "locks"))
        return drivers[-1]

    yield open_another
    for instances in drivers:
        instances.close()


@pytest.fixture
def instances(open_driver):
    return open_driver()


@pytest.fixture
def create_domain(libvirtd, tmp_path, instances):
    """Return a function that creates and adopts domains."""
    created = []

    def make(**details):
        created.append(GuestlessDomain(libvirtd, tmp_path, **details))
        instances.adopt(created[-1].name, account_id=ACCOUNT, platform="windows")
        return created[-1]

    yield make
    for tiny in created:
        tiny.remove()


@pytest.fixture
def tiny(create_domain):
    return create_domain()


def definition(tiny):
    """Return the definition for the next start, without the launch time."""
    text = tiny.host.virsh("dumpxml", "--inactive", "--security-info", tiny.name)
    return canonicalize(text, strip_text=True, exclude_attrs=["launchTime"])


def running_on_overlay(instances, tiny):
    """Attach an overlay, start the instance on it, and write to it."""
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.overlays.attach(tiny.instance_id, overlay)
    instances.start(tiny.instance_id)
    assert tiny.source() == str(overlay.overlay)
    tiny.write(block=1, value=11)
    return overlay


def has_no_overlay_file(tiny, overlay):
    names = {path.name for path in tiny.disk.parent.iterdir()}
    return not [name for name in names if name.startswith(overlay.overlay.name)]


def no_pause(_seconds):
    """Wait no time between two polls."""


def on_call(number, act):
    """Return a pause that calls `act` when it is called for the nth time."""
    calls = count(1)

    def pause(_seconds):
        if next(calls) == number:
            act()

    return pause


def merged(instances, tiny, overlay, pause=no_pause):
    instances.overlays.merge(tiny.instance_id, overlay, pause)
    assert tiny.read(block=1) == {11}
    assert has_no_overlay_file(tiny, overlay)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_instance_runs_on_overlay_and_continues_after_merge(instances, create_domain, image_format):
    tiny = create_domain(image_format=image_format)
    before = definition(tiny)
    overlay = running_on_overlay(instances, tiny)
    content = tiny.disk.read_bytes()
    assert instances.get(tiny.instance_id).root_volume == overlay.volume
    assert instances.overlays.plan(tiny.instance_id) == overlay
    instances.overlays.attach(tiny.instance_id, overlay)
    mode = overlay.overlay.stat()
    assert (mode.st_mode, mode.st_uid) == (tiny.disk.stat().st_mode, tiny.disk.stat().st_uid)
    with instances.overlays.hold_attached(tiny.instance_id, overlay) as hold:
        tiny.write(block=2, value=22)
        hold.check()
        instances.force_stop(tiny.instance_id)
        hold.check()
        instances.start(tiny.instance_id)
        hold.check()
    assert tiny.disk.read_bytes() == content, "the volume that is read does not change"
    domain_id = tiny.host.virsh("domid", tiny.name)
    merged(instances, tiny, overlay)
    assert tiny.read(block=2) == {22}
    assert tiny.host.virsh("domid", tiny.name) == domain_id, "it was not restarted"
    assert tiny.host.virsh("domstate", tiny.name).strip() == "running"
    assert definition(tiny) == before
    assert instances.get(tiny.instance_id).root_volume == overlay.volume
    tiny.write(block=3, value=33)
    assert tiny.read(block=3) == {33}
    instances.overlays.merge(tiny.instance_id, overlay, no_pause)


def test_merge_keeps_backing_file_of_volume(instances, create_domain, tmp_path):
    golden = tmp_path / "golden.raw"
    golden.write_bytes(b"\7" * (8 << 20))
    tiny = create_domain(image_format="qcow2", base=golden)
    before = definition(tiny)
    overlay = running_on_overlay(instances, tiny)
    assert tiny.read(block=1) == {7}
    merged(instances, tiny, overlay)
    assert set(golden.read_bytes()) == {7}
    assert definition(tiny) == before
    instances.force_stop(tiny.instance_id)
    merged(instances, tiny, running_on_overlay(instances, tiny))


def test_merge_of_stopped_instance_uses_files(instances, tiny):
    before = definition(tiny)
    overlay = running_on_overlay(instances, tiny)
    instances.force_stop(tiny.instance_id)
    merged(instances, tiny, overlay)
    assert definition(tiny) == before
    assert instances.state(tiny.instance_id) is InstanceState.STOPPED


def test_merge_of_instance_that_was_never_started(instances, tiny):
    before = definition(tiny)
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.overlays.attach(tiny.instance_id, overlay)
    instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    assert (definition(tiny), has_no_overlay_file(tiny, overlay)) == (before, True)


def test_merge_of_undefined_domain_running_and_removed(instances, create_domain):
    running, gone = create_domain(), create_domain()
    for tiny in (running, gone):
        overlay = running_on_overlay(instances, tiny)
        tiny.host.virsh("undefine", tiny.name)
        if tiny is gone:
            tiny.host.virsh("destroy", tiny.name)
        merged(instances, tiny, overlay)


def test_merge_resumes_after_daemon_was_killed(instances, tiny):
    before = definition(tiny)
    overlay = running_on_overlay(instances, tiny)

    def restart_daemon():
        tiny.host.kill_daemon()
        with pytest.raises(HypervisorUnavailable):
            instances.get(tiny.instance_id)
        tiny.host.start_daemon()

    merged(instances, tiny, overlay, on_call(1, restart_daemon))
    assert definition(tiny) == before
    assert instances.state(tiny.instance_id) is InstanceState.RUNNING


def test_merge_continues_offline_if_guest_is_killed(instances, tiny):
    overlay = running_on_overlay(instances, tiny)
    merged(instances, tiny, overlay, on_call(1, lambda: tiny.host.kill_guest(tiny.name)))
    eventually(lambda: instances.overlays.has_lost_power(tiny.instance_id), details=tiny.host.log)
    instances.start(tiny.instance_id)
    assert tiny.source() == str(tiny.disk)


class PowerLostError(Exception):
    pass


@pytest.mark.parametrize("step", [1, 2])
def test_merge_resumes_after_power_loss(open_driver, instances, tiny, step):
    before = definition(tiny)
    overlay = running_on_overlay(instances, tiny)

    def lose_power():
        tiny.host.lose_power()
        tiny.host.power_on()
        raise PowerLostError

    with pytest.raises(PowerLostError):
        instances.overlays.merge(tiny.instance_id, overlay, on_call(step, lose_power))
    again = open_driver()
    assert again.overlays.has_lost_power(tiny.instance_id)
    again.start(tiny.instance_id)
    tiny.write(block=2, value=22)
    merged(again, tiny, overlay)
    assert tiny.read(block=2) == {22}
    assert definition(tiny) == before


def test_merge_switches_to_volume_after_commit(instances, tiny):
    before = definition(tiny)
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.overlays.attach(tiny.instance_id, overlay)
    tiny.write_off(tiny.disk, "raw", block=1, value=11)  # as a commit would have
    overlay.overlay.rename(f"{overlay.overlay}.merged")
    with pytest.raises(HypervisorError, match="No such file or directory"):
        instances.start(tiny.instance_id)
    merged(instances, tiny, overlay)
    assert definition(tiny) == before


def test_missing_overlay_does_not_count_as_merged(instances, tiny):
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.overlays.attach(tiny.instance_id, overlay)
    overlay.overlay.unlink()
    with pytest.raises(HypervisorError, match="does not exist any more; the data that the guest wrote to it is lost"):
        instances.overlays.merge(tiny.instance_id, overlay, no_pause)


def test_aborted_commit_is_reported_and_restarted(instances, tiny):
    overlay = running_on_overlay(instances, tiny)
    abort = on_call(1, lambda: tiny.host.virsh("blockjob", tiny.name, "vda", "--abort"))
    with pytest.raises(HypervisorError, match="the block commit of vda has failed"):
        instances.overlays.merge(tiny.instance_id, overlay, abort)
    assert tiny.source() == str(overlay.overlay)
    assert instances.state(tiny.instance_id) is InstanceState.RUNNING
    merged(instances, tiny, overlay)


def test_interrupted_merge_is_resumed(instances, tiny):
    overlay = running_on_overlay(instances, tiny)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        instances.overlays.merge(tiny.instance_id, overlay, on_call(1, stop))
    with (
        pytest.raises(RootVolumeInUse, match="has a block job on vda"),
        instances.overlays.hold_attached(tiny.instance_id, overlay),
    ):
        pass
    tiny.write(block=2, value=22)
    merged(instances, tiny, overlay)
    assert tiny.read(block=2) == {22}


def test_cpus_paused_by_driver_are_resumed_after_crash(instances, tiny):
    overlay = running_on_overlay(instances, tiny)
    with instances._lookup(tiny.instance_id) as domain:
        instances._metadata.change(
            domain, tiny.instance_id, lambda metadata: replace(metadata, frozen=replace(metadata.frozen, paused=True))
        )
        domain.suspend()
    merged(instances, tiny, overlay)
    assert tiny.host.virsh("domstate", tiny.name).strip() == "running"


def test_cpus_paused_by_other_client_stay_paused(instances, tiny):
    overlay = running_on_overlay(instances, tiny)
    tiny.host.virsh("suspend", tiny.name)
    merged(instances, tiny, overlay)
    assert tiny.host.virsh("domstate", tiny.name).strip() == "paused"


def test_unknown_overlay_with_data_is_kept(instances, tiny, caplog):
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.overlays.attach(tiny.instance_id, overlay)
    copy = overlay.overlay.read_bytes()
    instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    overlay.overlay.write_bytes(copy)  # a crash before the definition was changed leaves this
    instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    assert has_no_overlay_file(tiny, overlay)
    overlay.overlay.write_bytes(copy)
    tiny.write_off(overlay.overlay, "qcow2", block=1, value=11)
    with pytest.raises(HypervisorError, match="already exists and contains data"):
        instances.overlays.attach(tiny.instance_id, overlay)
    instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    assert "kept as" in caplog.text
    assert overlay.overlay.with_name(f"{overlay.overlay.name}.left").exists()


def test_overlay_hold_detects_writers(instances, tiny):
    overlay = instances.overlays.plan(tiny.instance_id)
    with (
        pytest.raises(RootVolumeInUse, match="will be started on the root volume itself"),
        instances.overlays.hold_attached(tiny.instance_id, overlay),
    ):
        pass
    overlay = running_on_overlay(instances, tiny)
    with instances.overlays.hold_attached(tiny.instance_id, overlay) as hold:
        instances._events.record_disconnect()
        with pytest.raises(HoldLostError):
            hold.check()
    with instances.overlays.hold_attached(tiny.instance_id, overlay) as hold:
        tiny.host.virsh("blockcommit", tiny.name, "vda", "--active", "--wait")
        with pytest.raises(RootVolumeInUse, match="has a block job on vda"):
            hold.check()
        tiny.host.virsh("blockjob", tiny.name, "vda", "--abort")
        eventually(lambda: has_been_used(hold), details=tiny.host.log)
    merged(instances, tiny, overlay)


def has_been_used(hold):
    """Return whether the hold has detected a block job."""
    try:
        hold.check()
    except RootVolumeInUse as error:
        return "had a block job on vda" in str(error)
    return False


def test_attach_refuses_running_instance(instances, tiny):
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.start(tiny.instance_id)
    with pytest.raises(IncorrectInstanceState, match="is running: an overlay can be attached only while it is off"):
        instances.overlays.attach(tiny.instance_id, overlay)
    assert has_no_overlay_file(tiny, overlay)


def test_disown_refuses_instance_with_overlay(instances, tiny):
    overlay = instances.overlays.plan(tiny.instance_id)
    instances.overlays.attach(tiny.instance_id, overlay)
    with pytest.raises(IncorrectInstanceState, match="has an overlay over its root volume"):
        instances.disown(tiny.instance_id)
    again = instances.adopt(tiny.name, account_id=ACCOUNT, tags={"a": "b"})
    assert again.root_volume == overlay.volume
    with pytest.raises(IncorrectInstanceState, match="so the root device cannot change now"):
        instances.adopt(tiny.name, account_id=ACCOUNT, root_device="vda")
    instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    instances.disown(tiny.instance_id)


def test_image_on_top_of_overlay_is_not_changed(instances, tiny):
    overlay = running_on_overlay(instances, tiny)
    tiny.host.virsh("snapshot-create-as", tiny.name, "s", "--disk-only", "--no-metadata")
    with pytest.raises(HypervisorError, match="its root disk is on an image that is neither"):
        instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    tiny.host.virsh("blockcommit", tiny.name, "vda", "--active", "--pivot", "--shallow")
    merged(instances, tiny, overlay)


def test_managed_save_prevents_overlay_and_merge(instances, tiny):
    overlay = running_on_overlay(instances, tiny)
    tiny.host.virsh("managedsave", tiny.name)
    assert not instances.overlays.has_lost_power(tiny.instance_id)
    with pytest.raises(HypervisorError, match="has a managed save image with the overlay as its disk: start it first"):
        instances.overlays.merge(tiny.instance_id, overlay, no_pause)
    instances.start(tiny.instance_id)
    merged(instances, tiny, overlay)
    tiny.host.virsh("managedsave", tiny.name)
    with pytest.raises(OverlayNotSupported, match="the domain has a managed save image"):
        instances.overlays.plan(tiny.instance_id)


def then_started(tiny, work):
    """Return a function that calls `work` and then starts the domain, as another client might."""

    def both(*arguments):
        work(*arguments)
        tiny.host.virsh("start", tiny.name)

    return both


def test_instance_started_during_attach_runs_on_volume(instances, tiny, monkeypatch):
    before = definition(tiny)
    overlay = instances.overlays.plan(tiny.instance_id)
    monkeypatch.setattr(overlay_files, "create", then_started(tiny, overlay_files.create))
    with pytest.raises(IncorrectInstanceState, match="was started while its overlay was attached"):
        instances.overlays.attach(tiny.instance_id, overlay)
    assert tiny.source() == str(tiny.disk)
    assert (definition(tiny), has_no_overlay_file(tiny, overlay)) == (before, True)


def test_instance_started_during_file_merge_is_merged_live(instances, tiny, monkeypatch):
    overlay = running_on_overlay(instances, tiny)
    instances.force_stop(tiny.instance_id)
    monkeypatch.setattr(overlay_files, "commit", then_started(tiny, overlay_files.commit))
    wrote = on_call(1, lambda: tiny.write(block=2, value=22))
    merged(instances, tiny, overlay, pause_between_polls(wrote))
    assert tiny.read(block=2) == {22}
    assert instances.state(tiny.instance_id) is InstanceState.RUNNING


def pause_between_polls(pause):
    """Return a pause that calls `pause` between two polls, but not while a program runs."""
    return lambda seconds: pause(seconds) if seconds else None


def test_events_resume_after_restart_of_daemon(instances, tiny):
    def listed():
        return [found.state for found in instances.list() if found.instance_id == tiny.instance_id]

    assert listed() == [InstanceState.STOPPED]
    tiny.host.kill_daemon()
    assert listed() == [InstanceState.STOPPED]
    tiny.host.start_daemon()
    assert instances.state(tiny.instance_id) is InstanceState.STOPPED
    tiny.host.virsh("start", tiny.name)
    eventually(lambda: listed() == [InstanceState.RUNNING], details=tiny.host.log)
    tiny.host.virsh("destroy", tiny.name)
    eventually(lambda: listed() == [InstanceState.STOPPED], details=tiny.host.log)
    tiny.host.kill_daemon()
    tiny.host.start_daemon()
    assert not instances.overlays.has_lost_power(tiny.instance_id), "the reason outlives the daemon"


def test_call_ends_if_daemon_hangs(open_driver, tiny, monkeypatch):
    monkeypatch.setattr(connection, "KEEPALIVE_INTERVAL", 1)
    monkeypatch.setattr(connection, "KEEPALIVE_COUNT", 1)
    instances = open_driver()
    assert instances.state(tiny.instance_id) is InstanceState.STOPPED
    nsenter = psutil.Process(tiny.host._daemon.pid)
    (daemon,) = nsenter.children()
    daemon.suspend()
    try:
        with pytest.raises(HypervisorUnavailable, match=r"the connection to .* is lost"):
            instances.state(tiny.instance_id)
    finally:
        daemon.resume()
        nsenter.resume()  # it stops itself when its child stops
    assert instances.state(tiny.instance_id) is InstanceState.STOPPED


def test_shutdown_request_is_sent_and_repeated(instances, tiny):
    instances.start(tiny.instance_id)
    for _ in range(3):
        instances.request_stop(tiny.instance_id)
        assert instances.state(tiny.instance_id) is InstanceState.RUNNING
    instances.terminate(tiny.instance_id)
    assert instances.state(tiny.instance_id) is InstanceState.SHUTTING_DOWN
    with pytest.raises(IncorrectInstanceState, match="is shutting-down and cannot be used any more"):
        instances.force_stop(tiny.instance_id)
    tiny.host.virsh("destroy", tiny.name)
    assert instances.state(tiny.instance_id) is InstanceState.TERMINATED
