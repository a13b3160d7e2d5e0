"""Minimal domain XML in the form that libvirt writes."""

UUID = "6f1c2d3e-0000-4000-8000-00000000abcd"

DISK = (
    '<disk type="file" device="disk"><driver name="qemu" type="{format}"/>'
    '<source file="{file}"/><target dev="{dev}"/>{more}</disk>'
)
CDROM = '<disk type="file" device="cdrom"><source file="/iso/win.iso"/><target dev="sda"/>{more}</disk>'
WINDOWS = (
    '<libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">'
    '<libosinfo:os id="http://microsoft.com/win/2k22"/></libosinfo:libosinfo>'
)


def disk(dev="vda", file="/vm/c.raw", image_format="raw", more=""):
    """Return the XML of a disk that is a file."""
    return DISK.format(dev=dev, file=file, format=image_format, more=more)


def other(kind, source, device="disk"):
    """Return the XML of a disk with another source than a file."""
    return f'<disk type="{kind}" device="{device}"><source {source}/><target dev="vda"/></disk>'


BLOCK, NETWORK = other("block", 'dev="/dev/vg/win"'), other("network", 'protocol="rbd" name="p/win"')
POOL_VOLUME = other("volume", 'pool="p" volume="win.raw"')


def xml(*disks, metadata="", architecture="x86_64", more=""):
    """Return the XML of a domain; by default with one disk."""
    return (
        f'<domain type="kvm"><name>win</name><uuid>{UUID}</uuid><metadata>{metadata}</metadata>'
        f'<os><type arch="{architecture}">hvm</type></os>'
        f"<devices>{''.join(disks or (disk(),))}{more}</devices></domain>"
    )
