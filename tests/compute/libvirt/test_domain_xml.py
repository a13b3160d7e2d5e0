"""An overlay is added to a domain's definition and removed; the rest of the XML does not change."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from support.libvirt.domain_xml import CDROM, xml
from thrave.compute.errors import InvalidDomainError
from thrave.compute.libvirt.domain_metadata import InstanceMetadata, OverlayMetadata, parse_metadata
from thrave.compute.libvirt.domain_xml import DiskImage, read_definition, with_overlay, without_overlay

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
    <qemu:arg value='-nodefaults'/>
  </qemu:commandline>
</domain>
"""
CHAIN = "<backingStore type='file'><format type='raw'/><source file='/vm/golden.raw'/><backingStore/></backingStore>"
VOLUME, OVERLAY = DiskImage(Path("/vm/ü <c>.qcow2"), "qcow2"), DiskImage(Path("/vm/ov&er.qcow2"), "qcow2")
FROZEN = InstanceMetadata(
    account_id="123456789012", frozen=OverlayMetadata(path=VOLUME.path, format="qcow2", overlay=OVERLAY.path)
)


def layers(disk):
    """Return files and formats of a disk, from the top."""
    yield disk.find("source").get("file"), disk.find("driver").get("type")
    while (disk := disk.find("backingStore")) is not None and disk.find("source") is not None:
        yield disk.find("source").get("file"), disk.find("format").get("type")


@pytest.mark.parametrize("below", ["", "<backingStore/>", CHAIN], ids=["unsaid", "none", "chain"])
def test_with_overlay_changes_only_disk_and_our_element(below):
    before = WHOLE.replace("{below}", below)
    after = with_overlay(before, "vda", FROZEN, volume=VOLUME, overlay=OVERLAY)
    changed = read_definition(after)
    assert changed.disks[1].path == OVERLAY.path
    assert parse_metadata(changed.metadata) == FROZEN
    _, disk = ET.fromstring(after).iterfind("devices/disk")
    chain = [(str(OVERLAY.path), "qcow2"), (str(VOLUME.path), "qcow2")]
    assert list(layers(disk)) == chain + ([("/vm/golden.raw", "raw")] if below == CHAIN else [])
    ends = disk.find("backingStore").find("backingStore") is not None
    assert ends is (below != ""), "the end of the chain does not change"
    start, end = before.index("<thrave:instance"), before.index("<x:y")
    assert after.startswith(before[:start])
    assert (
        before[end : before.index("<disk type='file' device='disk'>\n      <driver name='qemu' type='qcow2'")] in after
    )
    assert after.endswith(before[before.index("\n  </devices>") :])


@pytest.mark.parametrize("below", ["", "<backingStore/>", CHAIN], ids=["unsaid", "none", "chain"])
def test_without_overlay_restores_disk(below):
    before = WHOLE.replace("{below}", below)
    record = parse_metadata(read_definition(before).metadata)
    on = with_overlay(before, "vda", FROZEN, volume=VOLUME, overlay=OVERLAY)
    off = without_overlay(on, "vda", record, volume=VOLUME)
    assert sorted_children(off) == sorted_children(before)


def sorted_children(text):
    """Return the canonical text with sorted disk elements; their order has no meaning."""
    root = ET.fromstring(text)
    for disk in root.iterfind("devices/disk"):
        disk[:] = sorted(disk, key=lambda element: element.tag)
    return ET.canonicalize(ET.tostring(root, encoding="unicode"), strip_text=True)


def test_with_overlay_adds_metadata_element():
    for text in (
        xml(),
        xml().replace("<metadata></metadata>", "<metadata/>"),
        xml().replace("<metadata></metadata>", ""),
    ):
        after = with_overlay(text, "vda", FROZEN, volume=VOLUME, overlay=OVERLAY)
        assert parse_metadata(read_definition(after).metadata) == FROZEN


def test_with_overlay_refuses_unknown_disk():
    with pytest.raises(InvalidDomainError, match="disk: there is no vdz"):
        with_overlay(xml(), "vdz", None, volume=VOLUME, overlay=OVERLAY)
    with pytest.raises(InvalidDomainError, match="has no source"):
        without_overlay(
            xml(CDROM.replace('<source file="/iso/win.iso"/>', "").format(more="")), "sda", None, volume=VOLUME
        )
