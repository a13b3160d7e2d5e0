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
    """One such domain.

    Attributes:
        name: What libvirt calls it.
        disk: Its disk's image.
        instance_id: Its instance's id, if it is adopted.
    """

    def __init__(
        self, host: Host, folder: Path, *, image_format: str = "raw", base: Path | None = None, more: str = ""
    ):
        """Define it, with its disk in `folder`; on the image `base`, of the format raw, if one is given."""
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
        """Write a block of 64 KiB as its guest would, wherever its disk is at the moment, and have it on the disk."""
        for command in (f"write -P {value} {block * _BLOCK} {_BLOCK}", "flush"):
            said = self._monitor("--hmp", f'qemu-io -d {_BACKEND} "{command}"')
            assert not said.strip(), said

    def write_off(self, path: Path, image_format: str, block: int, value: int) -> None:
        """Write a block into an image that nobody has open."""
        command = f"write -P {value} {block * _BLOCK} {_BLOCK}"
        subprocess.run(
            [require("qemu-io", package="qemu-utils"), "-f", image_format, "-c", command, path],
            check=True,
            capture_output=True,
        )

    def read(self, block: int) -> set[int]:
        """The values in a block of its own disk's image, and of what that stands on."""
        whole = Path(f"{self.disk}.read")
        _image("convert", "-U", "-f", self.format, "-O", "raw", self.disk, whole)
        return set(whole.read_bytes()[block * _BLOCK : (block + 1) * _BLOCK])

    def source(self) -> str:
        """The file that its disk is on: as it runs if it does, else as it is defined."""
        (line,) = [line for line in self.host.virsh("domblklist", self.name).splitlines() if line.strip()]
        return line.split(maxsplit=1)[1]

    def remove(self) -> None:
        """Cut its power, and forget it."""
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
