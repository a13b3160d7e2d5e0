"""Reads the metadata of disk images: size, references to other files, findings. Here: raw, qcow2 and LUKS.

Headers are untrusted: each number is checked before it is used as an offset or length, and at most a few megabytes are
read. Nothing is decided here (`image_rules` does that), no other file is opened, and no data of the guest is read.

Sources: docs/interop/qcow2.txt of QEMU; LUKS On-Disk Format Specification 1.2.3.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import HostFile

SECTOR = 512


class Reference(NamedTuple):
    """Another file, as the image names it."""

    name: str
    format: str | None
    """QEMU's name of the format; None if the image has none."""


class VmdkExtent(NamedTuple):
    """A file with data of a VMDK."""

    name: str
    type: str
    sectors: int
    first_sector: int | None
    """Where in the file the data begins; None if the descriptor does not contain it."""


@dataclass(kw_only=True)
class ImageMetadata:
    """What the header of an image contains.

    Attributes:
        size: Size of the disk as its guest sees it, in bytes; None if the format does not record it.
        findings: (name of a rule in `image_rules.FINDINGS` or `image_rules.REFERENCES`, details or an empty text).
        backing: The backing file.
        extents: The other files with data of a VMDK.
        is_encrypted: Whether a passphrase is needed.
        options: Options for QEMU's block driver.
        identity: Only of a VMDK.
    """

    size: int | None
    findings: list[tuple[str, str]] = field(default_factory=list)
    backing: Reference | None = None
    extents: tuple[VmdkExtent, ...] = ()
    is_encrypted: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    identity: "VmdkIdentity | None" = None


class VmdkIdentity(NamedTuple):
    """The identity in the descriptor of a VMDK."""

    content_id: int
    """CID, which changes with the content."""
    parent_id: int | None
    """The CID that the parent must have; None: no parent."""
    create_type: str


def read_exactly(file: HostFile, offset: int, length: int) -> bytes:
    """Read a part of a header.

    Raises:
        VolumeUnreadableError: The file ends before the end of this part.
    """
    data = file.read(offset, length)
    if len(data) < length:
        raise VolumeUnreadableError(file.path, f"it is cut short: it ends at byte {file.size}, in its header")
    return data


def has_protocol(name: str) -> bool:
    """Return whether QEMU would read a name as `protocol:…`: it has a colon before the first slash."""
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
    # Archives in which images are distributed.
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"PK\3\4", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (257, b"ustar", "tar"),
)
_TAIL_MAGICS = ((b"conectix", "vpc"), (b"koly", "dmg"))  # fmt: skip


def guess_format(file: HostFile) -> str | None:
    """Return the format to which a file's first or last bytes belong; None if unknown.

    Only a hint: a guest can write anything into the first sector of its raw disk.
    """
    head = file.read(0, SECTOR)
    for offset, magic, image_format in _HEAD_MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return image_format
    tail = file.read(file.size - SECTOR, 8) if file.size >= SECTOR else b""
    return next((image_format for magic, image_format in _TAIL_MAGICS if tail.startswith(magic)), None)


def read_raw(file: HostFile) -> ImageMetadata:
    """Read a raw disk, which has no header. LUKS at its beginning is no finding: a guest may encrypt its own disk."""
    metadata = ImageMetadata(size=file.size)
    with suppress(VolumeUnreadableError):  # reading the disk will report the same error
        if (guess := guess_format(file)) not in {None, "luks"}:
            metadata.findings.append(("looks like another format", str(guess)))
    return metadata


# --- qcow2 -------------------------------------------------------------------------------------------------------

_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")  # to snapshots_offset
_QCOW2_FEATURES = struct.Struct(">QQQII")  # incompatible, compatible, autoclear, refcount order, header length
_DIRTY, _CORRUPT, _DATA_FILE = 1 << 0, 1 << 1, 1 << 2
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | 1 << 3 | 1 << 4  # compression type, extended L2
_EXTENDED_L2 = 1 << 4
_OFFSET, _COPIED = 0x00FFFFFFFFFFFE00, 1 << 63  # bits of an L1 or L2 entry
_MAX_BACKING_NAME = 1023
_BACKING_FORMAT, _EXTERNAL_DATA_FILE = 0xE2792ACA, 0x44415441


def read_qcow2(file: HostFile) -> ImageMetadata:
    """Read the header and the header extensions of a qcow2 image of version 2 or 3."""
    (
        magic, version, backing_offset, backing_length, cluster_bits, size, crypt_method, _, _, _, _, snapshots, _
    ) = _QCOW2.unpack(read_exactly(file, 0, _QCOW2.size))  # fmt: skip
    if magic != b"QFI\xfb":
        raise VolumeUnreadableError(file.path, "it is not a qcow2 image")
    if version not in {2, 3} or not 9 <= cluster_bits <= 21:
        raise VolumeUnreadableError(
            file.path, f"qcow2 version {version} with clusters of 2^{cluster_bits} bytes is not supported"
        )
    cluster = 1 << cluster_bits
    incompatible, header_length = 0, _QCOW2.size
    if version == 3:
        incompatible, _, _, _, header_length = _QCOW2_FEATURES.unpack(read_exactly(file, 72, _QCOW2_FEATURES.size))
        if not 104 <= header_length <= cluster:
            raise VolumeUnreadableError(file.path, f"its header is damaged: a header length of {header_length} bytes")
    if backing_offset and not (backing_offset <= cluster and backing_length <= _MAX_BACKING_NAME):
        raise VolumeUnreadableError(file.path, "the name of its backing file is not within its header")
    extensions = _qcow2_extensions(file, header_length, backing_offset or cluster)
    metadata = ImageMetadata(size=size, is_encrypted=crypt_method != 0)
    if _EXTERNAL_DATA_FILE in extensions:
        incompatible |= _DATA_FILE
    metadata.findings.extend(_qcow2_findings(incompatible, snapshots))
    if backing_offset and backing_length:
        name = os.fsdecode(read_exactly(file, backing_offset, backing_length))
        backing_format = extensions.get(_BACKING_FORMAT)
        metadata.backing = Reference(
            name, None if backing_format is None else backing_format.decode("ascii", "replace")
        )
    return metadata


def check_qcow2_end(file: HostFile) -> list[tuple[str, str]]:
    """Return the finding about a qcow2 file that ends within the data of a cluster, which `qemu-img check` accepts.

    Call it after `qemu-img check` has accepted the image, while nothing writes to it.
    """
    (
        _, version, _, _, cluster_bits, size, _, l1_entries, l1_offset, *_
    ) = _QCOW2.unpack(read_exactly(file, 0, _QCOW2.size))  # fmt: skip
    cluster = 1 << cluster_bits
    stored = file.size % cluster
    if not stored:  # qemu-img check detects missing clusters
        return []
    (features,) = struct.unpack(">Q", read_exactly(file, 72, 8)) if version == 3 else (0,)
    entry_size = 16 if features & _EXTENDED_L2 else 8
    entries_per_table = cluster // entry_size
    l1_used = min(l1_entries, -(-size // (entries_per_table * cluster)))
    for number, (entry,) in enumerate(struct.iter_unpack(">Q", read_exactly(file, l1_offset, 8 * l1_used))):
        if not (table_offset := entry & _OFFSET):
            continue
        table = read_exactly(file, table_offset, cluster)
        for copied in (0, _COPIED):
            position = _find_entry(table, struct.pack(">Q", file.size - stored | copied), entry_size)
            if position is None:
                continue
            needed = cluster
            if entry_size == 16:
                # The lower half of the bitmap after the entry: which subclusters are allocated.
                bitmap = int.from_bytes(table[position + 8 : position + 16], "big") & 0xFFFFFFFF
                needed = bitmap.bit_length() * (cluster // 32)
            needed = min(needed, size - (number * entries_per_table + position // entry_size) * cluster)
            if needed > stored:
                return [("cut short", f"{needed - stored} bytes are missing")]
    return []


def _find_entry(table: bytes, entry: bytes, size: int) -> int | None:
    """Return the position of an entry of 8 bytes in a table whose entries have `size` bytes each, or None."""
    position = table.find(entry)
    while position >= 0 and position % size:
        position = table.find(entry, position + 1)
    return position if position >= 0 else None


def _qcow2_findings(incompatible: int, snapshots: int) -> Iterator[tuple[str, str]]:
    """Yield the findings for the bits of the incompatible features and the number of snapshots."""
    for bit, name in ((_DATA_FILE, "data file"), (_CORRUPT, "corrupt"), (_DIRTY, "dirty")):
        if incompatible & bit:
            yield name, ""
    if unknown := incompatible & ~_KNOWN_FEATURES:
        yield "unknown feature", f"{unknown:#x}"
    if snapshots:
        yield "internal snapshots", str(snapshots)


def _qcow2_extensions(file: HostFile, offset: int, end: int) -> dict[int, bytes]:
    """Return the header extensions that refer to other files, by their type."""
    found: dict[int, bytes] = {}
    header = file.read(0, end)  # at most 2 MiB
    while offset + 8 <= min(end, len(header)):
        kind, length = struct.unpack_from(">II", header, offset)
        if kind == 0:
            break
        if offset + 8 + length > end:
            raise VolumeUnreadableError(
                file.path, f"its header is damaged: an extension at byte {offset} is longer than the header"
            )
        if kind in {_BACKING_FORMAT, _EXTERNAL_DATA_FILE}:
            found[kind] = header[offset + 8 : offset + 8 + min(length, 1024)]
        offset += 8 + length + -length % 8
    return found


# --- LUKS --------------------------------------------------------------------------------------------------------


def read_luks(file: HostFile) -> ImageMetadata:
    """Read the header of a disk in LUKS; the disk follows the header."""
    magic, version = struct.unpack(">6sH", read_exactly(file, 0, 8))
    if magic != b"LUKS\xba\xbe":
        raise VolumeUnreadableError(file.path, "it is not a disk in LUKS")
    if version != 1:
        return ImageMetadata(size=None, is_encrypted=True, findings=[("version", str(version))])
    (first_sector,) = struct.unpack(">I", read_exactly(file, 104, 4))
    if first_sector * SECTOR > file.size:
        raise VolumeUnreadableError(file.path, "it is cut short: it ends before the beginning of its data")
    return ImageMetadata(size=file.size - first_sector * SECTOR, is_encrypted=True)
