"""The libvirt driver on libvirt's test driver: changes by other clients, lost connections, hanging calls."""

import re
import socket
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from unittest.mock import Mock

import pytest

from support.eventually import eventually, one_of
from support.instances.inventories import ACCOUNT, Domains
from thrave.compute import timeouts
from thrave.compute.base import Overlay
from thrave.compute.errors import (
    HoldLostError,
    HypervisorError,
    HypervisorUnavailable,
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceLocked,
    InstanceNotFound,
    InvalidDescriptionError,
    LibraryNotInstalled,
    OverlayNotSupported,
    RootVolumeInUse,
)
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.compute.libvirt import binding as libvirt_binding
from thrave.compute.libvirt import connection as hypervisor
from thrave.compute.libvirt import domain_cache, guest_agent, overlays
from thrave.compute.libvirt.domain_cache import DomainCache
from thrave.compute.libvirt.driver import LibvirtDriver
from thrave.compute.libvirt.instance_mapping import instance_id_of
from thrave.compute.power import _LOCKED_POLL_INTERVAL, BackgroundPower, power_lock
from thrave.compute.power_records import PowerAction
from thrave.write_guard import command_guard

pytestmark = pytest.mark.libvirt

OSINFO = "http://libosinfo.org/xmlns/libvirt/domain/1.0"
WINDOWS = '<libosinfo><os id="http://microsoft.com/win/2k22"/></libosinfo>'


@pytest.fixture
def domains(tmp_path, disk):
    domains = Domains(tmp_path, disk)
    try:
        yield domains
    finally:
        domains.close()


@pytest.fixture
def instances(domains):
    return domains.instances


@pytest.fixture
def instance_id(domains):
    return domains.add()


def test_domain_that_is_not_adopted_is_no_instance(domains, instances):
    instance_id = instance_id_of(domains.libvirt.define("other", "/vm/other.raw"))
    assert instances.list() == []
    for ask in (instances.get, instances.state, instances.request_stop, instances.start, instances.disown):
        with pytest.raises(InstanceNotFound):
            ask(instance_id)


def test_stop_is_repeated_if_domain_was_started_in_between(domains, instances, instance_id, monkeypatch):
    libvirt = libvirt_binding.load()
    shut_down, answers = libvirt.virDomain.shutdownFlags, [libvirt.libvirtError("the domain is not running")] * 2

    def shut_down_later(domain, flags):
        if answers:
            raise answers.pop()
        return shut_down(domain, flags)

    monkeypatch.setattr(libvirt.virDomain, "shutdownFlags", shut_down_later)
    instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED


def test_adopt_writes_only_given_values(domains, instances, disk, tmp_path):
    uuid = domains.libvirt.define("web", disk)
    domains.libvirt.metadata("web", WINDOWS, key="libosinfo", uri=OSINFO)
    before = domains.libvirt.definition("web")
    found = instances.adopt(
        uuid, account_id=ACCOUNT, root_device="vda", secret_file=tmp_path / "secret", tags={"Name": "web & <co>"}
    )
    assert (found.instance_id, found.account_id, found.state) == (instance_id_of(uuid), ACCOUNT, InstanceState.STOPPED)
    assert (found.platform, found.tags) == ("windows", {"Name": "web & <co>"})
    assert (found.root_volume.path, found.root_volume.secret_file) == (disk, tmp_path / "secret")
    after = domains.libvirt.definition("web")
    assert re.sub(r"\s*<thrave:instance.*</thrave:instance>", "", after, flags=re.DOTALL) == before
    instances.disown(found.instance_id)
    assert domains.libvirt.definition("web") == before


def test_adopt_again_changes_metadata(instances, domains, instance_id):
    first = instances.get(instance_id)
    instances.terminate(instance_id)
    again = instances.adopt(domains.names[instance_id], account_id="210987654321", tags={"a": "b"})
    assert (again.instance_id, again.launch_time) == (instance_id, first.launch_time)
    assert (again.account_id, again.platform, again.tags) == ("210987654321", None, {"a": "b"})
    assert again.state is InstanceState.STOPPED, "it is not terminated any more"
    assert instances.list(ACCOUNT) == []
    assert instances.list("210987654321") == [again]


NO_INSTANCES = {
    "account: 'alice' is not 12 digits": {"account_id": "alice"},
    "rootDevice: there is no disk vdz": {"root_device": "vdz"},
    "which AWS reserves": {"tags": {"aws:x": "1"}},
    "it contains a character that XML cannot contain": {"tags": {"\0": "1"}},
}


@pytest.mark.parametrize("message", NO_INSTANCES)
def test_adopt_rejects_invalid_domain(domains, instances, disk, message):
    domains.libvirt.define("web", disk)
    with pytest.raises(InvalidDescriptionError, match="the domain web does not describe an instance") as refused:
        instances.adopt("web", **{"account_id": ACCOUNT, **NO_INSTANCES[message]})
    assert message in str(refused.value)
    assert "thrave" not in domains.libvirt.definition("web")


def test_adopt_rejects_domain_without_disk_file(domains, instances, tmp_path):
    domains.libvirt.define("web", tmp_path / "gone.raw")
    with pytest.raises(InvalidDescriptionError, match=r"gone\.raw: No such file or directory"):
        instances.adopt("web", account_id=ACCOUNT)


@pytest.mark.parametrize("name", ["nobody", "6f1c2d3e-0000-4000-8000-00000000abcd", ""])
def test_adopt_rejects_unknown_domain(domains, instances, name):
    with pytest.raises(HypervisorError, match="Domain not found"):
        instances.adopt(name, account_id=ACCOUNT)


def test_list_skips_invalid_metadata(domains, instances, instance_id, caplog, disk):
    uuid = domains.libvirt.define("typo", disk)
    domains.libvirt.metadata("typo", '<instance account="12"/>')
    broken_id = instance_id_of(uuid)
    eventually(lambda: [error.instance_id for error in instances.list_errors()], until=one_of([broken_id]))
    assert [found.instance_id for found in instances.list()] == [instance_id]
    assert "instance skipped: the domain typo does not describe an instance: account: '12'" in caplog.text
    for ask in (instances.get, instances.state, instances.request_stop, instances.start):
        with pytest.raises(InvalidDescriptionError, match="is not 12 digits"):
            ask(broken_id)
    instances.adopt("typo", account_id=ACCOUNT)
    assert instances.list_errors() == []
    domains.libvirt.metadata("typo", "<instance/>")
    instances.disown(broken_id)
    assert "thrave" not in domains.libvirt.definition("typo")


def test_list_shows_changes_by_other_clients(domains, instances, instance_id):
    assert instances.list() == [instances.get(instance_id)]
    with domains.domain(instance_id) as domain:
        domain.destroy()
        eventually(lambda: [found.state for found in instances.list()], until=one_of([InstanceState.STOPPED]))
        domain.setMetadata(2, f'<instance account="{ACCOUNT}"><tag key="a">b</tag></instance>', "thrave", OURS, 2)
        eventually(lambda: [found.tags for found in instances.list()], until=one_of([{"a": "b"}]))
        domain.undefine()
    eventually(instances.list, until=one_of([]))
    with pytest.raises(InstanceNotFound):
        instances.get(instance_id)


OURS = "https://thrave.dev/xmlns/instance/1"


def test_list_does_not_call_libvirt_without_events(domains, instances, monkeypatch):
    for _ in range(3):
        domains.add()
    assert len(instances.list()) == 3
    time.sleep(0.2)  # for the events of the adopting itself
    instances.list()
    table = instances._cache
    looks = []
    monkeypatch.setattr(
        table, "refresh", lambda domain, look=table.refresh: looks.append(domain.name()) or look(domain)
    )
    for _ in range(5):
        assert len(instances.list()) == 3
    assert looks == []


def test_start_by_other_client_is_recorded_as_launch_time(domains, instances, instance_id):
    record = f'<instance account="{ACCOUNT}" launchTime="2020-01-01T00:00:00Z"/>'
    with domains.domain(instance_id) as domain:
        domain.destroy()
        domain.setMetadata(2, record, "thrave", OURS, 2)
        before = datetime.now(UTC)
        domain.create()
    eventually(lambda: instances.get(instance_id).launch_time >= before)
    assert instances.get(instance_id).launch_time <= datetime.now(UTC)
    assert domains.open_again().list() == instances.list(), "a driver without the event reads the recorded time"


def test_domain_adopted_by_hand_has_constant_launch_time(domains, instances, disk):
    instance_id = instance_id_of(domains.libvirt.define("web", disk))
    domains.libvirt.metadata("web", f'<instance account="{ACCOUNT}"/>')
    first = instances.get(instance_id)
    assert datetime.now(UTC) - first.launch_time < timedelta(minutes=1)
    assert instances.get(instance_id) == first
    eventually(instances.list, until=one_of([first]))


def test_request_stop_refuses_paused_guest(domains, instances, instance_id):
    with domains.domain(instance_id) as domain:
        domain.suspend()
        assert instances.state(instance_id) is InstanceState.RUNNING, "its disks are open"
        for ask in (instances.request_stop, instances.terminate):
            with pytest.raises(
                IncorrectInstanceState, match=f"paused, so its guest cannot power off: virsh resume {domain.name()}"
            ):
                ask(instance_id)
        assert instances.state(instance_id) is InstanceState.RUNNING, "nothing has changed"
        domain.resume()
    instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED


def test_hold_detects_start_by_other_client(domains, instances, instance_id):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id) as hold, domains.domain(instance_id) as domain:
        hold.check()
        domain.create()
        with pytest.raises(RootVolumeInUse, match="is running while its root volume is read"):
            hold.check()
        domain.destroy()
        eventually(lambda: fails(hold.check), until=one_of("was started and stopped while its root volume was read"))


def test_abandoned_start_gives_no_command_and_keeps_instance_busy(instances, instance_id, monkeypatch):
    instances.request_stop(instance_id)
    hangs, look = threading.Event(), instances._wait_while_stopping

    def refresh_late(domain):
        assert hangs.wait(60)
        return look(domain)

    monkeypatch.setattr(instances, "_wait_while_stopping", refresh_late)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(timeouts, "TIMEOUT", 0.5)
            with power_lock(instance_id), pytest.raises(HypervisorUnavailable):
                instances.start(instance_id)
        requests = BackgroundPower(instances, shutdown_timeout=60)
        requests._power_records.add_request(instance_id, PowerAction.STOP, None)
        assert requests._worker(instance_id).attempt() == _LOCKED_POLL_INTERVAL, "it may be started yet"
    finally:
        hangs.set()
    eventually(lambda: not timeouts.is_busy(instance_id))
    assert instances.state(instance_id) is InstanceState.STOPPED
    assert requests._worker(instance_id).attempt() == 0.0, "the request is finished"


@pytest.mark.parametrize("act", ["start", "request_stop", "force_stop", "terminate"])
def test_command_is_refused_after_loss_of_right(instances, instance_id, act):
    if act == "start":
        instances.request_stop(instance_id)
    before = instances.state(instance_id)

    checks = []

    def refuse():
        checks.append(act)
        if len(checks) > 1:  # allowed only at the start
            raise PermissionError

    with command_guard.using(refuse), pytest.raises(PermissionError):
        getattr(instances, act)(instance_id)
    assert instances.state(instance_id) is before


def fails(check):
    try:
        check()
    except RootVolumeInUse as error:
        return str(error).split(" ", 1)[1]


def test_hold_check_raises_after_lost_events(domains, instances, instance_id):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id) as hold:
        hold.check()
        instances._events.record_disconnect()  # as after a restart of libvirtd: events are lost
        with pytest.raises(HoldLostError):
            hold.check()
    with instances.hold_stopped(instance_id) as hold:
        hold.check()


def test_hold_check_raises_if_domain_is_removed(domains, instances, instance_id):
    instances.request_stop(instance_id)
    with instances.hold_stopped(instance_id) as hold:
        with domains.domain(instance_id) as domain:
            domain.undefine()
        with pytest.raises(InstanceNotFound):
            hold.check()


def test_transient_domain_is_instance_while_running(domains, instances, instance_id):
    with domains.domain(instance_id) as domain:
        domain.undefine()
    assert instances.get(instance_id).state is InstanceState.RUNNING
    instances.request_stop(instance_id)
    with pytest.raises(InstanceNotFound):
        instances.get(instance_id)


def test_volume_of_storage_pool_is_found(domains, instances, disk):
    pool = f'<pool type="dir"><name>images</name><target><path>{disk.parent}</path></target></pool>'
    volume = f"<volume><name>{disk.name}</name><capacity>4096</capacity></volume>"
    with domains.libvirt._hypervisor.session() as connection:
        made = connection.storagePoolCreateXML(pool, 0)
        try:
            made.createXML(volume, 0)
            uuid = domains.libvirt.define("web", disk)
            source = f'type="volume" device="disk"><source pool="images" volume="{disk.name}"/>'
            xml = domains.libvirt.definition("web")
            start, end = xml.rindex("type='file'"), xml.index("<target dev='vda'")
            connection.defineXML(xml[:start] + source + xml[end:])
            found = instances.adopt("web", account_id=ACCOUNT)
            assert (found.root_volume.path, found.root_device_type) == (disk, "instance-store")
        finally:
            made.destroy()
    (error,) = instances.list_errors() or [None]
    assert (error.instance_id, "pool images" in str(error)) == (instance_id_of(uuid), True)


def test_sysprep_without_agent_fails(instances, instance_id):
    with pytest.raises(InstanceCommandFailed, match="cannot be run: there is no agent in the guest"):
        instances.request_sysprep(instance_id, [r"C:\Windows\System32\Sysprep\sysprep.exe", "/oobe"])


ANSWERS = [
    "",
    "{",
    "[]",
    "null",
    "{}",
    '{"return": null}',
    '{"return": []}',
    '{"return": {"pid": "1"}}',
    "[" * 100_000,
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_sysprep_with_invalid_response_fails(instances, instance_id, monkeypatch, answer):
    class Agent:
        def qemuAgentCommand(self, *_asked):  # noqa: N802 (libvirt's name)
            return answer

    monkeypatch.setattr(libvirt_binding, "load_qemu", Agent)
    with (
        pytest.raises(InstanceCommandFailed, match="was not started: the guest's agent returned no process id"),
        instances._lookup(instance_id) as domain,
    ):
        guest_agent.run_command(domain, instance_id, ["sysprep.exe"])


class PoliteAgent:
    """An agent that responds in a guest that does not power off."""

    def qemuAgentCommand(self, *_asked):  # noqa: N802 (libvirt's name)
        return '{"return": {}}'


def test_agent_that_refuses_shutdown_is_not_used_until_next_start(instances, instance_id, monkeypatch):
    agents = guest_agent.GuestAgents()
    with instances._lookup(instance_id) as domain:
        assert not agents.request_stop(domain, starts=1), "there is none"
        monkeypatch.setattr(libvirt_binding, "load_qemu", PoliteAgent)
        assert not agents.request_stop(domain, starts=1)
        assert agents.request_stop(domain, starts=2)
        eventually(lambda: not agents.request_stop(domain, starts=2))


def test_obstacle_in_folder_names_reason(tmp_path, disk):
    for volume, overlay, reason in (
        (disk, tmp_path / ("x" * 256), "the file name is too long for an overlay in the same folder"),
        (tmp_path / "gone", tmp_path / "o", f"{tmp_path / 'gone'}: No such file or directory"),
        (tmp_path, tmp_path / "o", f"{tmp_path} is not a regular file"),
        (disk, tmp_path / "o", None),
    ):
        assert overlays._obstacle_in_folder(volume, overlay) == reason


def test_lock_merge_is_exclusive(instances, instance_id, disk):
    frozen = Overlay(VolumeFile(path=disk), disk.with_name("overlay"))
    with instances._metadata.lock_merge(instance_id), pytest.raises(InstanceLocked):
        instances.overlays.merge(instance_id, frozen, time.sleep)
    instances.overlays.merge(instance_id, frozen, time.sleep)


def test_plan_refuses_hypervisor_without_block_commit(instances, instance_id):
    with pytest.raises(OverlayNotSupported, match="its root disk vda cannot have an overlay: the hypervisor is TEST"):
        instances.overlays.plan(instance_id)


def test_stopped_domain_has_not_lost_power(domains, instances, instance_id):
    assert not instances.overlays.has_lost_power(instance_id)
    instances.force_stop(instance_id)
    assert not instances.overlays.has_lost_power(instance_id)


def test_calls_fail_at_once_without_libvirt(tmp_path):
    nowhere = LibvirtDriver(f"qemu+unix:///system?socket={tmp_path / 'nobody'}", lock_folder=tmp_path / "locks")
    for ask in (nowhere.list, nowhere.list_errors, lambda: nowhere.get("i-0123456789abcdef0")):
        with pytest.raises(HypervisorUnavailable, match=r"no connection to qemu\+unix.*No such file or directory"):
            ask()


def test_connect_to_hanging_libvirt_uses_few_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(hypervisor, "CONNECT_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        mute = LibvirtDriver(f"qemu+unix:///system?socket={tmp_path / 's'}", lock_folder=tmp_path / "locks")
        for _ in range(hypervisor.MAX_PENDING_CONNECTS):
            with pytest.raises(HypervisorUnavailable, match="has not responded within 0 seconds"):
                mute.list()
        with pytest.raises(HypervisorUnavailable, match="does not respond: 4 attempts to connect are waiting"):
            mute.list()
        waiting = [thread for thread in threading.enumerate() if thread.name == "libvirt open"]
        assert len(waiting) == hypervisor.MAX_PENDING_CONNECTS
        for thread in waiting:
            client, _ = silent.accept()
            client.close()
            thread.join(60)
    with pytest.raises(HypervisorUnavailable, match="no connection to"):
        mute.list()


def test_late_connection_is_closed(instances, instance_id, monkeypatch):
    shown = instances.list()
    instances.close()
    binding, answers, closed = libvirt_binding.load(), threading.Event(), threading.Event()
    monkeypatch.setattr(hypervisor, "CONNECT_TIMEOUT", 0.2)
    with monkeypatch.context() as hanging:
        hanging.setattr(binding, "open", lambda uri: answers.wait(60) and Mock(close=closed.set))
        with pytest.raises(HypervisorUnavailable, match="has not responded"):
            instances.get(instance_id)
    monkeypatch.setattr(hypervisor, "CONNECT_TIMEOUT", 60)
    assert instances.list() == shown
    answers.set()
    assert closed.wait(60)
    assert instances.list() == shown


def test_list_returns_last_snapshot_of_hanging_domain(domains, instances, instance_id, monkeypatch, caplog):
    other, hangs, look = domains.add(), threading.Event(), DomainCache.refresh
    assert len(instances.list()) == 2

    def refresh_or_hang(table, domain):
        if instance_id_of(domain.UUIDString()) == instance_id:
            hangs.wait(60)
        return look(table, domain)

    monkeypatch.setattr(DomainCache, "refresh", refresh_or_hang)
    monkeypatch.setattr(domain_cache, "REFRESH_TIMEOUT", 0.2)
    with domains.domain(instance_id) as domain:
        instances._events.mark_changed({domain.UUIDString()})
    with domains.domain(other) as domain:
        domain.destroy()
    wanted = {instance_id: InstanceState.RUNNING, other: InstanceState.STOPPED}
    eventually(lambda: {one.instance_id: one.state for one in instances.list()}, until=one_of(wanted))
    instances.list()
    waiting = [thread for thread in threading.enumerate() if thread.name.startswith("read domain ")]
    assert len(waiting) == 1, "only one thread reads the domain"
    assert "not read: libvirt does not respond" in caplog.text
    hangs.set()


@pytest.mark.parametrize(
    "ask",
    [
        lambda instances, instance_id: instances.state(instance_id),
        lambda instances, instance_id: instances.request_stop(instance_id),
        lambda instances, instance_id: instances.force_stop(instance_id),
        lambda instances, instance_id: instances.terminate(instance_id),
        lambda instances, instance_id: instances.start(instance_id),
        lambda instances, instance_id: instances.request_sysprep(instance_id, ["sysprep"]),
        lambda instances, instance_id: instances.hold_stopped(instance_id).__enter__(),
        lambda instances, instance_id: instances.overlays.plan(instance_id),
        lambda instances, instance_id: instances.overlays.has_lost_power(instance_id),
    ],
)
def test_call_for_hanging_domain_ends(instances, instance_id, monkeypatch, ask):
    hangs = threading.Event()
    with monkeypatch.context() as hanging:
        hanging.setattr(DomainCache, "refresh", lambda _table, _domain: hangs.wait(60))
        hanging.setattr("thrave.compute.timeouts.TIMEOUT", 0.2)
        with pytest.raises(HypervisorUnavailable, match="has not responded within"):
            ask(instances, instance_id)
    hangs.set()


def test_list_returns_last_known_instances_until_reconnected(domains, instances, instance_id, caplog, monkeypatch):
    shown = instances.list()
    instances.close()
    with monkeypatch.context() as without:
        without.setattr(instances._hypervisor, "_uri", "test:///nowhere")
        with pytest.raises(HypervisorUnavailable):
            instances.get(instance_id)
        assert instances.list() == shown
        assert "last known instances used: no connection to test:///nowhere" in caplog.text
    with domains.domain(instance_id) as domain:
        domain.destroy()  # without an event
    assert [found.state for found in instances.list()] == [InstanceState.STOPPED]


def test_missing_binding_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "libvirt", None)
    monkeypatch.setattr("thrave.debian_modules.FOLDER", str(tmp_path))
    with pytest.raises(LibraryNotInstalled, match=r"libvirt for Python 3\.\d+ is not installed: .* python3-libvirt"):
        LibvirtDriver("test:///default", lock_folder=tmp_path).list()
