"""The files for a Debian host, checked with programs of systemd; no unit is started."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.required_programs import require, require_root
from thrave import host_files
from thrave.agent import START_AGAIN
from thrave.cli.exit_codes import NO_RESTART, Exit
from thrave.cli.main import thrave
from thrave.config import load_settings
from thrave.tasks.lease import EXIT_LEASE_LOST

HOST_FILES = Path(host_files.__file__).parent
UNITS = sorted((HOST_FILES / "systemd").glob("*.service"))
DROP_INS = sorted((HOST_FILES / "systemd").glob("*.conf"))
ON_THE_HOST = "/opt/thrave/bin/thrave"
HERE = str(Path(sys.executable).with_name("thrave"))

HIGHEST_EXPOSURE = 1.3
"""Of 10, as `systemd-analyze security` counts; an ordinary service without any of this has 9.6."""
FOR_DISKS = 1.5
"""The same for a unit that may see block devices."""


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def analyze():
    """Runs `systemd-analyze`; gives its status and all that it said."""
    program = require("systemd-analyze", package="systemd")
    if not Path("/run/systemd").exists():  # in a container, for example
        require_root("make /run/systemd, without which systemd-analyze does nothing")
    return lambda *words: run(program, *words)


@pytest.fixture
def installed(tmp_path):
    """Lays a unit down as on a host, with drop-ins, but for where `thrave` is; gives its path."""

    def install(unit, *drop_ins):
        path = tmp_path / unit.name
        path.write_text(unit.read_text().replace(ON_THE_HOST, HERE))
        folder = tmp_path / f"{unit.name}.d"
        for drop_in in drop_ins:
            folder.mkdir(exist_ok=True)
            (folder / drop_in.name).write_text(drop_in.read_text())
        return path

    return install


def with_drop_ins():
    """Each unit alone, and those that see disks with each of the drop-ins."""
    alone = [pytest.param(unit, (), id=unit.stem) for unit in UNITS]
    return [
        *alone,
        *(
            pytest.param(unit, (drop_in,), id=f"{unit.stem}-{drop_in.stem}")
            for unit in UNITS
            if unit.stem != "thrave-api"
            for drop_in in DROP_INS
        ),
    ]


@pytest.mark.parametrize(("unit", "drop_ins"), with_drop_ins())
def test_unit_passes_systemd_analyze_verify(analyze, installed, unit, drop_ins):
    status, said = analyze("verify", "--man=no", "--recursive-errors=no", str(installed(unit, *drop_ins)))
    assert (status, [line for line in said.splitlines() if "thrave" in line]) == (0, [])


@pytest.mark.parametrize(("unit", "drop_ins"), with_drop_ins())
def test_unit_passes_systemd_analyze_security(analyze, installed, unit, drop_ins):
    highest = FOR_DISKS if [path.stem for path in drop_ins] == ["block-devices"] else HIGHEST_EXPOSURE
    path = installed(unit, *drop_ins)
    status, said = analyze("security", "--offline=yes", f"--threshold={highest * 10:.0f}", "--no-pager", str(path))
    assert status == 0, said


def test_unit_without_sandbox_fails_systemd_analyze_security(analyze, tmp_path):
    bare = tmp_path / "bare.service"
    bare.write_text(f"[Service]\nExecStart={HERE}\n")
    status, _ = analyze("security", "--offline=yes", f"--threshold={FOR_DISKS * 10:.0f}", "--no-pager", str(bare))
    assert status != 0


def sandbox(unit):
    """What follows the comment about rights: one set of lines in a unit."""
    lines = unit.read_text().partition("NoNewPrivileges")[2].partition("\n[Install]")[0].splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_units_with_disks_share_a_sandbox_and_the_api_has_a_narrower_one():
    agent, api, serve = map(sandbox, UNITS)
    assert agent == serve
    assert api - serve == {"PrivateUsers=yes"}
    assert serve - api == set()


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_unit_starts_an_existing_command(unit, tmp_path):
    (argv,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    words = shlex.split(argv.replace("/etc/thrave/thrave.toml", str(HOST_FILES / "thrave.toml")))
    assert words[0] == ON_THE_HOST
    status, said = run(HERE, *words[1:], "--help")  # which is looked at when every other word has been understood
    assert (status, said.startswith("Usage: thrave ")) == (0, True)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_unit_restarts_its_service_unless_the_exit_code_forbids_it(unit):
    settings = dict(re.findall(r"^(ExecStart|Restart|RestartPreventExitStatus)=(.*)$", unit.read_text(), re.MULTILINE))
    command = thrave.get_command(None, shlex.split(settings["ExecStart"])[1])
    listed = command.help.partition("Exit codes:")[2]
    codes = {int(code) for code in re.findall(r"(?:^|, )(\d+) ", re.sub(r"\s+", " ", listed).strip())}
    assert codes <= {*Exit}
    assert settings["Restart"] == "on-failure"  # after every other code but 0
    assert {int(code) for code in settings["RestartPreventExitStatus"].split()} == codes & NO_RESTART
    assert (START_AGAIN in codes, EXIT_LEASE_LOST in codes) == (unit.stem != "thrave-api",) * 2


def test_agent_ends_with_exit_codes_of_the_table():
    assert (START_AGAIN, EXIT_LEASE_LOST) == (Exit.START_AGAIN, Exit.LEASE_LOST)
    assert Exit.START_AGAIN not in NO_RESTART


def test_sample_settings_are_valid():
    settings = load_settings(HOST_FILES / "thrave.toml")
    assert (settings.hypervisor, settings.data_dir) == ("libvirt", Path("/var/lib/thrave"))


def test_commented_sample_settings_are_valid(tmp_path):
    whole = re.sub(r"^# (\w+ = )", r"\1", (HOST_FILES / "thrave.toml").read_text(), flags=re.MULTILINE)
    (tmp_path / "thrave.toml").write_text(whole)
    settings = load_settings(tmp_path / "thrave.toml")
    assert (settings.capture_mode, settings.store, settings.listen_address) == ("overlay", "s3", "0.0.0.0")
    assert settings.database_url is not None


def test_sysusers_and_tmpfiles_create_users_and_folders(tmp_path):
    require_root("give folders away")
    sysusers = require("systemd-sysusers", package="systemd")
    tmpfiles = require("systemd-tmpfiles", package="systemd")
    (tmp_path / "etc").mkdir()  # where it takes a lock
    users = HOST_FILES / "sysusers.d" / "thrave.conf"
    folders = HOST_FILES / "tmpfiles.d" / "thrave.conf"
    for argv in ((sysusers, f"--root={tmp_path}", users), (tmpfiles, f"--root={tmp_path}", "--create", folders)):
        status, said = run(*argv)
        assert status == 0, said
    made = dict(line.split(":")[:3:2] for line in (tmp_path / "etc" / "passwd").read_text().splitlines())
    for name in ("thrave", "thrave-api"):
        found = (tmp_path / "var" / "lib" / name).stat()
        assert (found.st_uid, found.st_mode & 0o7777) == (int(made[name]), 0o700)
    assert (tmp_path / "etc" / "thrave").stat().st_mode & 0o7777 == 0o755
