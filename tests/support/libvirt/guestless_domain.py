"""A domain without a guest: QEMU with a disk and nothing to boot. The test writes to the disk through QEMU."""

import subprocess
import uuid
from contextlib import suppress
from pathlib import Path

from support.libvirt.libvirt_host import Host, VirshError
from support.required_programs import require
from thrave.compute.libvirt.instance_mapping import instance_id_of

SIZE = 8 << 20  # bytes of its disk
_BLOCK = 64 << 10
_BACKEND = "/machine/peripheral/virtio-disk0/virtio-backend"  # the disk, as QEMU knows it

_XML = """\
<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit="MiB">32</memory>
  <os><type arch="x86_64" machine="pc">hvm</type></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="{format}" cache="none"/><source file="{disk}"/><target dev="vda" bus="virtio"/>{more}
    </disk>
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
    <graphics type="vnc" passwd="secret"><listen type="socket"/></graphics>
  </devices>
  <qemu:commandline><qemu:arg value="-nodefaults"/></qemu:commandline>
</domain>
"""


class GuestlessDomain:
    """A domain without a guest.

    Attributes:
        name: Name in libvirt.
        disk: Image of the disk.
        instance_id: Id of the instance once the domain is adopted.
    """

    def __init__(
        self, host: Host, folder: Path, *, image_format: str = "raw", base: Path | None = None, more: str = ""
    ):
        """Define the domain with a disk in `folder`; `base` is the backing file of the disk, in the format raw."""
        self.host = host
        self.name = f"tiny-{uuid.uuid4()}"
        self.disk = folder / f"{self.name}.{image_format}"
        self.format = image_format
        machine = str(uuid.uuid4())
        self.instance_id = instance_id_of(machine)
        below = ["-b", base, "-F", "raw"] if base else []
        _image("create", "-q", "-f", image_format, *below, self.disk, *([] if base else [SIZE]))
        definition = folder / f"{self.name}.xml"
        definition.write_text(_XML.format(name=self.name, uuid=machine, disk=self.disk, format=image_format, more=more))
        host.virsh("define", definition)

    def write(self, block: int, value: int) -> None:
        """Write and flush a block of 64 KiB through QEMU, as a guest would, into the image that the disk uses now."""
        for command in (f"write -P {value} {block * _BLOCK} {_BLOCK}", "flush"):
            output = self._monitor("--hmp", f'qemu-io -d {_BACKEND} "{command}"')
            assert not output.strip(), output

    def write_off(self, path: Path, image_format: str, block: int, value: int) -> None:
        """Write a block into an image that no process has open."""
        command = f"write -P {value} {block * _BLOCK} {_BLOCK}"
        subprocess.run(
            [require("qemu-io", package="qemu-utils"), "-f", image_format, "-c", command, path],
            check=True,
            capture_output=True,
        )

    def read(self, block: int) -> set[int]:
        """Return the byte values in a block of the disk's image and its backing files."""
        whole = Path(f"{self.disk}.read")
        _image("convert", "-U", "-f", self.format, "-O", "raw", self.disk, whole)
        return set(whole.read_bytes()[block * _BLOCK : (block + 1) * _BLOCK])

    def source(self) -> str:
        """Return the file of the disk: of the running domain, else in the definition."""
        (line,) = [line for line in self.host.virsh("domblklist", self.name).splitlines() if line.strip()]
        return line.split(maxsplit=1)[1]

    def remove(self) -> None:
        """Cut the power, and undefine the domain."""
        names = self.host.virsh("list", "--all", "--name").split()
        if self.name in names:
            with suppress(VirshError):  # it does not run
                self.host.virsh("destroy", self.name)
        if self.name in self.host.virsh("list", "--all", "--name").split():
            self.host.virsh("undefine", self.name, "--managed-save")

    def _monitor(self, *words: object) -> str:
        return self.host.virsh("qemu-monitor-command", self.name, *words)


def _image(*words: object) -> None:
    subprocess.run([require("qemu-img", package="qemu-utils"), *map(str, words)], check=True, capture_output=True)
