"""What a VMDK states of itself: a descriptor in text, alone or inside a sparse file, and the headers of sparse files.

As `headers`: every number is checked before anything is read by it, and nothing is decided here. QEMU leaves out lines
of a descriptor that it does not understand, and looks for some words wherever they stand; what is read here is what it
would read, and what it would leave out is said.

Sources: VMware, Virtual Disk Format 5.0; QEMU 7.2, block/vmdk.c.
"""

import os
import re
import struct
import sys
from array import array

from thrave.volumes.host_files import HostFile
from thrave.volumes.image_headers import SECTOR, Extent, Reference, Statement, VmdkIdentity, exactly, refuse

_SPARSE = struct.Struct("<4sIIQQQQIQQQB")
_LONGEST_DESCRIPTOR = 1 << 20  # QEMU reads no more
_NO_PARENT = 0xFFFFFFFF
_COMPRESSION_OFFSET = 77
_AT_THE_END = 0xFFFFFFFFFFFFFFFF  # the directory is named by a second header at the end of a compressed file
_MOST_IN_TABLE = 512  # QEMU opens no other
_DIRECTORY_PIECE = 1 << 18  # entries
_ZERO_GRAIN = 1  # stands for a grain of zeros, and 0 for one that is not stored

_DATA = frozenset({"FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE"})
FLAT = frozenset({"FLAT", "VMFS"})
"""Types of extents that are raw."""
_WITH_FILES = frozenset(
    {"monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"}
)
_IN_ONE_FILE = frozenset({"monolithicSparse", "streamOptimized"})
_PHYSICAL = frozenset({
    "fullDevice", "partitionedDevice", "vmfsRDM", "vmfsRDMP", "vmfsRaw", "vmfsRawDeviceMap",
    "vmfsPassthroughRawDeviceMap",
})  # fmt: skip
_PHYSICAL_TYPES = frozenset({"VMFSRDM", "VMFSRDMP", "VMFSRAW"})

# White space is never a line's end here: a run of a million empty lines must not be looked at a million times.
_EXTENT = re.compile(
    r"^[ \t]*(?P<access>RW|RDONLY|NOACCESS)[ \t]+(?P<sectors>\d{1,18})[ \t]+(?P<type>\w{1,32})"
    r'(?:[ \t]+"(?P<name>[^"\r\n]{1,511})")?(?:[ \t]+(?P<first>\d{1,18}))?[ \t\r]*$',
    re.MULTILINE,
)
_ANY_EXTENT = re.compile(r"^[ \t]*(?:RW|RDONLY|NOACCESS)\b", re.MULTILINE | re.IGNORECASE)
_CREATE_TYPE = re.compile(r'createType[ \t]*=[ \t]*"([^"\r\n]{0,100})"')
_CONTENT_ID = re.compile(r"^[ \t]*CID[ \t]*=[ \t]*([0-9a-fA-F]{1,8})", re.MULTILINE)
_PARENT_ID = re.compile(r"parentCID[ \t]*=[ \t]*([0-9a-fA-F]{1,8})")
_PARENT_NAME = re.compile(r'parentFileNameHint[ \t]*=?[ \t]*"?([^"\r\n]*)')
_ENCIPHERED = re.compile(r"^[ \t]*encryption\.", re.MULTILINE)


def read_vmdk(file: HostFile) -> Statement:
    """Read a VMDK: a descriptor that names the files with the data, or one sparse file that has it all."""
    magic = file.read(0, 4)
    if magic == b"COWD":
        raise refuse(file, "it is a part of a VMDK: the file that names it, its descriptor, must be given")
    if magic == b"KDMV":
        return _read_sparse_image(file)
    if file.size > _LONGEST_DESCRIPTOR:
        raise refuse(file, "it is no VMDK")
    text = os.fsdecode(file.read(0, _LONGEST_DESCRIPTOR)).partition("\0")[0]
    statement = _read_descriptor(file, text)
    assert statement.identity is not None
    kind = statement.identity.create_type
    if kind not in _WITH_FILES | _PHYSICAL:
        statement.marks.append(("unknown kind", kind))
    statement.extents = tuple(_extents(file, statement, text))
    statement.size = sum(extent.sectors for extent in statement.extents) * SECTOR
    return statement


def read_extent(file: HostFile, extent: Extent) -> list[tuple[str, str]]:
    """The marks of a file in which a VMDK keeps data.

    Raises:
        VolumeUnreadableError: It cannot be such a file, or is cut short.
    """
    if extent.type in FLAT:
        if ((extent.first_sector or 0) + extent.sectors) * SECTOR > file.size:
            raise refuse(file, f"it is cut short: {extent.sectors} sectors are to lie in it")
        return []
    if extent.type != "SPARSE" or file.read(0, 4) == b"COWD":
        return []  # QEMU reads these by headers that refer to nothing
    capacity, marks, *_ = _sparse_header(file)
    if capacity != extent.sectors:
        raise refuse(file, f"it says that it has {capacity} sectors, and its descriptor {extent.sectors}")
    return marks


def read_end(file: HostFile) -> list[tuple[str, str]]:
    """The mark of a sparse file that ends within a grain: QEMU reads zeros there. Other files have none.

    To be called for a file that `qemu-img check` has accepted and that nothing writes to.
    """
    if file.read(0, 4) != b"KDMV":
        return []
    header = exactly(file, 0, SECTOR)
    _, _, _, capacity, grain, _, _, in_table, _, directory, *_ = _SPARSE.unpack_from(header)
    (compression,) = struct.unpack_from("<H", header, _COMPRESSION_OFFSET)
    if compression or directory == _AT_THE_END:  # a grain that is cut short cannot be decompressed
        return []
    if not grain or not in_table or in_table > _MOST_IN_TABLE:
        raise refuse(file, "its header is damaged: it does not say the size of its grains")
    tables = -(-capacity // (grain * in_table))
    for first in range(0, tables, _DIRECTORY_PIECE):
        piece = _numbers(file, directory * SECTOR + 4 * first, min(tables - first, _DIRECTORY_PIECE))
        for number, table in enumerate(piece, start=first):
            grains = _numbers(file, table * SECTOR, in_table) if table else array("I")
            if not grains or (max(grains) + grain) * SECTOR <= file.size:
                continue
            for at, sector in enumerate(grains, start=number * in_table):
                end = (sector + min(grain, capacity - at * grain)) * SECTOR
                if sector > _ZERO_GRAIN and at * grain < capacity and end > file.size:
                    return [("cut short", f"{end - file.size} bytes are missing")]
    return []


def _numbers(file: HostFile, offset: int, count: int) -> "array[int]":
    """Numbers of 32 bits."""
    numbers = array("I", exactly(file, offset, 4 * count))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def descriptor(identity: VmdkIdentity, extents: list[tuple[Extent, str]]) -> bytes:
    """A descriptor of the same disk whose files have other names.

    Args:
        identity: Of the image.
        extents: Each with the name that it is to have.
    """
    parent = _NO_PARENT if identity.parent_id is None else identity.parent_id
    lines = [
        "# Disk DescriptorFile", "version=1", f"CID={identity.content_id:08x}", f"parentCID={parent:08x}",
        f'createType="{identity.create_type}"',
    ]  # fmt: skip
    for extent, name in extents:
        first = f" {extent.first_sector or 0}" if extent.type == "FLAT" else ""  # QEMU takes no other with one
        lines.append(f'RW {extent.sectors} {extent.type} "{name}"{first}')
    return "\n".join([*lines, ""]).encode()


def _read_sparse_image(file: HostFile) -> Statement:
    capacity, marks, offset, length = _sparse_header(file)
    if not offset or not length:
        raise refuse(file, "it is a part of a VMDK: the file that names it, its descriptor, must be given")
    if length * SECTOR > _LONGEST_DESCRIPTOR:
        raise refuse(file, f"its descriptor is said to have {length} sectors")
    text = os.fsdecode(exactly(file, offset * SECTOR, length * SECTOR)).partition("\0")[0]
    statement = _read_descriptor(file, text)
    statement.marks.extend(marks)
    assert statement.identity is not None
    kind = statement.identity.create_type
    if kind not in _IN_ONE_FILE:
        statement.marks.append(("unknown kind", f"{kind} in one file"))
    named = _extents(file, statement, text)
    if len(named) != 1 or named[0].type != "SPARSE" or named[0].sectors != capacity:
        raise refuse(file, "its descriptor and its header contradict each other")
    statement.size = capacity * SECTOR
    return statement


def _sparse_header(file: HostFile) -> tuple[int, list[tuple[str, str]], int, int]:
    """Of a sparse file: its sectors, its marks, and where its descriptor lies, in sectors."""
    magic, _, _, capacity, _, offset, length, _, _, _, _, unclean = _SPARSE.unpack(exactly(file, 0, _SPARSE.size))
    if magic != b"KDMV":
        raise refuse(file, "it is no sparse file of a VMDK")
    if not capacity:  # QEMU then reads a descriptor in it, which could name any file
        raise refuse(file, "it says that it has no sectors")
    return capacity, [("not closed", "")] if unclean else [], offset, length


def _read_descriptor(file: HostFile, text: str) -> Statement:
    kind = _CREATE_TYPE.search(text)
    if kind is None:
        raise refuse(file, "it is no VMDK: it has no descriptor that says its createType")
    content, parent, hint = _CONTENT_ID.search(text), _PARENT_ID.search(text), _PARENT_NAME.search(text)
    parent_id = int(parent[1], 16) if parent else _NO_PARENT
    identity = VmdkIdentity(
        int(content[1], 16) if content else 0, None if parent_id == _NO_PARENT else parent_id, kind[1]
    )
    statement = Statement(size=None, identity=identity)
    if kind[1] in _PHYSICAL:
        statement.marks.append(("raw device", kind[1]))
    if _ENCIPHERED.search(text):
        statement.marks.append(("enciphered", ""))
    name = hint[1] if hint else ""
    if identity.parent_id is None and name:
        statement.marks.append(("parent that is none", os.path.basename(name)))  # noqa: PTH119 (a stranger's words)
    elif identity.parent_id is not None and not name:
        statement.marks.append(("parent without a name", ""))
    elif name:
        statement.backing = Reference(name, "vmdk")
    return statement


def _extents(file: HostFile, statement: Statement, text: str) -> list[Extent]:
    """The files with the data, in their order; marks what QEMU would leave out."""
    found: list[Extent] = []
    lines = list(_EXTENT.finditer(text))
    if len(lines) != len(_ANY_EXTENT.findall(text)):
        raise refuse(file, "its descriptor has an extent that cannot be understood")
    for line in lines:
        if line["type"].upper() in _PHYSICAL_TYPES:
            statement.marks.append(("raw device", line["type"]))
        elif line["access"] != "RW" or line["type"] not in _DATA or not line["name"] or not int(line["sectors"]):
            statement.marks.append(("extent that is left out", f"{line['access']} {line['sectors']} {line['type']}"))
        else:
            first = int(line["first"]) if line["first"] else None
            if first and line["type"] != "FLAT":
                raise refuse(file, f"an extent of type {line['type']} cannot begin at sector {first} of its file")
            found.append(Extent(line["name"], line["type"], int(line["sectors"]), first))
    if not lines:
        raise refuse(file, "its descriptor names no extent: it holds no data")
    return found
