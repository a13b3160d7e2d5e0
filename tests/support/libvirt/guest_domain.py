"""Runs a guest of `guest.py` as a libvirt domain; a test defines and starts it, and reads its console."""

import hashlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4
from xml.etree.ElementTree import canonicalize
from xml.sax.saxutils import quoteattr

from support.eventually import eventually
from support.libvirt.guest import COMMAND_LINE, GuestImage, volume_flags
from support.libvirt.guest_disk import GuestDisk
from support.libvirt.libvirt_host import Host, VirshError
from thrave.demo.disk import make_ephemeral_disk

TIMEOUT = 120.0  # seconds; an emulated guest boots in 3 to 9

_XML = """\
<domain type="qemu">
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://microsoft.com/win/2k19"/>
    </libosinfo:libosinfo>
    <thrave:instance xmlns:thrave="https://thrave.dev/xmlns/instance/1" account="{account}">
      <thrave:tag key="Name">{name}</thrave:tag>
    </thrave:instance>
  </metadata>
  <memory unit="MiB">256</memory>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="pc">hvm</type>{kernel}</os>
  <features><acpi/></features>
  <cpu mode="maximum"/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
    <serial type="file"><source path={console} append="on"/><target port="0"/></serial>
    {channel}
  </devices>
</domain>
"""
_DISK = """\
<disk type="file" device="disk">
  <driver name="qemu" type="raw"/><source file={file}/><target dev="{device}" bus="virtio"/>{boot}
</disk>"""
_AGENT = '<channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>'
_READY = re.compile(r"^GUEST-READY (\S+)", re.MULTILINE)


@dataclass
class Domain:
    """A domain with a guest.

    Attributes:
        folder: Folder of disks and console. An existing `root.raw` in it becomes the root disk.
        account_id: Owner.
        root: Image of which the root disk is a copy; by default the guest's.
        boots_itself: Boot from the root disk, as a machine does. Otherwise QEMU loads the kernel, which is faster and
            allows `parameters`.
        parameters: Parameters of the guest, see `inside_guest/init`. With AGENT the domain also gets a channel.
    """

    host: Host
    name: str
    folder: Path
    guest: GuestImage
    account_id: str
    root: Path | None = None
    boots_itself: bool = False
    parameters: dict[str, object] = field(default_factory=dict)
    uuid: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        """Create the disks and define the domain, which is off."""
        self._copies = self.folder / "copies"
        self._copies.mkdir(parents=True)
        self.console = self.folder / "console.log"
        self.console.touch()
        self.disk = self.folder / "root.raw"
        if not self.disk.exists():
            subprocess.run(["cp", "--sparse=always", self.root or self.guest.disk, self.disk], check=True)
        self._other = self.folder / "other.raw"
        make_ephemeral_disk(self._other, 4 << 20)
        self.define()

    @property
    def instance_id(self) -> str:
        """Id of the instance."""
        return f"i-{hashlib.sha256(self.uuid.bytes).hexdigest()[:17]}"

    def define(self) -> None:
        """Define the domain in its original form."""
        definition = self.folder / "domain.xml"
        definition.write_text(self._xml())
        self.host.virsh("define", definition)

    def start(self) -> "Domain":
        """Start the domain, without waiting for the boot."""
        self.host.virsh("start", self.name)
        return self

    def remove(self) -> None:
        """Cut the power if it is running, and undefine the domain."""
        for words in (("destroy", self.name), ("undefine", self.name)):
            try:
                self.host.virsh(*words)
            except VirshError as error:
                assert re.search("not running|not found|failed to get domain", str(error)), error  # noqa: PT017 (other errors fail)

    def kill(self) -> None:
        """End QEMU by SIGKILL, and wait until libvirt has detected that."""
        self.host.kill_guest(self.name)
        eventually(lambda: not self.runs(), details=self.host.log)

    def runs(self) -> bool:
        """Return whether the domain is running."""
        return self.host.virsh("domstate", self.name).strip() == "running"

    def definition(self) -> str:
        """Return the definition for the next start, without the launch time."""
        definition = self.host.virsh("dumpxml", "--inactive", self.name)
        return canonicalize(definition, strip_text=True, exclude_attrs=["launchTime"])

    def sources(self) -> list[str]:
        """Return the files of the disks, in the running domain and in the definition."""
        listings = [self.host.virsh("domblklist", self.name, *options) for options in ((), ("--inactive",))]
        return [line.split(maxsplit=1)[1] for listing in listings for line in listing.splitlines() if line.strip()]

    def files(self) -> set[str]:
        """Return the names of the files in the folder."""
        return {path.name for path in self.folder.iterdir()}

    @property
    def output(self) -> str:
        """Output of the console."""
        return self.console.read_text(errors="replace").replace("\r", "")

    def _last_lines(self) -> str:
        return self.output[-1000:]

    @property
    def boots(self) -> Sequence[str]:
        """Ids of the boots in which the guest is ready: it reacts to the power button and writes."""
        return _READY.findall(self.output)

    def await_boot(self, after: Sequence[str] = ()) -> str:
        """Wait for one more boot than those in `after`; return its id."""
        eventually(lambda: len(self.boots) > len(after), f"{self.name} boots", details=self._last_lines)
        boot = self.boots[-1]
        assert boot not in after
        if "AGENT" in self.parameters:
            eventually(self._has_agent, f"the guest agent of {self.name} answers")
        return boot

    def written(self, boot: str) -> int:
        """Return the last line of a boot that is certainly on the disk."""
        return max(map(int, re.findall(rf"^WROTE {boot} ([0-9]+)$", self.output, re.MULTILINE)), default=0)

    def await_written(self, boot: str, more: int = 2) -> int:
        """Wait until a boot has written `more` lines; return the number of the last one."""
        wanted = self.written(boot) + more
        eventually(lambda: self.written(boot) >= wanted, f"{self.name} writes", details=self._last_lines)
        return self.written(boot)

    def read_disk(self) -> GuestDisk:
        """Return a copy of C:. A running domain is paused for the copy."""
        runs, copy = self.runs(), self._copies / "now.raw"
        if runs:
            self.host.virsh("suspend", self.name)
        try:
            subprocess.run(["cp", "--sparse=always", self.disk, copy], check=True)
        finally:
            if runs:
                self.host.virsh("resume", self.name)
        return GuestDisk(copy, self._copies)

    def _has_agent(self) -> bool:
        try:
            return bool(self.host.virsh("qemu-agent-command", self.name, '{"execute": "guest-ping"}'))
        except VirshError:
            return False

    def _xml(self) -> str:
        boot = '<boot order="1"/>' if self.boots_itself else ""
        root = _DISK.format(file=quoteattr(str(self.disk)), device="vda", boot=boot)
        other = _DISK.format(file=quoteattr(str(self._other)), device="vdb", boot="")
        return _XML.format(
            name=self.name,
            uuid=self.uuid,
            account=self.account_id,
            kernel="" if self.boots_itself else self._kernel(),
            disks=f"{root}\n{other}",
            console=quoteattr(str(self.console)),
            channel=_AGENT if "AGENT" in self.parameters else "",
        )

    def _kernel(self) -> str:
        parameters = {"VOLUME_FLAGS": volume_flags(self.disk), **self.parameters}
        line = " ".join([COMMAND_LINE, *(f"{name}={value}" for name, value in parameters.items())])
        return f"<kernel>{self.guest.kernel}</kernel><initrd>{self.guest.initramfs}</initrd><cmdline>{line}</cmdline>"
