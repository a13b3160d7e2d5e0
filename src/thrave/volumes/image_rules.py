"""The rules for the metadata of disk images: one table for every supported format. Reads no file.

An image can refer to other files, and its metadata can lead to findings: the image is only a part of a disk, is
damaged, or was not closed. QEMU reads some such images without an error, with zeros where the missing content should
be. So Thrave reads the metadata first (`image_headers`, `vhd_headers`, `vmdk_headers`), and this table decides.
"""

from enum import StrEnum
from typing import NamedTuple


class Decision(StrEnum):
    """What happens to an image that has a reference or a finding."""

    ACCEPT = "accept"
    WARN = "warn"
    """Accepted, and reported by the task or the command."""
    REFUSE = "refuse"


class ImageRule(NamedTuple):
    """The decision about one reference or finding."""

    format: str
    """QEMU's name, or `any`."""
    name: str
    where: str
    """Where in the image it is."""
    decision: Decision
    reason: str
    """Follows the image's name in a message, without a full stop."""
    is_normal_while_running: bool = False
    """A running machine causes this finding too, so it is ignored until the machine is off."""


_A, _W, _R = Decision.ACCEPT, Decision.WARN, Decision.REFUSE

REFERENCES: tuple[ImageRule, ...] = (
    ImageRule("qcow2", "backing file", "header, backing_file_offset", _A, "it has a backing file"),
    ImageRule("qcow2", "backing file without a format", "no extension 0xE2792ACA", _R,
        "it does not name the format of its backing file: set it with qemu-img rebase -u -F"),
    ImageRule("qcow2", "data file", "incompatible feature 2, or extension 0x44415441", _R,
        "its data is in another file, which is not supported: convert it with qemu-img convert"),
    ImageRule("vmdk", "extent", "descriptor, RW … FLAT, VMFS, SPARSE, VMFSSPARSE or SESPARSE", _A,
        "its data is in other files"),
    ImageRule("vmdk", "raw device", "descriptor, RW … VMFSRDM or VMFSRAW, or such a createType", _R,
        "it refers to a physical disk and contains no data"),
    ImageRule("vmdk", "parent", "descriptor, parentFileNameHint", _A, "it has a backing file"),
    ImageRule("vpc", "parent", "footer, disk type 4", _R,
        "it is a differencing disk, which contains only the changes to its parent: merge it into the parent first"),
    ImageRule("vhdx", "parent", "file parameters, HasParent, or a parent locator", _R,
        "it is a differencing disk, which contains only the changes to its parent: merge it into the parent first"),
    ImageRule("any", "other protocol", "a name with a colon before its first slash", _R,
        "it refers to something that is not a local file"),
    ImageRule("any", "file elsewhere", "the real path of a file that it refers to", _R,
        "neither the image's own folder nor one of the image directories"),
    ImageRule("any", "image of another format", "the format of a file that it refers to", _R,
        "the format of its backing file is not supported"),
)  # fmt: skip
"""To which other files an image can refer. A raw or LUKS disk refers to none. A file whose reference is accepted must
also be in an allowed folder (`host_files.AllowedFolders`).
"""

FINDINGS: tuple[ImageRule, ...] = (
    ImageRule("raw", "looks like another format", "its first or last bytes", _W,
        "it begins or ends like an image of another format or an archive, and is read as a raw disk"),
    ImageRule("qcow2", "corrupt", "incompatible feature 1", _R,
        "it is marked as corrupt; QEMU does that when it finds damage: repair it with qemu-img check -r all"),
    ImageRule("qcow2", "dirty", "incompatible feature 0", _W,
        "the program that wrote it last did not close it, so its machine was not shut down",
        is_normal_while_running=True),
    ImageRule("qcow2", "unknown feature", "any other incompatible feature", _R, "it needs an unknown feature"),
    ImageRule("qcow2", "external data bitmaps, compression, extended L2", "features 3 and 4, extensions", _A,
        "QEMU supports them"),
    ImageRule("qcow2", "internal snapshots", "header, nb_snapshots", _W,
        "it has internal snapshots; the bundle contains only the current state"),
    ImageRule("qcow2", "cut short", "tables of clusters; the length of the file", _R,
        "it is cut short: its last cluster with data ends after the end of the file", is_normal_while_running=True),
    ImageRule("qcow2", "encrypted", "header, crypt_method", _A, "it can be read only with its passphrase"),
    ImageRule("vmdk", "not closed", "sparse extent's header, uncleanShutdown", _W,
        "the program that wrote it last did not close it, so its machine was not shut down",
        is_normal_while_running=True),
    ImageRule("vmdk", "ignored extent", "descriptor, an extent that is not RW, or of type ZERO or unknown", _R,
        "it has an extent of a kind that QEMU ignores without an error"),
    ImageRule("vmdk", "parent without a name", "parentCID, no parentFileNameHint", _R,
        "it contains only the changes to a parent, and does not name the parent's file"),
    ImageRule("vmdk", "contradictory parent", "parentFileNameHint, parentCID ffffffff", _R,
        "it names a parent file, but its parentCID says that it has no parent"),
    ImageRule("vmdk", "parent was changed", "parentCID, and the parent's CID", _R,
        "its parent was written to after it was created, so the two do not make a disk"),
    ImageRule("vmdk", "encrypted", "descriptor, encryption.…", _R, "it is encrypted by the program that created it"),
    ImageRule("vmdk", "cut short", "tables of grains; the length of the file", _R,
        "it is cut short: its last grain ends after the end of the file", is_normal_while_running=True),
    ImageRule("vmdk", "unknown kind", "descriptor, createType", _R, "its kind is not supported"),
    ImageRule("vpc", "names a parent", "dynamic disk's header, parent", _W,
        "it names a parent, although its type is a whole disk"),
    ImageRule("vpc", "saved state", "footer, saved state", _R,
        "the memory of its machine is saved, so the machine was not shut down: resume it, then shut it down"),
    ImageRule("vpc", "temporary", "footer, feature 0", _A, "it may be removed at shutdown, which changes no data"),
    ImageRule("vpc", "damaged footer", "footer and its copy: checksum, difference", _R,
        "its footer is damaged, or is not the same as its copy"),
    ImageRule("vpc", "cut short", "block allocation table; the length of a fixed disk", _R, "it is cut short"),
    ImageRule("vpc", "geometry is less", "footer, geometry and current size", _A,
        "the current size is read, not the geometry"),
    ImageRule("vpc", "geometry is more", "footer, geometry and current size", _R,
        "its geometry describes a larger disk than its current size"),
    ImageRule("vhdx", "log not replayed", "header, log GUID", _R,
        "its log is not replayed, so it was not closed: open it once for writing with Hyper-V or QEMU",
        is_normal_while_running=True),
    ImageRule("vhdx", "cut short", "the length of the file, not in whole sectors", _R, "it is cut short",
        is_normal_while_running=True),
    ImageRule("vhdx", "unknown item", "region and metadata tables, required", _R, "it needs an unknown feature"),
    ImageRule("luks", "version", "header, version", _R, "QEMU does not support this version of LUKS"),
    ImageRule("any", "too large", "the size that QEMU reads", _R, "it is larger than 1 PiB, the maximum"),
    ImageRule("any", "another size", "the size in its header, and the size that QEMU reads", _R,
        "the size in its header differs from the size that QEMU reads"),
)  # fmt: skip
"""Which findings an image can have."""

_RULES = {(rule.format, rule.name): rule for rule in (*REFERENCES, *FINDINGS)}


def find_rule(image_format: str, name: str) -> ImageRule:
    """Return the rule of a format for a reference or finding, or the rule for any format. KeyError if there is none."""
    return _RULES.get((image_format, name)) or _RULES["any", name]
