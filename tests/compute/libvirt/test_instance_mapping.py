"""Mapping of domain XML to instances, without libvirt. The XML is untrusted."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support.libvirt.domain_xml import BLOCK, CDROM, NETWORK, POOL_VOLUME, UUID, WINDOWS, disk, other, xml
from thrave.compute.errors import InvalidDomainError
from thrave.compute.instance import InstanceState, OffReason
from thrave.compute.libvirt.binding import DomainState, ShutoffReason, StoppedDetail
from thrave.compute.libvirt.domain_metadata import InstanceMetadata, OverlayMetadata
from thrave.compute.libvirt.domain_xml import MAX_CHARACTERS, Mirror, read_definition, read_pool_type
from thrave.compute.libvirt.instance_mapping import (
    OFF_REASONS,
    REASON_OF_STOPPED_EVENT,
    STATES,
    PoolVolume,
    instance_id_of,
    instance_state,
    is_power_loss,
    off_reason,
    root_disk,
    to_instance,
)
from thrave.compute.libvirt.overlay_merge import obstacle_to_overlay, overlay_path

NOW = datetime(2026, 11, 23, 10, tzinfo=UTC)
ALICE = InstanceMetadata(account_id="123456789012", launch_time=NOW)


def no_pool(pool, volume):
    raise AssertionError("there is no storage pool in this definition")


def instance(text, record=ALICE, find_volume=no_pool):
    return to_instance(read_definition(text), record, InstanceState.RUNNING, NOW, find_volume)


def test_instance_id_depends_only_on_uuid():
    assert instance_id_of(UUID) == instance_id_of(UUID.upper()) == "i-fee93826271e85d9f"
    assert instance_id_of("00000000-0000-0000-0000-000000000000") != instance_id_of(UUID)


def test_to_instance_maps_domain():
    found = instance(xml(disk(), disk("vdb", "/vm/d.qcow2", "qcow2"), CDROM.format(more=""), metadata=WINDOWS))
    assert (found.platform, found.architecture, found.root_device_type) == ("windows", "x86_64", "instance-store")
    assert (found.root_volume.path, found.root_volume.format) == (Path("/vm/c.raw"), "raw")
    assert [(volume.path, volume.format, volume.device_name) for volume in found.volumes] == [
        (Path("/vm/d.qcow2"), "qcow2", "/dev/vdb")
    ]
    assert found.root_device_name == found.root_volume.device_name == "/dev/vda"


ROOTS = {
    "the first disk": ((disk("vda"), disk("vdb")), "vda"),
    "never a drive": ((CDROM.format(more=""), disk("vda")), "vda"),
    "the lowest order": ((disk("vda", more='<boot order="3"/>'), disk("vdb", more='<boot order="2"/>')), "vdb"),
    "the one with an order": ((disk("vda"), disk("vdb", more='<boot order="9"/>')), "vdb"),
    "a drive that boots first": (
        (CDROM.format(more='<boot order="1"/>'), disk("vda", more='<boot order="2"/>')),
        "vda",
    ),
    "a drive that boots alone": ((CDROM.format(more='<boot order="1"/>'), disk("vda"), disk("vdb")), "vda"),
}


@pytest.mark.parametrize("name", ROOTS)
def test_root_disk_is_boot_disk(name):
    disks, root = ROOTS[name]
    assert root_disk(read_definition(xml(*disks)), ALICE).target == root


def test_root_disk_is_named_disk():
    both = read_definition(xml(disk("vda", more='<boot order="1"/>'), disk("vdb")))
    named = InstanceMetadata(account_id="123456789012", root_device="vdb")
    assert root_disk(both, named).target == "vdb"
    with pytest.raises(InvalidDomainError, match="rootDevice: there is no disk vdz"):
        root_disk(both, InstanceMetadata(account_id="123456789012", root_device="vdz"))
    with pytest.raises(InvalidDomainError, match=r"there is no disk$"):
        root_disk(read_definition(xml(CDROM.format(more=""))), ALICE)


SOURCES = {
    BLOCK: ("instance-store", "/dev/vg/win"),
    other("block", 'dev="/dev/sdb"', device="lun"): ("instance-store", "/dev/sdb"),
    NETWORK: ("ebs", "/rbd:p/win"),
    other("nvme", 'type="pci" namespace="1"'): ("ebs", "/nvme"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_root_device_type_follows_disk_source(source):
    found = instance(xml(source))
    assert (found.root_device_type, str(found.root_volume.path)) == SOURCES[source]


POOLS = {
    "dir": "instance-store",
    "logical": "instance-store",
    "rbd": "ebs",
    "iscsi": "ebs",
    "netfs": "ebs",
    "new": "ebs",
}


@pytest.mark.parametrize("kind", POOLS)
def test_root_device_type_follows_storage_pool(kind):
    found = instance(xml(POOL_VOLUME), find_volume=lambda pool, volume: PoolVolume(Path("/", pool, volume), kind))
    assert (found.root_device_type, str(found.root_volume.path)) == (POOLS[kind], "/p/win.raw")
    assert read_pool_type(f'<pool type="{kind}"><name>p</name></pool>') == kind


def test_metadata_override_definition():
    said = InstanceMetadata(
        account_id="123456789012",
        platform="linux",
        root_device_type="ebs",
        secret_file=Path("/s"),
        tags={"Name": "web"},
    )
    found = instance(xml(metadata=WINDOWS), said)
    assert (found.platform, found.root_device_type, found.tags) == (None, "ebs", {"Name": "web"})
    assert found.root_volume.secret_file == Path("/s")
    assert instance(xml(), InstanceMetadata(account_id="123456789012", platform="windows")).platform == "windows"
    with pytest.raises(InvalidDomainError, match="rootDeviceType: the disk vda is not a file or device of this host"):
        instance(xml(NETWORK), InstanceMetadata(account_id="123456789012", root_device_type="instance-store"))


@pytest.mark.parametrize(
    ("os_id", "platform"),
    [
        ("http://microsoft.com/win/11", "windows"),
        ("http://microsoft.com/dos/6", None),
        ("http://debian.org/debian/12", None),
        ("http://example.org/?http://microsoft.com/win/11", None),
    ],
)
def test_platform_follows_libosinfo(os_id, platform):
    assert instance(xml(metadata=WINDOWS.replace("http://microsoft.com/win/2k22", os_id))).platform == platform


def test_root_volume_is_volume_below_overlay():
    frozen = OverlayMetadata(path=Path("/vm/c.raw"), format="raw", overlay=Path("/vm/o"), secret_file=Path("/s"))
    found = instance(
        xml(disk(file="/vm/o", image_format="qcow2")), InstanceMetadata(account_id="123456789012", frozen=frozen)
    )
    root = found.root_volume
    assert (root.path, root.format, root.secret_file, root.device_name) == (
        Path("/vm/c.raw"),
        "raw",
        Path("/s"),
        "/dev/vda",
    )


def test_states_are_complete():
    assert set(STATES) == set(DomainState)
    assert {state.name for state in DomainState if STATES[state] is InstanceState.STOPPED} == {"SHUTOFF"}
    assert instance_state(DomainState.PAUSED, terminated=False) is InstanceState.RUNNING
    assert instance_state(99, terminated=False) is InstanceState.RUNNING
    assert instance_state(DomainState.SHUTOFF, terminated=True) is InstanceState.TERMINATED
    assert {instance_state(state, terminated=True) for state in DomainState if state != DomainState.SHUTOFF} == {
        InstanceState.SHUTTING_DOWN
    }


def test_off_reasons_are_complete():
    assert set(OFF_REASONS) == set(ShutoffReason)
    assert set(REASON_OF_STOPPED_EVENT) == set(StoppedDetail)
    assert {reason.name for reason in ShutoffReason if not is_power_loss(reason, None)} == {
        "SHUTDOWN", "DESTROYED", "MIGRATED", "SAVED", "FROM_SNAPSHOT",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "seen", "lost"),
    [
        (ShutoffReason.UNKNOWN, StoppedDetail.SHUTDOWN, False),  # libvirtd was restarted after the guest's shutdown
        (ShutoffReason.UNKNOWN, StoppedDetail.FAILED, True),
        (ShutoffReason.UNKNOWN, 99, True),
        (ShutoffReason.FAILED, StoppedDetail.SHUTDOWN, True),
        (99, None, True),
    ],
)
def test_off_reason_uses_event_if_daemon_was_restarted(reason, seen, lost):
    assert is_power_loss(reason, seen) is lost


def test_off_reason_is_saved_with_managed_save_image():
    for reason in (*ShutoffReason, 99):
        assert off_reason(reason, None, saved=True) is OffReason.SAVED


def test_only_power_off_by_guest_is_shut_down():
    shut_down = {reason.name for reason in ShutoffReason if off_reason(reason, None) is OffReason.SHUT_DOWN}
    assert shut_down == {"SHUTDOWN", "FROM_SNAPSHOT"}
    assert off_reason(99, None) is OffReason.UNKNOWN


def test_running_definition_has_agent_and_block_job():
    channel = '<channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0" state="{}"/></channel>'
    assert read_definition(xml(more=channel.format("connected"))).has_agent
    assert not read_definition(xml(more=channel.format("disconnected"))).has_agent
    mirrored = read_definition(xml(disk(more='<mirror type="file" job="active-commit" ready="yes"/>')))
    assert mirrored.disks[0].mirror == Mirror("active-commit", ready=True)


OBSTACLES = {
    disk(): None,
    disk(image_format="qcow2"): None,
    disk(image_format="vmdk"): "cannot be merged into the format vmdk",
    disk(more="<readonly/>"): "read-only",
    disk(more="<shareable/>"): "other domains may write",
    disk(more="<transient/>"): "writes are discarded",
    disk(image_format="qcow2", more='<encryption format="luks"/>'): "unencrypted",
    disk(more='<backingStore><source file="/b"><encryption format="luks"/></source></backingStore>'): "unencrypted",
    disk(more='<mirror type="file" job="copy"/>'): "a block job",
    BLOCK: "a block device",
    NETWORK: "not a file of this host",
    POOL_VOLUME: "not a file of this host",
}


@pytest.mark.parametrize("text", OBSTACLES)
def test_obstacle_to_overlay_names_reason(text):
    reason = obstacle_to_overlay(read_definition(xml(text)).disks[0])
    assert (reason is None) if OBSTACLES[text] is None else OBSTACLES[text] in reason


def test_overlay_path_is_next_to_volume():
    assert str(overlay_path(Path("/vm/c.raw"), "i-0123456789abcdef0")) == "/vm/.c.raw.thrave-i-0123456789abcdef0.qcow2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not well-formed"),
        ("<domain>", "not well-formed"),
        ("<domain/>", "name: is missing"),
        ("<domain><name>x</name></domain>", "uuid: is missing"),
        ('<!DOCTYPE d [<!ENTITY a "aaaa">]><domain><name>&a;</name></domain>', "declares a document type"),
        (f"<domain>{' ' * MAX_CHARACTERS}</domain>", "more than 4194304 characters"),
        (xml('<disk><source file="/x"/></disk>'), "target: has no dev"),
        (xml(disk(more='<boot order="x"/>')), "boot order: 'x' is not a number"),
        (xml(disk(file="relative.raw")), "relative.raw is not an absolute path"),
    ],
)
def test_read_definition_refuses_invalid_xml(text, message):
    with pytest.raises(InvalidDomainError, match=re.escape(message)):
        read_definition(text)


def test_to_instance_refuses_unknown_architecture():
    with pytest.raises(InvalidDomainError, match="EC2 has no architecture s390x"):
        instance(xml(architecture="s390x"))
