"""Reads the metadata of images of Microsoft's formats: VHD (QEMU's name is vpc) and VHDX.

As in `image_headers`, headers are untrusted and nothing is decided here.

Sources: Microsoft, Virtual Hard Disk Image Format Specification 1.0; [MS-VHDX] v20.0.
"""

import struct
from array import array
from uuid import UUID

from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import HostFile
from thrave.volumes.image_headers import SECTOR, ImageMetadata, read_exactly

# --- VHD ---------------------------------------------------------------------------------------------------------

_COOKIE = b"conectix"
_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_TEMPORARY = 1 << 0
_NOT_STORED = 0xFFFFFFFF
_MAX_BLOCKS = 16 << 20  # 32 TiB in blocks of 2 MiB
_TABLE_PIECE = 1 << 20  # bytes
_MAX_GEOMETRY = 65535 * 16 * 255  # sectors; larger disks have this geometry, too
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB")


def read_vhd(file: HostFile) -> ImageMetadata:
    """Read the footer of a VHD, and the header and block table of a dynamic VHD."""
    footer = _read_footer(file)
    (
        _, features, _, data_offset, _, _, _, _, _, size, cylinders, heads, sectors, kind, checksum, _, saved
    ) = _FOOTER.unpack_from(footer)  # fmt: skip
    metadata = ImageMetadata(size=size, options={"force_size_calc": "current_size"})
    findings = metadata.findings
    if checksum != _checksum(footer, at=64):
        findings.append(("damaged footer", "its checksum is wrong"))
    geometry = cylinders * heads * sectors
    if geometry * SECTOR > size and geometry < _MAX_GEOMETRY:
        findings.append(("geometry is more", f"{geometry * SECTOR} bytes and {size}"))
    if features & _TEMPORARY:
        findings.append(("temporary", ""))
    if saved:
        findings.append(("saved state", ""))
    if kind == _DIFFERENCING:
        findings.append(("parent", _parent_name(file, data_offset)))
    elif kind == _DYNAMIC:
        _read_dynamic(file, metadata, data_offset)
    elif kind != _FIXED:
        raise VolumeUnreadableError(file.path, f"VHD disk type {kind} is not supported")
    elif size + SECTOR > file.size:
        findings.append(("cut short", f"a fixed disk of {size} bytes in a file of {file.size}"))
    elif file.read(0, len(_COOKIE)) == _COOKIE:
        # QEMU would use the bytes there, which the guest can write, as the footer.
        findings.append(("damaged footer", "a fixed disk has another at its beginning"))
    return metadata


def _read_footer(file: HostFile) -> bytes:
    """Read the footer; the copy at the beginning of a dynamic disk must be the same."""
    head = file.read(0, SECTOR)
    if file.is_device and head.startswith(_COOKIE):  # the end of the image on the device is unknown
        return head
    footer = read_exactly(file, max(0, file.size - SECTOR), SECTOR)
    if not footer.startswith(_COOKIE):
        is_cut = head.startswith(_COOKIE)
        reason = "it is cut short: its footer is missing" if is_cut else "it is not a VHD"
        raise VolumeUnreadableError(file.path, reason)
    if head.startswith(_COOKIE) and head != footer and footer[60:64] != struct.pack(">I", _FIXED):
        raise VolumeUnreadableError(file.path, "its footer is damaged: it differs from its copy")
    return footer


def _read_dynamic(file: HostFile, metadata: ImageMetadata, offset: int) -> None:
    assert metadata.size is not None
    header = read_exactly(file, offset, 1024)
    cookie, _, table, _, entries, block, checksum, parent = struct.unpack_from(">8sQQIIII16s", header)
    if cookie != b"cxsparse":
        raise VolumeUnreadableError(file.path, "it is cut short or damaged: it has no header of a dynamic disk")
    if checksum != _checksum(header, at=36):
        metadata.findings.append(("damaged footer", "the checksum of the dynamic disk's header is wrong"))
    if any(parent) or any(header[64:576]):
        metadata.findings.append(("names a parent", _parent_name(file, offset)))
    if not block or block % SECTOR:
        raise VolumeUnreadableError(file.path, f"its header is damaged: a block size of {block} bytes")
    needed = -(-metadata.size // block)
    if needed > entries or needed > _MAX_BLOCKS:
        raise VolumeUnreadableError(file.path, f"its header is damaged: {needed} blocks and a table of {entries}")
    bitmap = -(-block // SECTOR // 8)
    bitmap += -bitmap % SECTOR
    last_block = metadata.size - (needed - 1) * block if needed else 0
    for first in range(0, needed, _TABLE_PIECE // 4):
        piece = array("I", read_exactly(file, table + 4 * first, 4 * min(needed - first, _TABLE_PIECE // 4)))
        piece.byteswap()
        for number, sector in enumerate(piece, start=first):
            stored = last_block if number == needed - 1 else block
            if sector != _NOT_STORED and sector * SECTOR + bitmap + stored > file.size:
                metadata.findings.append(("cut short", f"block {number} is after the end of the file"))
                return


def _parent_name(file: HostFile, offset: int) -> str:
    return file.read(offset + 64, 512).decode("utf-16-be", "replace").rstrip("\0").replace("\\", "/").rpartition("/")[2]


def _checksum(data: bytes, *, at: int) -> int:
    """Return the complement of the sum of all bytes except the checksum itself."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


# --- VHDX --------------------------------------------------------------------------------------------------------

_HEADERS = (64 << 10, 128 << 10)
_HEADER_LENGTH = 4096
_REGIONS = 192 << 10
_MAX_ENTRIES = 2047
_MAX_ITEM_OFFSET = 1 << 20  # bytes of the tables and items of a real image: less than 100 KiB
_MAX_REGION_OFFSET = 1 << 62

_BLOCK_TABLE = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_PARENT = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_KNOWN_ITEMS = frozenset({
    _PARAMETERS, _SIZE, _PARENT,
    UUID("beca12ab-b2e6-4523-93ef-c309e000c746"),  # the disk's id
    UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f"),  # logical sector size
    UUID("cda348c7-445d-4471-9cc9-e9885251c556"),  # physical sector size
})  # fmt: skip
_HAS_PARENT = 1 << 1
_ITEM_REQUIRED = 1 << 2


def read_vhdx(file: HostFile) -> ImageMetadata:
    """Read the current header of a VHDX and its metadata region."""
    if file.read(0, 8) != b"vhdxfile":
        raise VolumeUnreadableError(file.path, "it is not a VHDX image")
    metadata = ImageMetadata(size=None)
    if file.size % SECTOR:  # QEMU rounds up and reads zeros to the end of the sector
        metadata.findings.append(("cut short", f"{file.size} bytes"))
    if any(_read_current_header(file)[48:64]):
        metadata.findings.append(("log not replayed", ""))
    items = _read_items(file, metadata, _find_region(file, metadata, _METADATA))
    if _PARAMETERS not in items or _SIZE not in items:
        raise VolumeUnreadableError(file.path, "it is damaged: its size is missing")
    (flags,) = struct.unpack_from("<I", items[_PARAMETERS].ljust(8, b"\0"), 4)
    if flags & _HAS_PARENT or _PARENT in items:
        metadata.findings.append(("parent", ""))
    (metadata.size,) = struct.unpack("<Q", items[_SIZE].ljust(8, b"\0")[:8])
    return metadata


def _read_current_header(file: HostFile) -> bytes:
    """Return the header that was written last, of the two headers those with a correct checksum."""
    valid = []
    for offset in _HEADERS:
        header = read_exactly(file, offset, _HEADER_LENGTH)
        (checksum,) = struct.unpack_from("<I", header, 4)
        if header.startswith(b"head") and checksum == _crc32c(header[:4] + bytes(4) + header[8:]):
            valid.append(header)
    if not valid:
        raise VolumeUnreadableError(file.path, "it is damaged: neither of its headers is valid")
    return max(valid, key=lambda header: int.from_bytes(header[8:16], "little"))


def _find_region(file: HostFile, metadata: ImageMetadata, wanted: UUID) -> int:
    """Return the offset of a region, in bytes."""
    signature, _, count, _ = struct.unpack("<4sIII", read_exactly(file, _REGIONS, 16))
    if signature != b"regi" or count > _MAX_ENTRIES:
        raise VolumeUnreadableError(file.path, "it is damaged: it has no table of regions")
    found: int | None = None
    for raw_id, offset, _, required in struct.iter_unpack("<16sQII", read_exactly(file, _REGIONS + 16, 32 * count)):
        region = UUID(bytes_le=raw_id)
        if region == wanted:
            found = offset
        elif region != _BLOCK_TABLE and required & 1:
            metadata.findings.append(("unknown item", str(region)))
    if found is None or found > _MAX_REGION_OFFSET:
        raise VolumeUnreadableError(file.path, "it is damaged: it has no metadata")
    return found


def _read_items(file: HostFile, metadata: ImageMetadata, table: int) -> dict[UUID, bytes]:
    """Return the first bytes of each metadata item.

    Args:
        file: The image.
        metadata: Gets a finding for each unknown item that is required.
        table: Offset of the metadata region, in bytes.
    """
    signature, _, count = struct.unpack("<8sHH", read_exactly(file, table, 12))
    if signature != b"metadata" or count > _MAX_ENTRIES:
        raise VolumeUnreadableError(file.path, "it is damaged: it has no table of metadata")
    found: dict[UUID, bytes] = {}
    for raw_id, offset, length, flags, _ in struct.iter_unpack("<16sIIII", read_exactly(file, table + 32, 32 * count)):
        item = UUID(bytes_le=raw_id)
        if item not in _KNOWN_ITEMS and flags & _ITEM_REQUIRED:
            metadata.findings.append(("unknown item", str(item)))
        if offset > _MAX_ITEM_OFFSET:
            raise VolumeUnreadableError(file.path, "it is damaged: a metadata item is outside the region")
        found[item] = read_exactly(file, table + offset, min(length, 16))
    return found


def _crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli), which VHDX uses; zlib has only CRC-32."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_TABLE = [_crc_of(byte) for byte in range(256)]
