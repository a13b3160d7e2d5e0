"""What a disk image says of itself, and what is done about it: one table for every format that is read.

An image can refer to other files, and can carry marks: that it is a part of a disk only, that it is damaged, that
somebody was just writing to it. QEMU reads some such images without a word, with zeros where the rest should be. So the
image's own words are read first (`headers`, `vhd`, `vmdk`), and this table decides. It reads nothing.
"""

from enum import StrEnum
from typing import NamedTuple


class Decision(StrEnum):
    """What is done about a reference or a mark."""

    ACCEPT = "accept"
    WARN = "warn"
    """The task, or the command, says so."""
    REFUSE = "refuse"


class Row(NamedTuple):
    """One thing that an image can say of itself."""

    format: str
    """QEMU's word; `any` for all of them."""
    name: str
    where: str
    """Where the image says it."""
    decision: Decision
    reason: str
    """Follows the image's name in a message, without a full stop."""
    while_running: bool = False
    """A machine that runs has it so, too: it counts once the machine is off."""


_A, _W, _R = Decision.ACCEPT, Decision.WARN, Decision.REFUSE

REFERENCES: tuple[Row, ...] = (
    Row("qcow2", "backing file", "header, backing_file_offset", _A, "it stands on another image"),
    Row("qcow2", "backing file without a format", "no extension 0xE2792ACA", _R,
        "it does not say which format the image has that it stands on: qemu-img rebase -u -F"),
    Row("qcow2", "data file", "incompatible feature 2, or extension 0x44415441", _R,
        "it keeps its data in another file, which is not supported: qemu-img convert"),
    Row("vmdk", "extent", "descriptor, RW … FLAT, VMFS, SPARSE, VMFSSPARSE or SESPARSE", _A,
        "it keeps its data in other files"),
    Row("vmdk", "raw device", "descriptor, RW … VMFSRDM or VMFSRAW, or such a createType", _R,
        "it is a way to a physical disk, and holds none"),
    Row("vmdk", "parent", "descriptor, parentFileNameHint", _A, "it stands on another image"),
    Row("vpc", "parent", "footer, disk type 4", _R,
        "it is a differencing disk, which has only what has changed since its parent; merge it into the parent first"),
    Row("vhdx", "parent", "file parameters, HasParent, or a parent locator", _R,
        "it is a differencing disk, which has only what has changed since its parent; merge it into the parent first"),
    Row("any", "other protocol", "a name with a colon before its first slash", _R,
        "it refers to something that is not a local file"),
    Row("any", "file elsewhere", "the real path of a file that it refers to", _R,
        "neither the image's own folder nor one of the image directories"),
    Row("any", "image of another format", "the format of a file that it refers to", _R,
        "it stands on an image whose format is not read"),
)  # fmt: skip
"""To which other files an image can refer. A raw or LUKS disk refers to none; one that is accepted is accepted only
where `HostFile` finds that it lies where it may.
"""

MARKS: tuple[Row, ...] = (
    Row("raw", "looks like another format", "its first or last bytes", _W,
        "it begins or ends as an image of another format or an archive, and is read as a raw disk all the same"),
    Row("qcow2", "corrupt", "incompatible feature 1", _R,
        "it is marked as corrupt, which QEMU does when it meets damage: qemu-img check -r all"),
    Row("qcow2", "dirty", "incompatible feature 0", _W,
        "it was not closed by the program that wrote it last, so its machine was not shut down", while_running=True),
    Row("qcow2", "unknown feature", "any other incompatible feature", _R, "it needs a feature that is not known"),
    Row("qcow2", "external data bitmaps, compression, extended L2", "features 3 and 4, extensions", _A,
        "QEMU reads them"),
    Row("qcow2", "internal snapshots", "header, nb_snapshots", _W,
        "it holds internal snapshots, which are not in the bundle: only its present state is"),
    Row("qcow2", "cut short", "tables of clusters; the length of the file", _R,
        "it is cut short: its last cluster with data reaches beyond the end of the file", while_running=True),
    Row("qcow2", "encrypted", "header, crypt_method", _A, "it is read with its passphrase, or not at all"),
    Row("vmdk", "not closed", "sparse extent's header, uncleanShutdown", _W,
        "it was not closed by the program that wrote it last, so its machine was not shut down", while_running=True),
    Row("vmdk", "extent that is left out", "descriptor, an extent that is not RW, or of type ZERO or unknown", _R,
        "it has an extent of a kind that QEMU leaves out without a word"),
    Row("vmdk", "parent without a name", "parentCID, no parentFileNameHint", _R,
        "it has only what has changed since its parent, and does not say which file that is"),
    Row("vmdk", "parent that is none", "parentFileNameHint, parentCID ffffffff", _R,
        "it names a parent, and says that it has none"),
    Row("vmdk", "parent was changed", "parentCID, and the parent's CID", _R,
        "its parent was written to since it was made, so that both together are no disk"),
    Row("vmdk", "enciphered", "descriptor, encryption.…", _R, "it is enciphered by the program that made it"),
    Row("vmdk", "cut short", "tables of grains; the length of the file", _R,
        "it is cut short: its last grain reaches beyond the end of the file", while_running=True),
    Row("vmdk", "unknown kind", "descriptor, createType", _R, "it is of a kind that is not read"),
    Row("vpc", "names a parent", "dynamic disk's header, parent", _W,
        "it names a parent, although it says that it is a whole disk"),
    Row("vpc", "saved state", "footer, saved state", _R,
        "its machine's memory is saved beside it, so it was not shut down: have it go on, and shut it down"),
    Row("vpc", "temporary", "footer, feature 0", _A, "it may be removed at shutdown, which changes no data"),
    Row("vpc", "damaged footer", "footer and its copy: checksum, difference", _R,
        "its footer is damaged, or is not the same as its copy"),
    Row("vpc", "cut short", "block allocation table; the length of a fixed disk", _R, "it is cut short"),
    Row("vpc", "geometry is less", "footer, geometry and current size", _A,
        "the current size is read, not the geometry"),
    Row("vpc", "geometry is more", "footer, geometry and current size", _R,
        "its geometry says a larger disk than its current size"),
    Row("vhdx", "log not replayed", "header, log GUID", _R,
        "its log is not written back, so it was not closed: have Hyper-V or QEMU open it for writing once",
        while_running=True),
    Row("vhdx", "cut short", "the length of the file, not in whole sectors", _R, "it is cut short", while_running=True),
    Row("vhdx", "unknown item", "region and metadata tables, required", _R, "it needs a feature that is not known"),
    Row("luks", "version", "header, version", _R, "it is LUKS of a version that QEMU does not read"),
    Row("any", "too large", "the size that QEMU reads", _R, "it is larger than 1 PiB, which is not read"),
    Row("any", "another size", "the size that it states, and the one that QEMU reads", _R,
        "it states another size than QEMU reads"),
)  # fmt: skip
"""Which marks an image can carry."""

_TABLE = {(row.format, row.name): row for row in (*REFERENCES, *MARKS)}


def row(image_format: str, name: str) -> Row:
    """A row of the table; it is an error of the program if there is none."""
    return _TABLE.get((image_format, name)) or _TABLE["any", name]
