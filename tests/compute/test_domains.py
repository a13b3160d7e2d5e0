"""What a domain's XML says of an instance, and how it is changed: no libvirt needed, and no word of it believed."""

import re
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrave.compute.domain_edits import Image, with_overlay, without_overlay
from thrave.compute.domain_metadata import FrozenRoot, Record, check_record, read_record, write_record
from thrave.compute.domain_xml import MOST_CHARACTERS, DomainFaultError, Mirror, pool_type, read_definition
from thrave.compute.domains import (
    LOST_POWER,
    STATES,
    STOPPED_BECAUSE,
    PoolVolume,
    instance_id_of,
    instance_of,
    instance_state,
    lost_power,
    root_disk,
)
from thrave.compute.instance import InstanceState
from thrave.compute.libvirt_numbers import DomainState, ShutoffReason, StoppedDetail
from thrave.compute.overlay_steps import obstacle_to_overlay, overlay_for

UUID = "6f1c2d3e-0000-4000-8000-00000000abcd"
NOW = datetime(2026, 11, 23, 10, tzinfo=UTC)
ALICE = Record(account_id="123456789012", launch_time=NOW)

DISK = (
    '<disk type="file" device="disk"><driver name="qemu" type="{format}"/>'
    '<source file="{file}"/><target dev="{dev}"/>{more}</disk>'
)
CDROM = '<disk type="file" device="cdrom"><source file="/iso/win.iso"/><target dev="sda"/>{more}</disk>'
WINDOWS = (
    '<libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">'
    '<libosinfo:os id="http://microsoft.com/win/2k22"/></libosinfo:libosinfo>'
)


def disk(dev="vda", file="/vm/c.raw", image_format="raw", more=""):
    return DISK.format(dev=dev, file=file, format=image_format, more=more)


def other(kind, source, device="disk"):
    """A disk whose source is no file."""
    return f'<disk type="{kind}" device="{device}"><source {source}/><target dev="vda"/></disk>'


BLOCK, NETWORK = other("block", 'dev="/dev/vg/win"'), other("network", 'protocol="rbd" name="p/win"')
POOL_VOLUME = other("volume", 'pool="p" volume="win.raw"')


def xml(*disks, metadata="", architecture="x86_64", more=""):
    return (
        f'<domain type="kvm"><name>win</name><uuid>{UUID}</uuid><metadata>{metadata}</metadata>'
        f'<os><type arch="{architecture}">hvm</type></os>'
        f"<devices>{''.join(disks or (disk(),))}{more}</devices></domain>"
    )


def no_pool(pool, volume):
    raise AssertionError("there is no storage pool in this definition")


def instance(text, record=ALICE, find_volume=no_pool):
    return instance_of(read_definition(text), record, InstanceState.RUNNING, NOW, find_volume)


def test_an_id_comes_from_the_uuid_and_from_nothing_else():
    assert instance_id_of(UUID) == instance_id_of(UUID.upper()) == "i-fee93826271e85d9f"
    assert instance_id_of("00000000-0000-0000-0000-000000000000") != instance_id_of(UUID)


def test_a_domain_is_an_instance():
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
def test_the_root_is_the_disk_that_boots(name):
    disks, root = ROOTS[name]
    assert root_disk(read_definition(xml(*disks)), ALICE).target == root


def test_the_operator_may_name_the_root():
    both = read_definition(xml(disk("vda", more='<boot order="1"/>'), disk("vdb")))
    named = Record(account_id="123456789012", root_device="vdb")
    assert root_disk(both, named).target == "vdb"
    with pytest.raises(DomainFaultError, match="rootDevice: there is no disk vdz"):
        root_disk(both, Record(account_id="123456789012", root_device="vdz"))
    with pytest.raises(DomainFaultError, match=r"there is no disk$"):
        root_disk(read_definition(xml(CDROM.format(more=""))), ALICE)


SOURCES = {
    BLOCK: ("instance-store", "/dev/vg/win"),
    other("block", 'dev="/dev/sdb"', device="lun"): ("instance-store", "/dev/sdb"),
    NETWORK: ("ebs", "/rbd:p/win"),
    other("nvme", 'type="pci" namespace="1"'): ("ebs", "/nvme"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_root_device_type_is_that_of_the_disks_source(source):
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
def test_a_volume_of_a_storage_pool_is_where_its_pool_is(kind):
    found = instance(xml(POOL_VOLUME), find_volume=lambda pool, volume: PoolVolume(Path("/", pool, volume), kind))
    assert (found.root_device_type, str(found.root_volume.path)) == (POOLS[kind], "/p/win.raw")
    assert pool_type(f'<pool type="{kind}"><name>p</name></pool>') == kind


def test_what_the_operator_says_goes_before_what_the_definition_says():
    said = Record(
        account_id="123456789012",
        platform="linux",
        root_device_type="ebs",
        secret_file=Path("/s"),
        tags={"Name": "web"},
    )
    found = instance(xml(metadata=WINDOWS), said)
    assert (found.platform, found.root_device_type, found.tags) == (None, "ebs", {"Name": "web"})
    assert found.root_volume.secret_file == Path("/s")
    assert instance(xml(), Record(account_id="123456789012", platform="windows")).platform == "windows"
    with pytest.raises(DomainFaultError, match="rootDeviceType: the disk vda is no file or device of this host"):
        instance(xml(NETWORK), Record(account_id="123456789012", root_device_type="instance-store"))


@pytest.mark.parametrize(
    ("os_id", "platform"),
    [
        ("http://microsoft.com/win/11", "windows"),
        ("http://microsoft.com/dos/6", None),
        ("http://debian.org/debian/12", None),
        ("http://example.org/?http://microsoft.com/win/11", None),
    ],
)
def test_the_platform_is_what_libosinfo_says(os_id, platform):
    assert instance(xml(metadata=WINDOWS.replace("http://microsoft.com/win/2k22", os_id))).platform == platform


def test_while_frozen_the_root_volume_is_the_one_below():
    frozen = FrozenRoot(path=Path("/vm/c.raw"), format="raw", overlay=Path("/vm/o"), secret_file=Path("/s"))
    found = instance(xml(disk(file="/vm/o", image_format="qcow2")), Record(account_id="123456789012", frozen=frozen))
    root = found.root_volume
    assert (root.path, root.format, root.secret_file, root.device_name) == (
        Path("/vm/c.raw"),
        "raw",
        Path("/s"),
        "/dev/vda",
    )


def test_each_state_has_its_word():
    assert set(STATES) == set(DomainState)
    assert {state.name for state in DomainState if STATES[state] is InstanceState.STOPPED} == {"SHUTOFF"}
    assert instance_state(DomainState.PAUSED, terminated=False) is InstanceState.RUNNING
    assert instance_state(99, terminated=False) is InstanceState.RUNNING
    assert instance_state(DomainState.SHUTOFF, terminated=True) is InstanceState.TERMINATED
    assert {instance_state(state, terminated=True) for state in DomainState if state != DomainState.SHUTOFF} == {
        InstanceState.SHUTTING_DOWN
    }


def test_each_reason_to_be_off_is_on_purpose_or_not():
    assert set(LOST_POWER) == set(ShutoffReason)
    assert set(STOPPED_BECAUSE) == set(StoppedDetail)
    assert {reason.name for reason in ShutoffReason if not lost_power(reason, None)} == {
        "SHUTDOWN", "DESTROYED", "MIGRATED", "SAVED", "FROM_SNAPSHOT",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "seen", "lost"),
    [
        (ShutoffReason.UNKNOWN, StoppedDetail.SHUTDOWN, False),  # libvirtd was started anew after the guest's shutdown
        (ShutoffReason.UNKNOWN, StoppedDetail.FAILED, True),
        (ShutoffReason.UNKNOWN, 99, True),
        (ShutoffReason.FAILED, StoppedDetail.SHUTDOWN, True),
        (99, None, True),
    ],
)
def test_a_reason_that_was_told_is_remembered_for_a_daemon_that_forgets(reason, seen, lost):
    assert lost_power(reason, seen) is lost


def test_a_running_definition_tells_of_its_agent_and_of_block_jobs():
    channel = '<channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0" state="{}"/></channel>'
    assert read_definition(xml(more=channel.format("connected"))).has_agent
    assert not read_definition(xml(more=channel.format("disconnected"))).has_agent
    mirrored = read_definition(xml(disk(more='<mirror type="file" job="active-commit" ready="yes"/>')))
    assert mirrored.disks[0].mirror == Mirror("active-commit", ready=True)


OBSTACLES = {
    disk(): None,
    disk(image_format="qcow2"): None,
    disk(image_format="vmdk"): "not merged into the format vmdk",
    disk(more="<readonly/>"): "read-only",
    disk(more="<shareable/>"): "other domains may write",
    disk(more="<transient/>"): "not to be kept",
    disk(image_format="qcow2", more='<encryption format="luks"/>'): "in the clear",
    disk(more='<backingStore><source file="/b"><encryption format="luks"/></source></backingStore>'): "in the clear",
    disk(more='<mirror type="file" job="copy"/>'): "a block job",
    BLOCK: "a block device",
    NETWORK: "no file of this host",
    POOL_VOLUME: "no file of this host",
}


@pytest.mark.parametrize("text", OBSTACLES)
def test_what_can_have_no_overlay_says_why(text):
    reason = obstacle_to_overlay(read_definition(xml(text)).disks[0])
    assert (reason is None) if OBSTACLES[text] is None else OBSTACLES[text] in reason


def test_an_overlay_stands_beside_its_volume():
    assert str(overlay_for(Path("/vm/c.raw"), "i-0123456789abcdef0")) == "/vm/.c.raw.thrave-i-0123456789abcdef0.qcow2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not well-formed"),
        ("<domain>", "not well-formed"),
        ("<domain/>", "name: there is none"),
        ("<domain><name>x</name></domain>", "uuid: there is none"),
        ('<!DOCTYPE d [<!ENTITY a "aaaa">]><domain><name>&a;</name></domain>', "declares a document type"),
        (f"<domain>{' ' * MOST_CHARACTERS}</domain>", "more than 4194304 characters"),
        (xml('<disk><source file="/x"/></disk>'), "target: says no dev"),
        (xml(disk(more='<boot order="x"/>')), "boot order: 'x' is no number"),
        (xml(disk(file="relative.raw")), "relative.raw is not an absolute path"),
    ],
)
def test_xml_that_is_no_domains_is_refused(text, message):
    with pytest.raises(DomainFaultError, match=re.escape(message)):
        read_definition(text)


def test_an_architecture_that_ec2_has_not_is_refused():
    with pytest.raises(DomainFaultError, match="EC2 knows no s390x"):
        instance(xml(architecture="s390x"))


OURS = '<t:instance xmlns:t="https://thrave.dev/xmlns/instance/1" {attributes}>{children}</t:instance>'


def record(attributes='account="123456789012"', children=""):
    return read_record(read_definition(xml(metadata=OURS.format(attributes=attributes, children=children))).metadata)


def test_a_record_is_what_an_operator_writes():
    assert read_record(read_definition(xml(metadata=WINDOWS)).metadata) is None
    said = record(
        'account="123456789012" platform="windows" rootDevice="vdb" rootDeviceType="ebs" secretFile="/s" '
        'launchTime="2026-11-23T11:00:00+01:00" terminated="true"',
        '<t:tag key="Name">web</t:tag><t:tag key="empty"/><!-- a comment -->'
        '<t:frozen path="/vm/c" format="raw" overlay="/vm/o" paused="true"/>',
    )
    assert said == Record(
        account_id="123456789012",
        platform="windows",
        root_device="vdb",
        root_device_type="ebs",
        secret_file=Path("/s"),
        tags={"Name": "web", "empty": ""},
        launch_time=NOW,
        terminated=True,
        frozen=FrozenRoot(path=Path("/vm/c"), format="raw", overlay=Path("/vm/o"), paused=True),
    )


FAULTS = {
    "": "account: is missing",
    'account="alice"': "account: 'alice' is not 12 digits",
    'account="123456789012" platfrom="windows"': "platfrom: is none of account, launchTime, platform,",
    'account="123456789012" platform="dos"': "platform: 'dos' is none of windows, linux",
    'account="123456789012" rootDeviceType="floppy"': "rootDeviceType: 'floppy' is none of instance-store, ebs",
    'account="123456789012" secretFile="secret"': "secretFile: must be an absolute path",
    'account="123456789012" launchTime="today"': "launchTime: 'today' is no time",
    'account="123456789012" launchTime="2026-11-23T10:00:00"': "has no time zone",
    'account="123456789012" terminated="maybe"': "terminated: 'maybe' is none of true, false",
}
CHILD_FAULTS = {
    "<t:tags/>": "tags: is none of tag, frozen",
    "<t:tag>web</t:tag>": "key: is missing",
    '<t:tag key="a"/><t:tag key="a"/>': "tag: there are two with the key 'a'",
    '<t:tag key="aws:x">1</t:tag>': "which is AWS's own",
    "".join(f'<t:tag key="{number}"/>' for number in range(51)): "51 tags are more than the 50",
    '<t:frozen path="/vm/c" format="raw"/>': "overlay: is missing",
    '<t:frozen path="c" format="raw" overlay="/o"/>': "path: must be an absolute path",
    '<t:frozen path="/vm/c" overlay="/o"/>': "format: is missing",
    '<t:frozen path="/vm/c" format="raw" overlay="/o" base="/b"/>': "base: is none of",
}


@pytest.mark.parametrize("attributes", FAULTS)
def test_a_faulty_record_is_refused_under_the_name_of_the_fault(attributes):
    with pytest.raises(DomainFaultError, match=re.escape(FAULTS[attributes])):
        record(attributes)


@pytest.mark.parametrize("children", CHILD_FAULTS)
def test_so_are_its_elements(children):
    with pytest.raises(DomainFaultError, match=re.escape(CHILD_FAULTS[children])):
        record(children=children)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\ufffe\uffff"), max_size=20)
PATHS = TEXT.filter(lambda text: "/" not in text).map(lambda text: Path("/", text))


@given(
    tags=st.dictionaries(TEXT.filter(lambda key: key and not key.lower().startswith("aws:")), TEXT, max_size=4),
    secret_file=st.none() | PATHS,
    terminated=st.booleans(),
    overlay=st.none() | PATHS,
)
def test_what_is_written_is_read_again(tags, secret_file, terminated, overlay):
    frozen = overlay and FrozenRoot(path=Path("/c"), format="raw", overlay=overlay, secret_file=secret_file)
    written = Record(
        account_id="123456789012",
        tags=tags,
        secret_file=secret_file,
        terminated=terminated,
        frozen=frozen,
        launch_time=NOW,
    )
    check_record(written)
    definition = read_definition(xml(metadata=write_record(written, prefix="thrave:")))
    assert read_record(definition.metadata) == written


@pytest.mark.parametrize(
    "said", [Record(account_id="alice"), Record(account_id="123456789012", tags={"a": "\0"}), Record(account_id="")]
)
def test_what_could_not_be_read_again_is_not_written(said):
    with pytest.raises(DomainFaultError):
        check_record(said)


# As libvirt writes it, with what others keep in it.
WHOLE = """\
<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>win &amp; co</name>
  <uuid>6f1c2d3e-0000-4000-8000-00000000abcd</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://microsoft.com/win/2k22"/>
    </libosinfo:libosinfo>
    <thrave:instance xmlns:thrave="https://thrave.dev/xmlns/instance/1" account="123456789012"/>
    <x:y xmlns:x="urn:x"><x:z q="&#10;ü"/></x:y>
  </metadata>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' discard='unmap'/>
      <source file='/vm/d.raw'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/vm/ü &lt;c&gt;.qcow2' startupPolicy='optional'><seclabel model='dac' relabel='no'/></source>{below}
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-no-hpet'/>
  </qemu:commandline>
</domain>
"""
CHAIN = "<backingStore type='file'><format type='raw'/><source file='/vm/golden.raw'/><backingStore/></backingStore>"
VOLUME, OVERLAY = Image(Path("/vm/ü <c>.qcow2"), "qcow2"), Image(Path("/vm/ov&er.qcow2"), "qcow2")
FROZEN = Record(account_id="123456789012", frozen=FrozenRoot(path=VOLUME.path, format="qcow2", overlay=OVERLAY.path))


def layers(disk):
    """The files and formats of a disk, from the top."""
    yield disk.find("source").get("file"), disk.find("driver").get("type")
    while (disk := disk.find("backingStore")) is not None and disk.find("source") is not None:
        yield disk.find("source").get("file"), disk.find("format").get("type")


@pytest.mark.parametrize("below", ["", "<backingStore/>", CHAIN], ids=["unsaid", "none", "chain"])
def test_an_overlay_changes_one_disk_and_our_element_and_nothing_else(below):
    before = WHOLE.replace("{below}", below)
    after = with_overlay(before, "vda", FROZEN, volume=VOLUME, overlay=OVERLAY)
    changed = read_definition(after)
    assert changed.disks[1].path == OVERLAY.path
    assert read_record(changed.metadata) == FROZEN
    _, disk = ET.fromstring(after).iterfind("devices/disk")
    chain = [(str(OVERLAY.path), "qcow2"), (str(VOLUME.path), "qcow2")]
    assert list(layers(disk)) == chain + ([("/vm/golden.raw", "raw")] if below == CHAIN else [])
    ends = disk.find("backingStore").find("backingStore") is not None
    assert ends is (below != ""), "whether the chain ends there is left as it was said"
    start, end = before.index("<thrave:instance"), before.index("<x:y")
    assert after.startswith(before[:start])
    assert (
        before[end : before.index("<disk type='file' device='disk'>\n      <driver name='qemu' type='qcow2'")] in after
    )
    assert after.endswith(before[before.index("\n  </devices>") :])


@pytest.mark.parametrize("below", ["", "<backingStore/>", CHAIN], ids=["unsaid", "none", "chain"])
def test_what_takes_the_overlay_off_leaves_what_was_there_before(below):
    before = WHOLE.replace("{below}", below)
    record = read_record(read_definition(before).metadata)
    on = with_overlay(before, "vda", FROZEN, volume=VOLUME, overlay=OVERLAY)
    off = without_overlay(on, "vda", record, volume=VOLUME)
    assert sorted_children(off) == sorted_children(before)


def sorted_children(text):
    """The canonical text, with the elements of disks in one order: libvirt minds none."""
    root = ET.fromstring(text)
    for disk in root.iterfind("devices/disk"):
        disk[:] = sorted(disk, key=lambda element: element.tag)
    return ET.canonicalize(ET.tostring(root, encoding="unicode"), strip_text=True)


def test_a_record_gets_a_place_where_there_is_none():
    for text in (
        xml(),
        xml().replace("<metadata></metadata>", "<metadata/>"),
        xml().replace("<metadata></metadata>", ""),
    ):
        after = with_overlay(text, "vda", FROZEN, volume=VOLUME, overlay=OVERLAY)
        assert read_record(read_definition(after).metadata) == FROZEN


def test_a_disk_that_is_not_there_cannot_be_changed():
    with pytest.raises(DomainFaultError, match="disk: there is no vdz"):
        with_overlay(xml(), "vdz", None, volume=VOLUME, overlay=OVERLAY)
    with pytest.raises(DomainFaultError, match="it has no source"):
        without_overlay(
            xml(CDROM.replace('<source file="/iso/win.iso"/>', "").format(more="")), "sda", None, volume=VOLUME
        )
