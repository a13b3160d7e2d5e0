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
    """One domain.

    Attributes:
        folder: Its disks' and its console's. If it has a `root.raw` already, that is its root disk.
        account_id: Its owner's.
        root: What else its root disk is a copy of; the guest's unless given.
        boots_itself: From its root disk alone, as a machine does. Else with the kernel beside it, which is quicker, and
            takes what it is told.
        told: What the guest is told, as `inside_guest/init` knows it. AGENT has it get a channel, too.
    """

    host: Host
    name: str
    folder: Path
    guest: GuestImage
    account_id: str
    root: Path | None = None
    boots_itself: bool = False
    told: dict[str, object] = field(default_factory=dict)
    uuid: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        """Make what is not there: its disks, and the domain, which is off."""
        self._looks = self.folder / "looks"
        self._looks.mkdir(parents=True)
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
        """What the service must call it."""
        return f"i-{hashlib.sha256(self.uuid.bytes).hexdigest()[:17]}"

    def define(self) -> None:
        """Define it as it was at first."""
        definition = self.folder / "domain.xml"
        definition.write_text(self._xml())
        self.host.virsh("define", definition)

    def start(self) -> "Domain":
        """Switch it on; it boots meanwhile."""
        self.host.virsh("start", self.name)
        return self

    def remove(self) -> None:
        """Cut its power if it runs, and forget it."""
        for words in (("destroy", self.name), ("undefine", self.name)):
            try:
                self.host.virsh(*words)
            except VirshError as error:
                assert re.search("not running|not found|failed to get domain", str(error)), error  # noqa: PT017 (other errors fail)

    def kill(self) -> None:
        """End its QEMU by SIGKILL, and wait until libvirt has seen it."""
        self.host.kill_guest(self.name)
        eventually(lambda: not self.runs(), details=self.host.log)

    def runs(self) -> bool:
        """Whether it is on."""
        return self.host.virsh("domstate", self.name).strip() == "running"

    def definition(self) -> str:
        """What libvirt will start it from, but for when the service has seen it start."""
        definition = self.host.virsh("dumpxml", "--inactive", self.name)
        return canonicalize(definition, strip_text=True, exclude_attrs=["launchTime"])

    def sources(self) -> list[str]:
        """The files of its disks: as it runs if it does, and as it is defined."""
        listings = [self.host.virsh("domblklist", self.name, *options) for options in ((), ("--inactive",))]
        return [line.split(maxsplit=1)[1] for listing in listings for line in listing.splitlines() if line.strip()]

    def files(self) -> set[str]:
        """What lies in its folder."""
        return {path.name for path in self.folder.iterdir()}

    @property
    def said(self) -> str:
        """All that has come over its console."""
        return self.console.read_text(errors="replace").replace("\r", "")

    def _last_lines(self) -> str:
        return self.said[-1000:]

    @property
    def boots(self) -> Sequence[str]:
        """The ids of its boots that have come so far that it obeys and writes; each has another one."""
        return _READY.findall(self.said)

    def await_boot(self, after: Sequence[str] = ()) -> str:
        """Wait until it has booted, once more than these times; give the boot's id."""
        eventually(lambda: len(self.boots) > len(after), f"{self.name} boots", details=self._last_lines)
        boot = self.boots[-1]
        assert boot not in after
        if "AGENT" in self.told:
            eventually(self._has_agent, f"the guest agent of {self.name} answers")
        return boot

    def written(self, boot: str) -> int:
        """The last line of a boot's that is known to be on its disk."""
        return max(map(int, re.findall(rf"^WROTE {boot} ([0-9]+)$", self.said, re.MULTILINE)), default=0)

    def await_written(self, boot: str, more: int = 2) -> int:
        """Wait until a boot has written so many more lines; give the last one's number."""
        wanted = self.written(boot) + more
        eventually(lambda: self.written(boot) >= wanted, f"{self.name} writes", details=self._last_lines)
        return self.written(boot)

    def look(self) -> GuestDisk:
        """C: as it is now; if it runs, it stands still for the moment that this takes."""
        runs, copy = self.runs(), self._looks / "now.raw"
        if runs:
            self.host.virsh("suspend", self.name)
        try:
            subprocess.run(["cp", "--sparse=always", self.disk, copy], check=True)
        finally:
            if runs:
                self.host.virsh("resume", self.name)
        return GuestDisk(copy, self._looks)

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
            channel=_AGENT if "AGENT" in self.told else "",
        )

    def _kernel(self) -> str:
        told = {"VOLUME_FLAGS": volume_flags(self.disk), **self.told}
        line = " ".join([COMMAND_LINE, *(f"{name}={value}" for name, value in told.items())])
        return f"<kernel>{self.guest.kernel}</kernel><initrd>{self.guest.initramfs}</initrd><cmdline>{line}</cmdline>"
