"""Changes by other clients to a guest and to libvirt while its root volume is read, through the whole service."""

import time

import pytest

from support.eventually import eventually
from support.libvirt.guest_disk import OFF
from support.libvirt.libvirt_host import VirshError
from support.libvirt.libvirt_service import running_service

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(libvirtd, tmp_path_factory):
    with running_service(tmp_path_factory.mktemp("service"), libvirtd, capture_mode="overlay") as service:
        yield service


@pytest.fixture(scope="module")
def _web(service, guest):
    domain = service.domain("web", guest, parameters={"EVERY": 0.5}).start()
    yield domain
    domain.remove()


@pytest.fixture
def web(_web):
    """A running guest, shared by the tests of this module."""
    _web.await_boot(after=_web.boots[:-1])
    return _web


@pytest.fixture
def cold(service, guest):
    """A guest that is off, which saves the boot. Its volume is read without an overlay."""
    domain = service.domain("cold", guest)
    yield domain
    domain.remove()


@pytest.fixture(autouse=True)
def check_guest_is_unchanged(request, service):
    """Check that after each test the guest is defined as before, and no file of an overlay remains."""
    name = next(name for name in ("web", "cold") if name in request.fixturenames)
    domain = request.getfixturevalue(name)
    definition, files, sources = domain.definition(), domain.files(), domain.sources()
    yield
    if "undefined" not in request.function.__name__:
        assert domain.definition() == definition
    assert domain.files() == files
    assert set(domain.sources()) == set(sources)


def test_running_guest_is_bundled_across_restart_of_libvirtd(service, web, libvirtd):
    boots = web.boots
    bundle = service.bundle(web)
    with service.paused_during_read(bundle):
        libvirtd.kill_daemon()
    time.sleep(1)  # the service continues to read without libvirtd
    libvirtd.start_daemon()
    assert bundle.completed().drive().words(boots[-1])[-1] == OFF
    web.await_written(web.await_boot(after=boots))


def test_guest_killed_during_read_is_restarted_with_its_data(service, web):
    boots = web.boots
    bundle = service.bundle(web)
    with service.paused_during_read(bundle):
        killed = web.await_boot(after=boots)
        written = web.await_written(killed)
        web.kill()
    drive = bundle.completed().drive()
    assert (drive.words(boots[-1])[-1], drive.words(killed)) == (OFF, [])
    again = web.await_boot(after=[*boots, killed])
    web.await_written(again)
    words = web.read_disk().words(killed)
    assert len(words) >= written
    assert words == [str(number + 1) for number in range(len(words))]


def test_stopped_guest_is_bundled_across_restart_of_libvirtd(service, cold, libvirtd):
    bundle = service.bundle(cold)
    with service.paused_during_read(bundle):
        libvirtd.kill_daemon()
    time.sleep(1)
    libvirtd.start_daemon()
    assert bundle.completed().opened().read_bytes() == cold.disk.read_bytes()
    assert not cold.runs()


def test_start_by_other_client_during_read_is_detected(service, cold):
    bundle = service.bundle(cold)
    with service.paused_during_read(bundle), pytest.raises(VirshError, match="lock"):
        cold.start()
    assert bundle.completed().opened().read_bytes() == cold.disk.read_bytes()
    cold.start()
    cold.host.virsh("destroy", cold.name)


def test_task_fails_if_guest_is_undefined_during_read(service, cold):
    bundle = service.bundle(cold)
    with service.paused_during_read(bundle):
        cold.host.virsh("undefine", cold.name)
    code, message = bundle.failure()
    assert code == "Client.InstanceTerminated"
    assert cold.instance_id in message
    cold.define()


def test_undefined_running_guest_runs_until_it_is_off(service, web):
    boots = web.boots
    bundle = service.bundle(web)
    with service.paused_during_read(bundle):
        web.host.virsh("undefine", web.name)
        again = web.await_boot(after=boots)
    assert bundle.completed().drive().words(boots[-1])[-1] == OFF
    web.await_written(again)
    web.host.virsh("shutdown", web.name)
    eventually(lambda: web.name not in web.host.virsh("list", "--all", "--name"), f"{web.name} is undefined")
    web.define()
    words = web.read_disk().words(again)
    assert words[-1] == OFF
    web.start()
