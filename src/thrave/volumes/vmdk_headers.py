"""Reads the metadata of a VMDK: a text descriptor, alone or inside a sparse file, and the headers of sparse files.

As in `image_headers`, headers are untrusted and nothing is decided here. QEMU ignores descriptor lines that it cannot
parse, and finds some keywords anywhere in the text. The functions here find the same values, and report what QEMU
ignores.

Sources: VMware, Virtual Disk Format 5.0; QEMU 7.2, block/vmdk.c.
"""

import os
import re
import struct
import sys
from array import array

from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import HostFile
from thrave.volumes.image_headers import SECTOR, ImageMetadata, Reference, VmdkExtent, VmdkIdentity, read_exactly

_SPARSE = struct.Struct("<4sIIQQQQIQQQB")
_MAX_DESCRIPTOR = 1 << 20  # bytes; QEMU reads no more
_NO_PARENT = 0xFFFFFFFF
_COMPRESSION_OFFSET = 77
_DIRECTORY_AT_END = 0xFFFFFFFFFFFFFFFF  # a second header, at the end of a compressed file, has the offset
_MAX_TABLE = 512  # entries; QEMU refuses more
_DIRECTORY_PIECE = 1 << 18  # entries
_ZERO_GRAIN = 1  # entry of a grain of zeros; 0: a grain that is not allocated

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

# [ \t] and not \s, which matches line ends: with it a million empty lines would take quadratic time.
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
_ENCRYPTED = re.compile(r"^[ \t]*encryption\.", re.MULTILINE)


def read_vmdk(file: HostFile) -> ImageMetadata:
    """Read a VMDK: a descriptor that names the files with the data, or a single sparse file."""
    magic = file.read(0, 4)
    if magic == b"COWD":
        raise VolumeUnreadableError(
            file.path, "it is a part of a VMDK: the file that names it, its descriptor, must be given"
        )
    if magic == b"KDMV":
        return _read_sparse_image(file)
    if file.size > _MAX_DESCRIPTOR:
        raise VolumeUnreadableError(file.path, "it is not a VMDK")
    text = os.fsdecode(file.read(0, _MAX_DESCRIPTOR)).partition("\0")[0]
    metadata = _read_descriptor(file, text)
    assert metadata.identity is not None
    kind = metadata.identity.create_type
    if kind not in _WITH_FILES | _PHYSICAL:
        metadata.findings.append(("unknown kind", kind))
    metadata.extents = tuple(_read_extents(file, metadata, text))
    metadata.size = sum(extent.sectors for extent in metadata.extents) * SECTOR
    return metadata


def read_extent(file: HostFile, extent: VmdkExtent) -> list[tuple[str, str]]:
    """Return the findings about a file with data of a VMDK.

    Raises:
        VolumeUnreadableError: It does not match its extent in the descriptor, or is cut short.
    """
    if extent.type in FLAT:
        if ((extent.first_sector or 0) + extent.sectors) * SECTOR > file.size:
            raise VolumeUnreadableError(file.path, f"it is cut short: it must contain {extent.sectors} sectors")
        return []
    if extent.type != "SPARSE" or file.read(0, 4) == b"COWD":
        return []  # the headers of these kinds refer to no other file
    capacity, findings, *_ = _read_sparse_header(file)
    if capacity != extent.sectors:
        raise VolumeUnreadableError(file.path, f"its header has {capacity} sectors, its descriptor {extent.sectors}")
    return findings


def check_vmdk_end(file: HostFile) -> list[tuple[str, str]]:
    """Return the finding about a sparse file that ends within a grain, where QEMU reads zeros. Other files have none.

    Call it after `qemu-img check` has accepted the image, while nothing writes to it.
    """
    if file.read(0, 4) != b"KDMV":
        return []
    header = read_exactly(file, 0, SECTOR)
    _, _, _, capacity, grain, _, _, in_table, _, directory, *_ = _SPARSE.unpack_from(header)
    (compression,) = struct.unpack_from("<H", header, _COMPRESSION_OFFSET)
    if compression or directory == _DIRECTORY_AT_END:  # a grain that is cut short cannot be decompressed
        return []
    if not grain or not in_table or in_table > _MAX_TABLE:
        raise VolumeUnreadableError(file.path, "its header is damaged: the size of its grains is missing")
    tables = -(-capacity // (grain * in_table))
    for first in range(0, tables, _DIRECTORY_PIECE):
        piece = _read_numbers(file, directory * SECTOR + 4 * first, min(tables - first, _DIRECTORY_PIECE))
        for number, table in enumerate(piece, start=first):
            grains = _read_numbers(file, table * SECTOR, in_table) if table else array("I")
            if not grains or (max(grains) + grain) * SECTOR <= file.size:
                continue
            for index, sector in enumerate(grains, start=number * in_table):
                end = (sector + min(grain, capacity - index * grain)) * SECTOR
                if sector > _ZERO_GRAIN and index * grain < capacity and end > file.size:
                    return [("cut short", f"{end - file.size} bytes are missing")]
    return []


def _read_numbers(file: HostFile, offset: int, count: int) -> "array[int]":
    """Read little-endian numbers of 32 bits."""
    numbers = array("I", read_exactly(file, offset, 4 * count))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def format_descriptor(identity: VmdkIdentity, extents: list[tuple[VmdkExtent, str]]) -> bytes:
    """Return a descriptor of the same disk with other file names.

    Args:
        identity: Of the image.
        extents: Each with its new file name.
    """
    parent = _NO_PARENT if identity.parent_id is None else identity.parent_id
    lines = [
        "# Disk DescriptorFile", "version=1", f"CID={identity.content_id:08x}", f"parentCID={parent:08x}",
        f'createType="{identity.create_type}"',
    ]  # fmt: skip
    for extent, name in extents:
        first = (
            f" {extent.first_sector or 0}" if extent.type == "FLAT" else ""
        )  # for other types QEMU accepts no offset
        lines.append(f'RW {extent.sectors} {extent.type} "{name}"{first}')
    return "\n".join([*lines, ""]).encode()


def _read_sparse_image(file: HostFile) -> ImageMetadata:
    capacity, findings, offset, length = _read_sparse_header(file)
    if not offset or not length:
        raise VolumeUnreadableError(
            file.path, "it is a part of a VMDK: the file that names it, its descriptor, must be given"
        )
    if length * SECTOR > _MAX_DESCRIPTOR:
        raise VolumeUnreadableError(file.path, f"its header is damaged: a descriptor of {length} sectors")
    text = os.fsdecode(read_exactly(file, offset * SECTOR, length * SECTOR)).partition("\0")[0]
    metadata = _read_descriptor(file, text)
    metadata.findings.extend(findings)
    assert metadata.identity is not None
    kind = metadata.identity.create_type
    if kind not in _IN_ONE_FILE:
        metadata.findings.append(("unknown kind", f"{kind} in one file"))
    extents = _read_extents(file, metadata, text)
    if len(extents) != 1 or extents[0].type != "SPARSE" or extents[0].sectors != capacity:
        raise VolumeUnreadableError(file.path, "its descriptor and its header contradict each other")
    metadata.size = capacity * SECTOR
    return metadata


def _read_sparse_header(file: HostFile) -> tuple[int, list[tuple[str, str]], int, int]:
    """Return capacity, findings, and offset and length of the descriptor of a sparse file; numbers in sectors."""
    magic, _, _, capacity, _, offset, length, _, _, _, _, unclean = _SPARSE.unpack(read_exactly(file, 0, _SPARSE.size))
    if magic != b"KDMV":
        raise VolumeUnreadableError(file.path, "it is not a sparse file of a VMDK")
    if not capacity:  # QEMU would then use the descriptor inside, which could name any file
        raise VolumeUnreadableError(file.path, "its header is damaged: it has no sectors")
    return capacity, [("not closed", "")] if unclean else [], offset, length


def _read_descriptor(file: HostFile, text: str) -> ImageMetadata:
    kind = _CREATE_TYPE.search(text)
    if kind is None:
        raise VolumeUnreadableError(file.path, "it is not a VMDK: it has no descriptor with a createType")
    content, parent, hint = _CONTENT_ID.search(text), _PARENT_ID.search(text), _PARENT_NAME.search(text)
    parent_id = int(parent[1], 16) if parent else _NO_PARENT
    identity = VmdkIdentity(
        int(content[1], 16) if content else 0, None if parent_id == _NO_PARENT else parent_id, kind[1]
    )
    metadata = ImageMetadata(size=None, identity=identity)
    if kind[1] in _PHYSICAL:
        metadata.findings.append(("raw device", kind[1]))
    if _ENCRYPTED.search(text):
        metadata.findings.append(("encrypted", ""))
    name = hint[1] if hint else ""
    if identity.parent_id is None and name:
        metadata.findings.append(("contradictory parent", name.rpartition("/")[2]))
    elif identity.parent_id is not None and not name:
        metadata.findings.append(("parent without a name", ""))
    elif name:
        metadata.backing = Reference(name, "vmdk")
    return metadata


def _read_extents(file: HostFile, metadata: ImageMetadata, text: str) -> list[VmdkExtent]:
    """Return the files with the data, in their order; report extents that QEMU would ignore."""
    found: list[VmdkExtent] = []
    lines = list(_EXTENT.finditer(text))
    if len(lines) != len(_ANY_EXTENT.findall(text)):
        raise VolumeUnreadableError(file.path, "its descriptor has an invalid extent")
    for line in lines:
        if line["type"].upper() in _PHYSICAL_TYPES:
            metadata.findings.append(("raw device", line["type"]))
        elif line["access"] != "RW" or line["type"] not in _DATA or not line["name"] or not int(line["sectors"]):
            metadata.findings.append(("ignored extent", f"{line['access']} {line['sectors']} {line['type']}"))
        else:
            first = int(line["first"]) if line["first"] else None
            if first and line["type"] != "FLAT":
                raise VolumeUnreadableError(
                    file.path, f"an extent of type {line['type']} cannot begin at sector {first} of its file"
                )
            found.append(VmdkExtent(line["name"], line["type"], int(line["sectors"]), first))
    if not lines:
        raise VolumeUnreadableError(file.path, "its descriptor names no extent, so it contains no data")
    return found
