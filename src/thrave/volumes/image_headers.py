"""What a disk image states of itself: its size, the files that it refers to, and its marks. Here: raw, qcow2 and LUKS.

Headers come from strangers: every number is checked before anything is read by it, and no more is read than a few
megabytes. Nothing is decided here (that is `marks`), no other file is opened, and no guest's data is read.

Sources: docs/interop/qcow2.txt of QEMU; LUKS On-Disk Format Specification 1.2.3.
"""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import HostFile

SECTOR = 512


class Reference(NamedTuple):
    """Another file, in the image's own words."""

    name: str
    format: str | None
    """In QEMU's words; None if the image does not say."""


class Extent(NamedTuple):
    """A file that a VMDK keeps data in."""

    name: str
    type: str
    sectors: int
    first_sector: int | None
    """Where in the file it begins, if the descriptor says so."""


@dataclass(kw_only=True)
class Statement:
    """What an image states.

    Attributes:
        size: Of the disk, in bytes, as its guest sees it; None if the format has no place for it.
        marks: Names of rows of `marks.MARKS` and `marks.REFERENCES` of the image's format, and the particulars of each.
        backing: The image that it stands on.
        extents: The files that a VMDK keeps its data in, besides itself.
        encrypted: It cannot be read without a passphrase.
        options: What QEMU's block driver must be told.
        identity: Of a VMDK its CID, create type, and the CID of its parent.
    """

    size: int | None
    marks: list[tuple[str, str]] = field(default_factory=list)
    backing: Reference | None = None
    extents: tuple[Extent, ...] = ()
    encrypted: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    identity: "VmdkIdentity | None" = None


class VmdkIdentity(NamedTuple):
    """What a VMDK's descriptor says of which image it is, and of which parent."""

    content_id: int
    parent_id: int | None
    create_type: str


def exactly(file: HostFile, offset: int, length: int) -> bytes:
    """Read a piece of a header.

    Raises:
        VolumeUnreadableError: The file ends before it.
    """
    data = file.read(offset, length)
    if len(data) < length:
        raise VolumeUnreadableError(file.path, f"it is cut short: it ends at byte {file.size}, in its header")
    return data


def refuse(file: HostFile, why: str) -> VolumeUnreadableError:
    """The error of an image that cannot be of its format."""
    return VolumeUnreadableError(file.path, why)


def names_a_protocol(name: str) -> bool:
    """Whether QEMU would take a name for a protocol and what follows: a colon comes before any slash."""
    colon, slash = name.find(":"), name.find("/")
    return colon >= 0 and (slash < 0 or colon < slash)


# --- raw ---------------------------------------------------------------------------------------------------------

_HEAD_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"QED\0", "qed"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"EVF\x09\r\n\xff\0", "ewf"),
    # Archives in which images are handed on.
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"PK\3\4", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (257, b"ustar", "tar"),
)
_TAIL_MAGICS = ((b"conectix", "vpc"), (b"koly", "dmg"))  # fmt: skip


def apparent_format(file: HostFile) -> str | None:
    """The format of which a file's first bytes, or its last, are; None if they are of none that is known.

    It is a hint and no more: a guest can write anything into the first sector of its raw disk.
    """
    head = file.read(0, SECTOR)
    for offset, magic, image_format in _HEAD_MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return image_format
    tail = file.read(file.size - SECTOR, 8) if file.size >= SECTOR else b""
    return next((image_format for magic, image_format in _TAIL_MAGICS if tail.startswith(magic)), None)


def read_raw(file: HostFile) -> Statement:
    """A raw disk states nothing. One that begins as LUKS does is not marked: a machine may encrypt its own disk."""
    statement = Statement(size=file.size)
    with suppress(VolumeUnreadableError):  # whoever reads the disk meets that, too
        if (apparent := apparent_format(file)) not in {None, "luks"}:
            statement.marks.append(("looks like another format", str(apparent)))
    return statement


# --- qcow2 -------------------------------------------------------------------------------------------------------

_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")  # to snapshots_offset
_QCOW2_FEATURES = struct.Struct(">QQQII")  # incompatible, compatible, autoclear, refcount order, header length
_DIRTY, _CORRUPT, _DATA_FILE = 1 << 0, 1 << 1, 1 << 2
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | 1 << 3 | 1 << 4  # compression type, extended L2
_EXTENDED_L2 = 1 << 4
_OFFSET, _COPIED = 0x00FFFFFFFFFFFE00, 1 << 63  # of an entry of the tables of clusters
_LONGEST_BACKING_NAME = 1023
_BACKING_FORMAT, _EXTERNAL_DATA_FILE = 0xE2792ACA, 0x44415441


def read_qcow2(file: HostFile) -> Statement:
    """Read a qcow2 image's header and its extensions, of versions 2 and 3."""
    (
        magic, version, backing_offset, backing_length, cluster_bits, size, crypt_method, _, _, _, _, snapshots, _
    ) = _QCOW2.unpack(exactly(file, 0, _QCOW2.size))  # fmt: skip
    if magic != b"QFI\xfb":
        raise refuse(file, "it is no qcow2 image")
    if version not in {2, 3} or not 9 <= cluster_bits <= 21:
        raise refuse(
            file, f"it is qcow2 of version {version} with clusters of 2^{cluster_bits} bytes, which is not read"
        )
    cluster = 1 << cluster_bits
    incompatible, header_length = 0, _QCOW2.size
    if version == 3:
        incompatible, _, _, _, header_length = _QCOW2_FEATURES.unpack(exactly(file, 72, _QCOW2_FEATURES.size))
        if not 104 <= header_length <= cluster:
            raise refuse(file, f"its header says that it is {header_length} bytes long")
    if backing_offset and not (backing_offset <= cluster and backing_length <= _LONGEST_BACKING_NAME):
        raise refuse(file, "the name of the image that it stands on does not lie in its header")
    extensions = _qcow2_extensions(file, header_length, backing_offset or cluster)
    statement = Statement(size=size, encrypted=crypt_method != 0)
    if _EXTERNAL_DATA_FILE in extensions:
        incompatible |= _DATA_FILE
    statement.marks.extend(_qcow2_marks(incompatible, snapshots))
    if backing_offset and backing_length:
        name = os.fsdecode(exactly(file, backing_offset, backing_length))
        stated = extensions.get(_BACKING_FORMAT)
        statement.backing = Reference(name, None if stated is None else stated.decode("ascii", "replace"))
    return statement


def read_qcow2_end(file: HostFile) -> list[tuple[str, str]]:
    """The mark of a qcow2 image whose file ends within the data of a cluster: `qemu-img check` accepts that.

    To be called for an image that `qemu-img check` has accepted and that nothing writes to.
    """
    (
        _, version, _, _, cluster_bits, size, _, l1_entries, l1_offset, *_
    ) = _QCOW2.unpack(exactly(file, 0, _QCOW2.size))  # fmt: skip
    cluster = 1 << cluster_bits
    stored = file.size % cluster
    if not stored:  # whole clusters that are missing are found by qemu-img check
        return []
    (features,) = struct.unpack(">Q", exactly(file, 72, 8)) if version == 3 else (0,)
    entry_size = 16 if features & _EXTENDED_L2 else 8
    in_table = cluster // entry_size
    l1_used = min(l1_entries, -(-size // (in_table * cluster)))
    for number, (entry,) in enumerate(struct.iter_unpack(">Q", exactly(file, l1_offset, 8 * l1_used))):
        if not (table_offset := entry & _OFFSET):
            continue
        table = exactly(file, table_offset, cluster)
        for copied in (0, _COPIED):
            at = _find_entry(table, struct.pack(">Q", file.size - stored | copied), entry_size)
            if at is None:
                continue
            needed = _subclusters_end(table[at + 8 : at + 16], cluster) if entry_size == 16 else cluster
            needed = min(needed, size - (number * in_table + at // entry_size) * cluster)
            if needed > stored:
                return [("cut short", f"{needed - stored} bytes are missing")]
    return []


def _find_entry(table: bytes, entry: bytes, size: int) -> int | None:
    """Where an entry of 8 bytes stands in a table whose entries have `size` bytes each."""
    at = table.find(entry)
    while at >= 0 and at % size:
        at = table.find(entry, at + 1)
    return at if at >= 0 else None


def _subclusters_end(bitmap: bytes, cluster: int) -> int:
    """Up to which byte a cluster has data, by the lower half of its bitmap: the subclusters that are stored."""
    return (int.from_bytes(bitmap, "big") & 0xFFFFFFFF).bit_length() * (cluster // 32)


def _qcow2_marks(incompatible: int, snapshots: int) -> Iterator[tuple[str, str]]:
    """What the bits of the incompatible features and the number of snapshots mean."""
    for bit, name in ((_DATA_FILE, "data file"), (_CORRUPT, "corrupt"), (_DIRTY, "dirty")):
        if incompatible & bit:
            yield name, ""
    if unknown := incompatible & ~_KNOWN_FEATURES:
        yield "unknown feature", f"{unknown:#x}"
    if snapshots:
        yield "internal snapshots", str(snapshots)


def _qcow2_extensions(file: HostFile, offset: int, end: int) -> dict[int, bytes]:
    """The extensions that say something about other files, each by its kind."""
    found: dict[int, bytes] = {}
    header = file.read(0, end)  # at most 2 MiB
    while offset + 8 <= min(end, len(header)):
        kind, length = struct.unpack_from(">II", header, offset)
        if kind == 0:
            break
        if offset + 8 + length > end:
            raise refuse(file, f"its header is damaged: an extension at byte {offset} is longer than the header")
        if kind in {_BACKING_FORMAT, _EXTERNAL_DATA_FILE}:
            found[kind] = header[offset + 8 : offset + 8 + min(length, 1024)]
        offset += 8 + length + -length % 8
    return found


# --- LUKS --------------------------------------------------------------------------------------------------------


def read_luks(file: HostFile) -> Statement:
    """Read the header of a disk in LUKS: what follows it is the disk."""
    magic, version = struct.unpack(">6sH", exactly(file, 0, 8))
    if magic != b"LUKS\xba\xbe":
        raise refuse(file, "it is no disk in LUKS")
    if version != 1:
        return Statement(size=None, encrypted=True, marks=[("version", str(version))])
    (first_sector,) = struct.unpack(">I", exactly(file, 104, 4))
    if first_sector * SECTOR > file.size:
        raise refuse(file, "it is cut short: it ends before its data begins")
    return Statement(size=file.size - first_sector * SECTOR, encrypted=True)


Reader = Callable[[HostFile], Statement]
