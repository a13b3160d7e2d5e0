"""`thrave host-files`: edited files stay, others follow the version of Thrave that is installed."""

import json
from pathlib import Path

import pytest

from thrave.cli.host_files_command import _DROP_INS
from thrave.host_files import installer
from thrave.host_files.installer import Action, HostFilesError, install, remove

PROGRAM = Path("/opt/other/bin/thrave")
UNIT = "etc/systemd/system/thrave.service"
SETTINGS = "etc/thrave/thrave.toml"


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def newer_version(tmp_path, monkeypatch):
    """Replaces the files of the package by those of a newer version."""
    newer = tmp_path / "newer"
    for source in {*installer.FILES.values(), *(f"systemd/{name}.conf" for name in installer.DROP_INS)}:
        path = newer / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((installer._SOURCE / source).read_bytes() + b"# newer\n")
    return lambda: monkeypatch.setattr(installer, "_SOURCE", newer)


def actions(changes, root):
    return {str(change.path.relative_to(root)): change.action for change in changes}


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_install_writes_readable_files_that_start_this_program(root):
    changed = actions(install(root, program=PROGRAM), root)
    assert changed == dict.fromkeys(installer.FILES, Action.CREATED)
    assert f"ExecStart={PROGRAM} serve" in (root / UNIT).read_text()
    assert {(root / target).stat().st_mode & 0o777 for target in changed} == {0o644}


def test_install_twice_changes_nothing(root):
    install(root, program=PROGRAM, drop_ins=["overlays"])
    before = contents(root)
    assert {*actions(install(root, program=PROGRAM), root).values()} == {Action.UNCHANGED}
    assert contents(root) == before


def test_install_updates_files_of_an_older_version_and_its_drop_ins(root, newer_version):
    install(root, program=PROGRAM, drop_ins=["overlays"])
    newer_version()
    changed = actions(install(root, program=PROGRAM), root)
    assert {*changed.values()} == {Action.UPDATED}
    assert {*installer.DROP_INS["overlays"]} <= {*changed}
    assert (root / UNIT).read_text().endswith("# newer\n")


def test_install_keeps_an_edited_file_and_writes_a_newer_version_next_to_it_once(root, newer_version):
    install(root, program=PROGRAM)
    (root / SETTINGS).write_text("edited")
    assert actions(install(root, program=PROGRAM), root)[SETTINGS] is Action.KEPT
    assert not (root / f"{SETTINGS}.new").exists()
    newer_version()
    assert actions(install(root, program=PROGRAM), root)[f"{SETTINGS}.new"] is Action.CREATED
    (root / f"{SETTINGS}.new").unlink()  # the operator has merged it
    install(root, program=PROGRAM)
    assert (root / SETTINGS).read_text() == "edited"
    assert not (root / f"{SETTINGS}.new").exists()


def test_install_keeps_a_file_that_it_did_not_write(root):
    (root / SETTINGS).parent.mkdir(parents=True)
    (root / SETTINGS).write_text("written by hand")
    install(root, program=PROGRAM)
    assert (root / SETTINGS).read_text() == "written by hand"
    assert "hypervisor" in (root / f"{SETTINGS}.new").read_text()


def test_install_continues_after_a_killed_run(root):
    install(root, program=PROGRAM)
    (root / installer.RECORD).unlink()  # killed before it was written
    assert {*actions(install(root, program=PROGRAM), root).values()} == {Action.UNCHANGED}
    assert {*actions(remove(root), root).values()} == {Action.REMOVED}


def test_dry_run_writes_and_removes_nothing(root):
    install(root, program=PROGRAM, drop_ins=installer.DROP_INS, dry_run=True)
    assert contents(root) == {}
    install(root, program=PROGRAM)
    before = contents(root)
    assert {*actions(remove(root, dry_run=True), root).values()} == {Action.REMOVED}
    assert contents(root) == before


def test_remove_leaves_only_edited_files(root):
    install(root, program=PROGRAM, drop_ins=installer.DROP_INS)
    (root / SETTINGS).write_text("edited")
    assert actions(remove(root), root)[SETTINGS] is Action.KEPT
    assert contents(root) == {SETTINGS: b"edited"}
    assert not (root / f"{UNIT}.d").exists()
    assert remove(root) == []


def test_install_refuses_a_program_that_the_units_cannot_see(root):
    with pytest.raises(HostFilesError, match="hides /home"):
        install(root, program=Path("/home/alice/.local/bin/thrave"))
    assert contents(root) == {}


def test_install_finds_the_program_inside_an_image(root):
    install(root, program=root / "opt/thrave/bin/thrave")
    assert "ExecStart=/opt/thrave/bin/thrave serve" in (root / UNIT).read_text()


def test_link_out_of_the_image_is_refused(root, tmp_path):
    (tmp_path / "outside").mkdir()
    (root / "etc").symlink_to(tmp_path / "outside")
    with pytest.raises(HostFilesError, match="leads out of"):
        install(root, program=PROGRAM)
    assert contents(tmp_path / "outside") == {}


def test_damaged_record_is_reported(root):
    install(root, program=PROGRAM)
    (root / installer.RECORD).write_text("[1")
    with pytest.raises(HostFilesError, match="is damaged"):
        remove(root)


def test_remove_deletes_only_files_that_this_program_installs(root):
    install(root, program=PROGRAM)
    foreign = root / "etc/passwd"
    foreign.write_text("")
    record = json.loads((root / installer.RECORD).read_text())
    (root / installer.RECORD).write_text(json.dumps({**record, "etc/passwd": installer._digest(b"")}))
    remove(root)
    assert foreign.exists()


def test_command_offers_each_drop_in():
    assert {*_DROP_INS} == {*installer.DROP_INS}
