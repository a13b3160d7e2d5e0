"""What images of Microsoft's formats state of themselves: VHD (QEMU calls it vpc) and VHDX.

As `headers`: every number is checked before anything is read by it, and nothing is decided here.

Sources: Microsoft, Virtual Hard Disk Image Format Specification 1.0; [MS-VHDX] v20.0.
"""

import struct
from array import array
from uuid import UUID

from thrave.volumes.host_files import HostFile
from thrave.volumes.image_headers import SECTOR, Statement, exactly, refuse

# --- VHD ---------------------------------------------------------------------------------------------------------

_COOKIE = b"conectix"
_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_TEMPORARY = 1 << 0
_NOT_STORED = 0xFFFFFFFF
_MOST_BLOCKS = 16 << 20  # 32 TiB in blocks of 2 MiB
_TABLE_PIECE = 1 << 20  # bytes
_LARGEST_GEOMETRY = 65535 * 16 * 255  # sectors; a larger disk has it, too
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB")


def read_vhd(file: HostFile) -> Statement:
    """Read a VHD's footer, and of a dynamic one its header and the table of its blocks."""
    footer = _footer(file)
    (
        _, features, _, data_offset, _, _, _, _, _, size, cylinders, heads, sectors, kind, checksum, _, saved
    ) = _FOOTER.unpack_from(footer)  # fmt: skip
    statement = Statement(size=size, options={"force_size_calc": "current_size"})
    marks = statement.marks
    if checksum != _checksum(footer, at=64):
        marks.append(("damaged footer", "its checksum is wrong"))
    geometry = cylinders * heads * sectors
    if geometry * SECTOR > size and geometry < _LARGEST_GEOMETRY:
        marks.append(("geometry is more", f"{geometry * SECTOR} bytes and {size}"))
    if features & _TEMPORARY:
        marks.append(("temporary", ""))
    if saved:
        marks.append(("saved state", ""))
    if kind == _DIFFERENCING:
        marks.append(("parent", _parent_name(file, data_offset)))
    elif kind == _DYNAMIC:
        _read_dynamic(file, statement, data_offset)
    elif kind != _FIXED:
        raise refuse(file, f"it is a VHD of disk type {kind}, which is not read")
    elif size + SECTOR > file.size:
        marks.append(("cut short", f"a fixed disk of {size} bytes in a file of {file.size}"))
    elif file.read(0, len(_COOKIE)) == _COOKIE:
        # QEMU would take what the guest has written there for the footer.
        marks.append(("damaged footer", "a fixed disk has another at its beginning"))
    return statement


def _footer(file: HostFile) -> bytes:
    """The footer; of a dynamic disk the copy at the beginning must be the same."""
    head = file.read(0, SECTOR)
    if file.is_device and head.startswith(_COOKIE):  # nobody knows where on the device the image ends
        return head
    footer = exactly(file, max(0, file.size - SECTOR), SECTOR)
    if not footer.startswith(_COOKIE):
        cut = "it is cut short: its footer is missing" if head.startswith(_COOKIE) else "it is no VHD"
        raise refuse(file, cut)
    if head.startswith(_COOKIE) and head != footer and footer[60:64] != struct.pack(">I", _FIXED):
        raise refuse(file, "its footer is damaged: it is not the same as its copy")
    return footer


def _read_dynamic(file: HostFile, statement: Statement, offset: int) -> None:
    assert statement.size is not None
    header = exactly(file, offset, 1024)
    cookie, _, table, _, entries, block, checksum, parent = struct.unpack_from(">8sQQIIII16s", header)
    if cookie != b"cxsparse":
        raise refuse(file, "it is cut short or damaged: it has no header of a dynamic disk")
    if checksum != _checksum(header, at=36):
        statement.marks.append(("damaged footer", "the checksum of the dynamic disk's header is wrong"))
    if any(parent) or any(header[64:576]):
        statement.marks.append(("names a parent", _parent_name(file, offset)))
    if not block or block % SECTOR:
        raise refuse(file, f"it says that its blocks have {block} bytes")
    needed = -(-statement.size // block)
    if needed > entries or needed > _MOST_BLOCKS:
        raise refuse(file, f"it needs {needed} blocks, and has a table of {entries}")
    bitmap = -(-block // SECTOR // 8)
    bitmap += -bitmap % SECTOR
    last_block = statement.size - (needed - 1) * block if needed else 0
    for first in range(0, needed, _TABLE_PIECE // 4):
        piece = array("I", exactly(file, table + 4 * first, 4 * min(needed - first, _TABLE_PIECE // 4)))
        piece.byteswap()
        for number, sector in enumerate(piece, start=first):
            stored = last_block if number == needed - 1 else block
            if sector != _NOT_STORED and sector * SECTOR + bitmap + stored > file.size:
                statement.marks.append(("cut short", f"block {number} lies beyond its end"))
                return


def _parent_name(file: HostFile, offset: int) -> str:
    return file.read(offset + 64, 512).decode("utf-16-be", "replace").rstrip("\0").replace("\\", "/").rpartition("/")[2]


def _checksum(data: bytes, *, at: int) -> int:
    """The complement of the sum of all bytes but those of the checksum itself."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


# --- VHDX --------------------------------------------------------------------------------------------------------

_HEADERS = (64 << 10, 128 << 10)
_HEADER_LENGTH = 4096
_REGIONS = 192 << 10
_MOST_ENTRIES = 2047
_MOST_METADATA = 1 << 20  # bytes of the tables and items of a real image: less than 100 KiB
_LAST_HOST_BYTE = 1 << 62

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


def read_vhdx(file: HostFile) -> Statement:
    """Read a VHDX's current header and its metadata."""
    if file.read(0, 8) != b"vhdxfile":
        raise refuse(file, "it is no VHDX image")
    statement = Statement(size=None)
    if file.size % SECTOR:  # QEMU rounds up, and reads zeros to the end of the sector
        statement.marks.append(("cut short", f"{file.size} bytes"))
    if any(_current_header(file)[48:64]):
        statement.marks.append(("log not replayed", ""))
    metadata = _region(file, statement, _METADATA)
    items = _items(file, statement, metadata)
    if _PARAMETERS not in items or _SIZE not in items:
        raise refuse(file, "it is damaged: it does not say its size")
    (flags,) = struct.unpack_from("<I", items[_PARAMETERS].ljust(8, b"\0"), 4)
    if flags & _HAS_PARENT or _PARENT in items:
        statement.marks.append(("parent", ""))
    (statement.size,) = struct.unpack("<Q", items[_SIZE].ljust(8, b"\0")[:8])
    return statement


def _current_header(file: HostFile) -> bytes:
    """The one of the two headers that is whole and has been written last."""
    whole = []
    for offset in _HEADERS:
        header = exactly(file, offset, _HEADER_LENGTH)
        (checksum,) = struct.unpack_from("<I", header, 4)
        if header.startswith(b"head") and checksum == _crc32c(header[:4] + bytes(4) + header[8:]):
            whole.append(header)
    if not whole:
        raise refuse(file, "it is damaged: neither of its headers is whole")
    return max(whole, key=lambda header: int.from_bytes(header[8:16], "little"))


def _region(file: HostFile, statement: Statement, wanted: UUID) -> int:
    """Where a region begins, in bytes."""
    signature, _, count, _ = struct.unpack("<4sIII", exactly(file, _REGIONS, 16))
    if signature != b"regi" or count > _MOST_ENTRIES:
        raise refuse(file, "it is damaged: it has no table of regions")
    found: int | None = None
    for raw_id, offset, _, required in struct.iter_unpack("<16sQII", exactly(file, _REGIONS + 16, 32 * count)):
        region = UUID(bytes_le=raw_id)
        if region == wanted:
            found = offset
        elif region != _BLOCK_TABLE and required & 1:
            statement.marks.append(("unknown item", str(region)))
    if found is None or found > _LAST_HOST_BYTE:
        raise refuse(file, "it is damaged: it has no metadata")
    return found


def _items(file: HostFile, statement: Statement, metadata: int) -> dict[UUID, bytes]:
    """The first bytes of each item of the metadata."""
    signature, _, count = struct.unpack("<8sHH", exactly(file, metadata, 12))
    if signature != b"metadata" or count > _MOST_ENTRIES:
        raise refuse(file, "it is damaged: it has no table of metadata")
    found: dict[UUID, bytes] = {}
    for raw_id, offset, length, flags, _ in struct.iter_unpack("<16sIIII", exactly(file, metadata + 32, 32 * count)):
        item = UUID(bytes_le=raw_id)
        if item not in _KNOWN_ITEMS and flags & _ITEM_REQUIRED:
            statement.marks.append(("unknown item", str(item)))
        if offset > _MOST_METADATA:
            raise refuse(file, "it is damaged: an item of its metadata lies outside")
        found[item] = exactly(file, metadata + offset, min(length, 16))
    return found


def _crc32c(data: bytes) -> int:
    """Castagnoli's CRC, as VHDX has it; zlib's is another."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_TABLE = [_crc_of(byte) for byte in range(256)]
