"""The start guard is checked right before each command of an overlay, since earlier calls may take long."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from thrave.compute.base import Overlay
from thrave.compute.instance import VolumeFile
from thrave.compute.libvirt import overlay_files, overlay_merge, overlays
from thrave.compute.libvirt.instance_mapping import instance_id_of
from thrave.compute.libvirt.overlay_merge import DiskLocation, OverlayMerge, RootDisk
from thrave.compute.libvirt.overlays import LibvirtOverlays
from thrave.write_guard import command_guard

INSTANCE = instance_id_of("00000000-0000-0000-0000-000000000001")
FROZEN = Overlay(VolumeFile(path=Path("/vm/root.raw")), Path("/vm/root.overlay"))
OUT = RootDisk(DiskLocation.NOWHERE, None)


class TooLateError(Exception):
    """This process may no longer give commands."""


def on(location, **mirror):
    disk = SimpleNamespace(target="vda", mirror=SimpleNamespace(**mirror) if mirror else None)
    return RootDisk(location, disk)


class Host:
    """Records commands and checks; the checks fail after `allowed` of them."""

    def __init__(self, monkeypatch, live, config, allowed):
        self.done, self.allowed = [], allowed
        self.domain, self.connection = MagicMock(), MagicMock()
        self.domain.hasManagedSaveImage.return_value = False
        self.domain.isActive.return_value = False
        for name in ("blockCommit", "blockJobAbort"):
            getattr(self.domain, name).side_effect = self.command(name)
        self.connection.defineXML.side_effect = self.command("defineXML")
        for name in ("commit", "create"):
            monkeypatch.setattr(overlay_files, name, self.command(name))
        for name in ("move", "remove", "sync_definitions"):
            monkeypatch.setattr(overlay_files, name, lambda *_: None)
        monkeypatch.setattr(overlay_files, "exists", lambda *_: True)
        monkeypatch.setattr(overlay_files, "is_empty", lambda *_: True)
        for module in (overlay_merge, overlays):
            monkeypatch.setattr(module, "without_overlay", MagicMock())
        monkeypatch.setattr(overlays, "with_overlay", MagicMock())
        monkeypatch.setattr(overlays, "read_metadata", lambda *_: None)
        snapshot = SimpleNamespace(uuid="uuid", metadata=None)
        self.host = SimpleNamespace(
            hypervisor=SimpleNamespace(session=self.session),
            events=MagicMock(),
            cache=SimpleNamespace(find=lambda *_: self.domain),
            metadata=MagicMock(),
            lock=MagicMock(),
            locate_disks=lambda *_: (snapshot, live, config),
        )

    @contextmanager
    def session(self, _instance_id):
        yield self.connection

    def command(self, name):
        return lambda *_: self.done.append(name)

    def check(self):
        if self.done.count("check") == self.allowed:
            raise TooLateError
        self.done.append("check")


MERGES = [
    (on(DiskLocation.OVERLAY), on(DiskLocation.OVERLAY), ["blockCommit"]),
    (on(DiskLocation.OVERLAY, job="active-commit", ready=True), on(DiskLocation.OVERLAY), ["blockJobAbort"]),
    (OUT, on(DiskLocation.OVERLAY), ["commit", "defineXML"]),
    (on(DiskLocation.VOLUME), on(DiskLocation.OVERLAY), ["defineXML"]),
    (OUT, OUT, ["commit"]),
]


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 4, 99])
@pytest.mark.parametrize(("live", "config", "commands"), MERGES, ids=lambda value: str(value)[:30])
def test_merge_checks_guard_before_each_command(monkeypatch, live, config, commands, allowed):
    host = Host(monkeypatch, live, config, allowed)
    checked(host, commands, lambda: OverlayMerge(host.host, INSTANCE, FROZEN, lambda _seconds: None).step())


@pytest.mark.parametrize("allowed", [0, 1, 2, 99])
def test_attach_checks_guard_before_each_command(monkeypatch, allowed):
    host = Host(monkeypatch, OUT, on(DiskLocation.VOLUME), allowed)
    checked(host, ["create", "defineXML"], lambda: LibvirtOverlays(host.host).attach(INSTANCE, FROZEN))


def checked(host, commands, act):
    """Check that each command follows a check, and that none follows a failed check."""
    try:
        with command_guard.using(host.check):
            act()
    except TooLateError:
        assert host.done.count("check") == host.allowed
    else:
        assert [one for one in host.done if one != "check"] == commands
    assert host.done[:1] in ([], ["check"])
    for before, command in zip(host.done, host.done[1:], strict=False):
        assert command == "check" or before == "check"
