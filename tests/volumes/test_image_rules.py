"""Each rule of `image_rules`, on an image that QEMU has created or whose bytes are changed; and damaged images."""

import re
import struct
import uuid
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.disks.qemu_images import PASSPHRASE, converted, encrypted, qemu_img, write_passphrase
from thrave.volumes import vhd_headers
from thrave.volumes.errors import ImageRefusedError, VolumeError, VolumeUnreadableError
from thrave.volumes.formats import FORMATS, open_volume, read_metadata
from thrave.volumes.image_rules import FINDINGS, REFERENCES, Decision

pytestmark = pytest.mark.usefixtures("nbd")

MAKERS = {}
"""(format, name) of a rule -> function that creates an image with this reference or finding."""


def makes(image_format, name):
    def record(make):
        MAKERS[image_format, name] = make
        return make

    return record


@contextmanager
def edited(path):
    """The content of a file, which is written back after the block."""
    content = bytearray(path.read_bytes())
    yield content
    path.write_bytes(content)


def overlay(below, below_format, name="top.qcow2", image_format="qcow2"):
    top = below.with_name(name)
    qemu_img("create", "-f", image_format, "-b", below, "-F", below_format, top)
    return top


# --- raw and qcow2


@makes("raw", "looks like another format")
def raw_looks_like_qcow2(raw):
    with edited(raw) as disk:
        disk[:4] = b"QFI\xfb"
    return raw


@pytest.mark.parametrize(
    ("at", "magic", "kind"),
    [
        (0, b"\x1f\x8b\x08", "gzip"), (0, b"\xfd7zXZ\0", "xz"), (0, b"PK\x03\x04", "zip"), (257, b"ustar", "tar"),
        (0, b"WithoutFreeSpace", "parallels"), (0x40, b"\x7f\x10\xda\xbe", "vdi"), (-512, b"koly", "dmg"),
        (-512, b"conectix", "vpc"),
    ],
)  # fmt: skip
def test_read_metadata_warns_of_raw_disk_that_is_an_archive_or_image(raw, at, magic, kind):
    assert not read_metadata(raw, "raw").warnings
    with edited(raw) as disk:
        at %= len(disk)
        disk[at : at + len(magic)] = magic
    (warning,) = read_metadata(raw, "raw").warnings
    assert f"({kind})" in warning.public


def qcow2_with(raw, *, incompatible=0, snapshots=0):
    image = converted(raw, "qcow2")
    with edited(image) as content:
        content[79] |= incompatible & 0xFF
        content[72] |= incompatible >> 56
        content[63] |= snapshots
    return image


@makes("qcow2", "backing file")
def qcow2_backing(raw):
    return overlay(raw, "raw")


@makes("qcow2", "backing file without a format")
def qcow2_backing_without_format(raw):
    top = overlay(raw, "raw")
    top.write_bytes(top.read_bytes().replace(bytes.fromhex("e2792aca"), b"\x01\x02\x03\x04"))
    return top


@makes("qcow2", "data file")
def qcow2_data_file(raw):
    image = raw.with_name("x.qcow2")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={raw.with_name('data')},data_file_raw=on", image, "1M")
    return image


@makes("qcow2", "corrupt")
def qcow2_corrupt(raw):
    return qcow2_with(raw, incompatible=1 << 1)


@makes("qcow2", "dirty")
def qcow2_dirty(raw):
    return qcow2_with(raw, incompatible=1 << 0)


@makes("qcow2", "unknown feature")
def qcow2_unknown(raw):
    return qcow2_with(raw, incompatible=1 << 62)


@makes("qcow2", "external data bitmaps, compression, extended L2")
def qcow2_known_features(raw):
    return converted(raw, "qcow2", "-c", "-o", "extended_l2=off,compression_type=zstd")


@makes("qcow2", "internal snapshots")
def qcow2_snapshot(raw):
    image = converted(raw, "qcow2")
    qemu_img("snapshot", "-c", "before", image)
    return image


def without_end(image, count=1):
    """Remove the last bytes of an image's file."""
    with edited(image) as content:
        del content[-count:]
    return image


def with_data(raw):
    """Write data at the end of the disk: the last cluster or grain of its image."""
    with edited(raw) as disk:
        disk[-(1 << 20) :] = b"data" * (1 << 18)
    return raw


@makes("qcow2", "cut short")
def qcow2_cut(raw):
    return without_end(converted(with_data(raw), "qcow2"))


@makes("qcow2", "encrypted")
def qcow2_encrypted(raw):
    return encrypted(raw, "qcow2", write_passphrase(raw))


# --- vmdk


def flat(raw, *, head="", extents=None, kind="monolithicFlat", parent="ffffffff"):
    """A VMDK descriptor for the raw disk."""
    image = raw.with_name("disk.vmdk")
    sectors = raw.stat().st_size // 512
    lines = extents or [f'RW {sectors} FLAT "{raw.name}" 0']
    image.write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\ncreateType="{kind}"\n{head}\n'
        + "\n".join(lines)
        + "\n"
    )
    return image


@makes("vmdk", "extent")
def vmdk_flat(raw):
    return flat(raw)


@makes("vmdk", "raw device")
def vmdk_raw_device(raw):
    return flat(raw, kind="vmfsRDM", extents=[f'RW 16384 VMFSRDM "{raw.name}"'])


@makes("vmdk", "parent")
def vmdk_child(raw):
    return overlay(converted(raw, "vmdk"), "vmdk", "child.vmdk", "vmdk")


@makes("vmdk", "not closed")
def vmdk_not_closed(raw):
    image = converted(raw, "vmdk")
    with edited(image) as content:
        content[72] = 1
    return image


@makes("vmdk", "ignored extent")
def vmdk_zero_extent(raw):
    return flat(raw, extents=[f'RW 16384 FLAT "{raw.name}" 0', "RW 2048 ZERO"])


@makes("vmdk", "parent without a name")
def vmdk_nameless_parent(raw):
    return flat(raw, parent="00000001")


@makes("vmdk", "contradictory parent")
def vmdk_contradictory_parent(raw):
    return flat(raw, head='parentFileNameHint="parent.vmdk"')


@makes("vmdk", "parent was changed")
def vmdk_changed_parent(raw):
    child = vmdk_child(raw)
    with edited(raw.with_suffix(".vmdk")) as content:
        # QEMU writes a random number without leading zeros.
        content[:], changes = re.subn(rb"\nCID=[0-9a-f]{1,8}", b"\nCID=0badcafe", bytes(content))
        assert changes == 1
    return child


@makes("vmdk", "encrypted")
def vmdk_encrypted(raw):
    return flat(raw, head='encryption.keySafe = "vmware:key/list/..."')


@makes("vmdk", "cut short")
def vmdk_cut(raw):
    return without_end(converted(with_data(raw), "vmdk"))


@makes("vmdk", "unknown kind")
def vmdk_unknown_kind(raw):
    return flat(raw, kind="somethingNew")


# --- vpc


def footer_changed(image, change, *, signed=True):
    """Change the footer of a VHD and its copy."""
    with edited(image) as content:
        for at in {0, len(content) - 512}:
            if content[at : at + 8] == b"conectix":
                footer = content[at : at + 512]
                change(footer)
                if signed:
                    footer[64:68] = struct.pack(">I", vhd_headers._checksum(bytes(footer), at=64))
                content[at : at + 512] = footer
    return image


def put(at, form, value):
    def change(footer):
        struct.pack_into(form, footer, at, value)

    return change


def vpc(raw, subformat="dynamic"):
    return converted(raw, "vpc", "-o", f"force_size=on,subformat={subformat}")


@makes("vpc", "parent")
def vpc_differencing(raw):
    return footer_changed(vpc(raw), put(60, ">I", 4))


@makes("vpc", "names a parent")
def vpc_names_parent(raw):
    image = vpc(raw)
    with edited(image) as content:
        content[512 + 64 : 512 + 72] = "p.vh".encode("utf-16-be")
        header = content[512:1536]
        header[36:40] = struct.pack(">I", vhd_headers._checksum(bytes(header), at=36))
        content[512:1536] = header
    return image


@makes("vpc", "saved state")
def vpc_saved(raw):
    return footer_changed(vpc(raw), put(84, ">B", 1))


@makes("vpc", "temporary")
def vpc_temporary(raw):
    return footer_changed(vpc(raw), put(8, ">I", 3))


@makes("vpc", "damaged footer")
def vpc_damaged(raw):
    return footer_changed(vpc(raw), put(100, ">B", 77), signed=False)  # a reserved byte, 0 before


@makes("vpc", "cut short")
def vpc_cut(raw):
    image = vpc(raw, "fixed")
    content = image.read_bytes()
    image.write_bytes(content[:1000] + content[1512:])
    return image


@makes("vpc", "geometry is less")
def vpc_small_geometry(raw):
    return footer_changed(vpc(raw), put(56, ">H", 1))


@makes("vpc", "geometry is more")
def vpc_large_geometry(raw):
    return footer_changed(vpc(raw), put(56, ">H", 2000))


# --- vhdx


def vhdx_item(image, item):
    """Offsets of an item's entry in the metadata table and of its value."""
    content = image.read_bytes()
    entry = content.index(item.bytes_le, 1 << 20)
    table = content.index(b"metadata", 1 << 20)
    return entry, table + struct.unpack_from("<I", content, entry + 16)[0]


@makes("vhdx", "parent")
def vhdx_with_parent(raw):
    image = converted(raw, "vhdx")
    _, value = vhdx_item(image, vhd_headers._PARAMETERS)
    with edited(image) as content:
        content[value + 4] |= 2
    return image


@makes("vhdx", "log not replayed")
def vhdx_log(raw):
    image = converted(raw, "vhdx")
    with edited(image) as content:
        for at in vhd_headers._HEADERS:
            header = content[at : at + 4096]
            header[48:64] = uuid.uuid4().bytes
            header[4:8] = bytes(4)
            header[4:8] = struct.pack("<I", vhd_headers._crc32c(bytes(header)))
            content[at : at + 4096] = header
    return image


@makes("vhdx", "cut short")
def vhdx_cut(raw):
    return without_end(converted(with_data(raw), "vhdx"))


def test_read_into_reports_damage_that_qemu_finds(raw):
    image = converted(with_data(raw), "vhdx")
    with edited(image) as content:
        entry = content.index(vhd_headers._BLOCK_TABLE.bytes_le, 192 << 10)
        (table,) = struct.unpack_from("<Q", content, entry + 16)
        content[table] |= 7  # the first block: partially present, which only a differencing disk may have
    with (
        pytest.raises(VolumeUnreadableError, match=r"at byte 0: qemu-nbd cannot read it: .* is damaged"),
        open_volume(image, "vhdx") as volume,
    ):
        volume.read_into(0, memoryview(bytearray(4096)))


@makes("vhdx", "unknown item")
def vhdx_unknown_item(raw):
    image = converted(raw, "vhdx")
    entry, _ = vhdx_item(image, uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746"))
    with edited(image) as content:
        content[entry : entry + 16] = uuid.uuid4().bytes
        content[entry + 24] |= 4
    return image


# --- luks and all formats


@makes("luks", "version")
def luks_2(raw):
    image = converted(raw, "luks")
    with edited(image) as content:
        content[7] = 2
    return image


@makes("any", "other protocol")
def protocol(raw):
    image = converted(raw, "qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "nbd://127.0.0.1:9/x", "-F", "raw", image)
    return image


@makes("any", "file elsewhere")
def elsewhere(raw):
    folder = raw.with_name("elsewhere")
    folder.mkdir()
    return overlay(raw.rename(folder / "base.raw"), "raw").rename(raw.with_name("top.qcow2"))


@makes("any", "image of another format")
def another_format(raw):
    image = converted(raw, "qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", raw.name, "-F", "vdi", image)
    return image


@makes("any", "too large")
def too_large(raw):
    image = raw.with_name("x.qcow2")
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=2M", image, "1E")
    return image


@makes("any", "another size")
def another_size(raw):
    """A VMDK with a second header at its end, which QEMU uses; that header has half of the size."""
    image = converted(raw, "vmdk", "-o", "subformat=streamOptimized")
    with edited(image) as content:
        second = content[:512]
        second[12:20] = struct.pack("<Q", raw.stat().st_size // 512 // 2)
        content[56:64] = b"\xff" * 8
        content.extend(struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + second + bytes(512))
    return image


def format_of(rule, image):
    return rule.format if rule.format != "any" else image.suffix[1:]


@pytest.mark.parametrize("rule", [*REFERENCES, *FINDINGS], ids=lambda rule: f"{rule.format}: {rule.name}")
def test_open_volume_follows_each_rule(raw, rule):
    image = MAKERS[rule.format, rule.name](raw)
    warnings = []
    secret_file = image.with_name("passphrase")
    if secret_file.exists():
        assert secret_file.read_text() == PASSPHRASE

    def open_image():
        with open_volume(
            image, format_of(rule, image), secret_file=secret_file_of(rule, secret_file), on_warning=warnings.append
        ):
            pass

    if rule.decision is Decision.REFUSE:
        with pytest.raises(VolumeUnreadableError, match=re.escape(rule.reason)):
            open_image()
    else:
        open_image()
        assert [warning.public for warning in warnings if rule.reason in warning.public] == [
            warning.public for warning in warnings if rule.decision is Decision.WARN
        ]
        assert bool(warnings) is (rule.decision is Decision.WARN)
        assert not any(str(image.parent) in warning.public for warning in warnings)


def secret_file_of(rule, secret_file):
    return None if rule.format == "raw" else secret_file


def test_every_rule_has_an_image_and_every_format_has_a_rule():
    assert MAKERS.keys() == {(rule.format, rule.name) for rule in (*REFERENCES, *FINDINGS)}
    assert {rule.format for rule in (*REFERENCES, *FINDINGS)} == {*FORMATS, "any"}


@pytest.mark.parametrize(
    "rule", [rule for rule in FINDINGS if rule.is_normal_while_running], ids=lambda rule: f"{rule.format}: {rule.name}"
)
def test_read_metadata_ignores_marks_of_a_running_machine(raw, rule):
    assert not read_metadata(MAKERS[rule.format, rule.name](raw), rule.format).warnings


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["flat extent", "dynamic vpc"])
def test_open_volume_detects_data_beyond_the_end(raw, kind, share):
    """QEMU would read zeros there."""
    with edited(raw) as disk:
        disk[:] = bytes(range(1, 256)) * (len(disk) // 255) + bytes(len(disk) % 255)
    if kind == "flat extent":
        image = flat(raw)
        with edited(raw) as content:
            del content[int(len(content) * share) :]
    else:
        image = vpc(raw)
        with edited(image) as content:
            del content[int(len(content) * share) : -512]
    with pytest.raises(VolumeUnreadableError, match="cut short"), open_volume(image, image.suffix[1:]):
        pass


CUT = [
    ("qcow2", "cluster_size=64k"), ("qcow2", "cluster_size=2M"), ("qcow2", "cluster_size=128k,extended_l2=on"),
    ("qcow2", "compat=0.10"), ("vmdk", "subformat=monolithicSparse"), ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=monolithicFlat"), ("vhdx", "subformat=dynamic"), ("vpc", "force_size=on"),
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 512, 30000])
@pytest.mark.parametrize(("image_format", "options"), CUT, ids=[" ".join(each) for each in CUT])
def test_open_volume_refuses_file_that_ends_within_last_data(raw, image_format, options, count):
    image = converted(with_data(raw), image_format, "-o", options)
    longest = max((file for file in image.parent.iterdir() if file != raw), key=lambda file: file.stat().st_size)
    with open_volume(image, image_format):
        pass
    without_end(longest, count)
    with pytest.raises(VolumeUnreadableError, match=r"cut short|truncated|not a VHD"), open_volume(image, image_format):
        pass


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk"])
def test_open_volume_refuses_cut_backing_image(raw, image_format):
    below = converted(with_data(raw), image_format)
    top = overlay(below, image_format, f"top.{image_format}", image_format)
    without_end(below)
    with pytest.raises(ImageRefusedError, match="cut short"), open_volume(top, image_format):
        pass


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("qcow2", "cluster_size=2M"), ("qcow2", "cluster_size=128k,extended_l2=on"),
        ("qcow2", "preallocation=metadata"), ("vmdk", "subformat=monolithicSparse"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [512, 5120, (1 << 20) + 512, (4 << 20) - 4096])
def test_open_volume_accepts_last_cluster_that_is_not_full(raw, image_format, options, length):
    """The file is shorter if the disk ends within a cluster, or if subclusters are not allocated."""
    raw.write_bytes(b"data" * (length // 4))
    image = converted(raw, image_format, "-o", options)
    with open_volume(image, image_format) as volume:
        content = bytearray(volume.size)
        volume.read_into(0, memoryview(content))
    assert bytes(content) == raw.read_bytes()


def test_open_volume_accepts_single_write_into_last_cluster(raw):
    for options in ("cluster_size=64k", "cluster_size=128k,extended_l2=on"):
        image = raw.with_name("written.qcow2")
        qemu_img("create", "-f", "qcow2", "-o", options, image, "16M")
        qemu_img("bench", "-w", "-c", "1", "-s", "4096", "-o", "102400", "-f", "qcow2", image)
        with open_volume(image, "qcow2"):
            pass


def test_open_volume_refuses_fixed_vhd_with_a_header_in_its_first_sector(raw):
    image, dynamic = vpc(raw, "fixed"), vpc(raw.rename(raw.with_name("other.raw")))
    with edited(image) as content:
        content[:1536] = dynamic.read_bytes()[:1536]
    with pytest.raises(ImageRefusedError, match="footer is damaged"), open_volume(image, "vpc"):
        pass


@pytest.mark.parametrize("first", ["", " 0"])
@pytest.mark.parametrize(("kind", "extent_type"), [("vmfs", "VMFS"), ("monolithicFlat", "FLAT"), ("vmfs", "FLAT")])
def test_open_volume_reads_flat_extent_with_and_without_first_sector(raw, kind, extent_type, first):
    sectors = raw.stat().st_size // 512
    image = flat(raw, kind=kind, extents=[f'RW {sectors} {extent_type} "{raw.name}"{first}'])
    with open_volume(image, "vmdk") as volume:
        content = bytearray(volume.size)
        volume.read_into(0, memoryview(content))
    assert bytes(content) == raw.read_bytes()


def test_open_volume_refuses_vmfs_extent_that_begins_within_its_file(raw):
    image = flat(raw, kind="vmfs", extents=[f'RW 2048 VMFS "{raw.name}" 8'])
    with pytest.raises(VolumeUnreadableError, match="cannot begin at sector 8"), open_volume(image, "vmdk"):
        pass


def test_open_volume_refuses_sparse_vmdk_without_sectors(raw):
    """QEMU would open the files that the descriptor inside names."""
    image = converted(raw, "vmdk")
    with edited(image) as content:
        content[12:20] = bytes(8)
    with pytest.raises(VolumeUnreadableError, match="has no sectors"), open_volume(image, "vmdk"):
        pass
    outer = flat(raw, kind="twoGbMaxExtentSparse", extents=[f'RW 16384 SPARSE "{image.name}"'])
    outer = outer.rename(outer.with_name("outer.vmdk"))
    image.write_bytes(bytes(content))
    with pytest.raises(VolumeUnreadableError, match="has no sectors"), open_volume(outer, "vmdk"):
        pass


VMDK_KINDS = ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")
KINDS = [*(("vmdk", kind) for kind in VMDK_KINDS), ("vpc", "fixed"), ("vhdx", "fixed"), ("vhdx", "dynamic")]


@pytest.mark.parametrize(("image_format", "kind"), KINDS)
def test_open_volume_reads_every_kind_that_qemu_makes(raw, image_format, kind):
    size = "force_size=on," if image_format == "vpc" else ""
    image = converted(raw, image_format, "-o", f"{size}subformat={kind}")
    warnings = []
    with open_volume(image, image_format, on_warning=warnings.append) as volume:
        content = bytearray(volume.size)
        volume.read_into(0, memoryview(content))
    assert (bytes(content), warnings) == (raw.read_bytes(), [])


@pytest.mark.parametrize(
    "line",
    [
        "\n", " ", "RW ", "RW 1 FLAT ", "CID", "parentCID=", "parentFileNameHint", "createType=", "encryption", "\0",
        '"', "rw 16384 FLAT x",
    ],
)  # fmt: skip
def test_descriptor_of_one_megabyte_is_rejected_quickly(raw, line):
    """An algorithm with quadratic time would take hours."""
    image = flat(raw)
    head = image.read_text().replace(f'RW 16384 FLAT "{raw.name}" 0', "")
    for separator in ("", "\n"):
        image.write_text((head + (line + separator) * (1 << 20))[: 1 << 20])
        with pytest.raises(VolumeUnreadableError):
            read_metadata(image, "vmdk")


def test_qcow2_with_a_million_extensions_is_parsed_quickly(raw):
    image = converted(raw, "qcow2", "-o", "cluster_size=2M")
    with edited(image) as content:
        content[104 : 2 << 20] = (b"\1\2\3\4" + bytes(4)) * (((2 << 20) - 104) // 8)
    assert read_metadata(image, "qcow2").files


IMAGES = [("qcow2", 65536), ("vpc", 2048), ("vhdx", 262144 + 1024), ("vmdk", 2048), ("luks", 592)]


@pytest.mark.parametrize(("image_format", "length"), IMAGES, ids=[name for name, _ in IMAGES])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_read_metadata_of_any_header_raises_only_volume_errors(raw, image_format, length, data):
    image = raw.with_name(f"disk.{image_format}")
    if not image.exists():
        converted(raw, image_format)
    damaged, content = image.with_name(f"damaged.{image_format}"), image.read_bytes()
    at = data.draw(st.integers(0, length))
    value = data.draw(st.binary(min_size=1, max_size=16) | st.sampled_from([b"\xff" * 8, bytes(8)]))
    damaged.write_bytes(content[:at] + value + content[at + len(value) :])
    try:
        metadata = read_metadata(damaged, image_format)
    except VolumeError as error:
        assert str(damaged) in str(error)  # noqa: PT017 (either is right)
    else:
        assert metadata.files
