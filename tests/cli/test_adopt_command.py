"""`thrave instance` with domains of libvirt's test driver."""

import json
from functools import partial

import pytest

from support.libvirt.libvirt_test_driver import URI, domain_xml, libvirt_test_driver
from support.required_programs import require
from thrave.doctor import host_checks

pytestmark = pytest.mark.libvirt


@pytest.fixture
def libvirt(monkeypatch):
    monkeypatch.setenv("THRAVE_HYPERVISOR", "libvirt")
    monkeypatch.setenv("THRAVE_LIBVIRT_URI", URI)
    with libvirt_test_driver() as driver:
        yield driver


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("THRAVE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def account_id(thrave_json, data):
    return thrave_json("account", "create", "alice")["accountId"]


@pytest.fixture
def adopted(thrave_json, libvirt, account_id, disk):
    """Adopts a domain `win`; returns its JSON document."""
    libvirt.define("win", disk)
    words = ("--account", account_id, "--platform", "windows", "--tag", "Name=web")
    return thrave_json("instance", "adopt", "win", *words)


def test_adopt_registers_domain_as_instance(thrave_json, adopted, account_id, disk):
    assert adopted.pop("launchTime").endswith("Z")
    assert adopted == {
        "instanceId": adopted["instanceId"],
        "accountId": account_id,
        "platform": "windows",
        "architecture": "x86_64",
        "rootDeviceType": "instance-store",
        "rootDeviceName": "/dev/vda",
        "rootVolume": {"path": str(disk), "format": "raw", "deviceName": "/dev/vda", "secretFile": None},
        "volumes": [],
        "state": "stopped",
        "offReason": "unknown",
        "tags": {"Name": "web"},
    }
    (listed,) = thrave_json("instance", "list")["instances"]
    assert (listed["instanceId"], listed["tags"]) == (adopted["instanceId"], {"Name": "web"})


def test_adopt_accepts_uuid_and_keeps_instance_id(thrave_json, libvirt, account_id, disk):
    uuid = libvirt.define("win", disk)
    first = thrave_json("instance", "adopt", uuid, "--account", account_id)["instanceId"]
    thrave_json("instance", "disown", "--yes", first)
    assert thrave_json("instance", "list") == {"instances": []}
    assert thrave_json("instance", "adopt", "win", "--account", account_id)["instanceId"] == first


def test_adopt_stores_every_option(thrave_json, libvirt, account_id, disk, tmp_path, monkeypatch):
    (tmp_path / "passphrase").write_text("secret")
    monkeypatch.chdir(tmp_path)
    libvirt.define("win", disk, image_format="qcow2")
    thrave_json(
        "instance", "adopt", "win", "--account", account_id, "--root-device", "vda", "--root-device-type", "ebs",
        "--secret-file", "passphrase", "--tag", "Name=web 1", "--tag", "cost_center=7",
    )  # fmt: skip
    (listed,) = thrave_json("instance", "list")["instances"]
    assert (listed["platform"], listed["rootDeviceType"]) == (None, "ebs")
    assert listed["rootVolume"]["secretFile"] == str(tmp_path / "passphrase")
    assert listed["tags"] == {"Name": "web 1", "cost_center": "7"}


def test_adopt_warns_about_disk_of_other_running_domain(thrave, libvirt, account_id, disk):
    """The other domain is not adopted."""
    libvirt.define("win", disk)
    libvirt.define("other", disk)
    words = ("instance", "adopt", "win", "--account", account_id, "--platform", "windows")
    assert "warning" not in thrave(*words)[2]
    libvirt.start("other")
    status, _, stderr = thrave(*words)
    assert (
        status,
        f"warning: the instance cannot be bundled: {disk} is also a disk of the domain other" in stderr,
    ) == (
        0,
        True,
    )


def test_adopt_warns_about_wrong_image_format(thrave, libvirt, account_id, disk):
    libvirt.define("win", disk, image_format="qcow2")
    status, _, stderr = thrave("instance", "adopt", "win", "--account", account_id, "--platform", "windows")
    assert (status, "does not have the format qcow2" in stderr) == (0, True)


def test_adopt_changes_only_our_metadata_element(thrave_json, libvirt, account_id, disk):
    libvirt.define("win", disk)
    before = libvirt.definition("win")
    adopted = thrave_json("instance", "adopt", "win", "--account", account_id)
    assert f'account="{account_id}"' in libvirt.definition("win")
    thrave_json("instance", "disown", "--yes", adopted["instanceId"])
    assert "".join(libvirt.definition("win").split()).replace("<metadata/>", "") == "".join(before.split())


def test_start_and_stop_change_adopted_domain(thrave_json, adopted):
    instance_id = adopted["instanceId"]
    assert thrave_json("instance", "start", instance_id)["state"] == "running"
    assert thrave_json("instance", "stop", instance_id)["state"] == "stopped"


def test_list_names_domain_with_invalid_metadata(thrave_json, thrave, libvirt, adopted, disk, caplog):
    libvirt.define("odd", disk)
    libvirt.metadata("odd", '<instance account="12"/>')
    assert [one["instanceId"] for one in thrave_json("instance", "list")["instances"]] == [adopted["instanceId"]]
    assert "the domain odd does not describe an instance: account: '12' is not 12 digits" in caplog.text


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nowhere"], 1, "Domain not found"),
        (["win", "--account", "000000000000"], 3, "000000000000"),
        (["win", "--root-device", "vdz"], 1, "there is no disk vdz"),
        (["win", "--root-device-type", "floppy"], 2, "floppy"),
        (["win", "--platform", "beos"], 2, "beos"),
        (["win", "--secret-file", "/nowhere/passphrase"], 3, "/nowhere/passphrase"),
        (["win", "--tag", "aws:x=1"], 2, "AWS reserves"),
        (["gone"], 1, "No such file or directory"),
    ],
)
def test_adopt_rejects_invalid_domain(thrave, thrave_json, libvirt, account_id, disk, tmp_path, words, status, message):
    libvirt.define("win", disk)
    libvirt.define("gone", tmp_path / "gone.raw")
    given = ["--account", account_id] if "--account" not in words else []
    ended, stdout, stderr = thrave("instance", "adopt", *words, *given)
    assert (ended, stdout) == (status, "")
    assert message in stderr
    assert "Traceback" not in stderr
    assert thrave_json("instance", "list") == {"instances": []}


@pytest.mark.parametrize("command", ["start", "stop", "disown"])
def test_domain_without_account_is_not_found(thrave, adopted, command):
    status, _, stderr = thrave("instance", command, "i-0123456789abcdef0")
    assert (status, "there is no instance 'i-0123456789abcdef0'" in stderr) == (3, True)


def test_adopt_reports_unavailable_libvirt(thrave, account_id, monkeypatch, libvirt):
    monkeypatch.setenv("THRAVE_LIBVIRT_URI", "qemu:///system?socket=/nowhere/libvirt-sock")
    status, _, stderr = thrave("instance", "list")
    assert (status, "no connection to qemu:///system" in stderr) == (1, True)


class TestTheDoctor:
    """`thrave doctor` on a host with libvirt."""

    @pytest.fixture
    def doctor(self, thrave, monkeypatch, adopted):
        def run(**settings):
            for name, value in settings.items():
                monkeypatch.setenv(f"THRAVE_{name.upper()}", value if isinstance(value, str) else json.dumps(value))
            status, stdout, _ = thrave("doctor", "--output", "json")
            found = {one["check"]: one for one in json.loads(stdout)["checks"]}
            return status, {name for name, one in found.items() if one["outcome"] == "failed"}, found

        return run

    def test_doctor_passes_and_reports_libvirt_version(self, doctor):
        status, failed, found = doctor()
        assert (status, failed) == (0, set())
        assert found["libvirt"]["detail"].startswith("TEST 0.0.2, libvirt ")
        assert found["instances"]["detail"] == f"1 in {URI}"
        assert found["root volumes"]["detail"] == "1 readable"
        assert found["power button"]["detail"] == "1 can be shut down, 0 through a guest agent channel"
        assert {found[name]["outcome"] for name in ("commands", "sysprep", "overlays", "capture mode")} == {"skipped"}

    def test_unreachable_libvirt_skips_dependent_checks(self, doctor):
        status, failed, found = doctor(libvirt_uri="qemu:///system?socket=/nowhere/libvirt-sock")
        assert (status, failed) == (1, {"libvirt"})
        assert found["root volumes"]["detail"] == "needs: libvirt"

    def test_libvirt_of_another_host_fails(self, doctor):
        _, failed, found = doctor(libvirt_uri="qemu+tcp://elsewhere.invalid/system")
        assert failed == {"libvirt"}
        assert "on another host, elsewhere.invalid" in found["libvirt"]["detail"]

    def test_doctor_names_unreadable_instance_and_volume(self, doctor, libvirt, disk, adopted):
        libvirt.define("odd", disk)
        libvirt.metadata("odd", '<instance account="12"/>')
        disk.unlink()
        _, failed, found = doctor()
        assert failed == {"instances", "root volumes"}
        assert "the domain odd" in found["instances"]["detail"]
        assert found["root volumes"]["detail"] == f"{adopted['instanceId']}: {disk}: No such file or directory"

    def test_doctor_names_guest_without_acpi_and_agent(self, doctor, libvirt, disk, account_id, thrave_json):
        libvirt.define("silent", disk, acpi=False)
        libvirt.define("talks", disk, acpi=False, channel=True)
        for name in ("silent", "talks"):
            thrave_json("instance", "adopt", name, "--account", account_id)
        _, failed, found = doctor()
        assert failed == {"power button"}
        detail = found["power button"]["detail"]
        assert ("(silent)" in detail, "talks" in detail) == (True, False)

    def test_doctor_names_guest_without_connected_agent(self, doctor, libvirt, disk, account_id, thrave_json):
        libvirt.define("talks", disk, channel=True)
        thrave_json("instance", "adopt", "talks", "--account", account_id)
        _, failed, found = doctor(sysprep_command=["C:\\sysprep.exe", "/shutdown"])
        assert failed == {"sysprep"}
        assert ("(win): no agent" in found["sysprep"]["detail"], "talks" in found["sysprep"]["detail"]) == (True, False)
        libvirt.start("talks")  # the guest's agent does not open the channel
        assert "talks" in doctor()[2]["sysprep"]["detail"]

    def test_doctor_names_missing_passphrase_file(self, doctor, libvirt, account_id, thrave_json, tmp_path):
        for name in ("secret.qcow2", "passphrase"):
            (tmp_path / name).touch()
        libvirt.define("secret", tmp_path / "secret.qcow2", image_format="qcow2")
        words = ("--account", account_id, "--secret-file", tmp_path / "passphrase")
        thrave_json("instance", "adopt", "secret", *words)
        (tmp_path / "passphrase").unlink()
        _, failed, found = doctor()
        assert "root volumes" in failed
        assert f"{tmp_path / 'passphrase'}: No such file" in found["root volumes"]["detail"]

    def test_driver_without_overlays_is_a_warning(self, doctor, adopted):
        require("qemu-img", package="qemu-utils")
        status, failed, found = doctor(capture_mode="overlay")
        assert (status, failed) == (0, set())
        assert (found["overlays"]["detail"], found["capture mode"]["outcome"]) == ("0 can be created", "warning")
        assert adopted["instanceId"] in found["capture mode"]["detail"]


def test_doctor_checks_space_for_overlays(thrave, thrave_json, libvirtd, account_id, disk, monkeypatch, request):
    monkeypatch.setenv("THRAVE_HYPERVISOR", "libvirt")
    monkeypatch.setenv("THRAVE_LIBVIRT_URI", libvirtd.uri)
    monkeypatch.setenv("THRAVE_CAPTURE_MODE", "overlay")
    for name, image_format in (("win-raw", "raw"), ("win-vmdk", "vmdk")):
        definition = disk.with_name(f"{name}.xml")
        definition.write_text(domain_xml(name, disk, kind="qemu", image_format=image_format))
        libvirtd.virsh("define", definition)
        request.addfinalizer(partial(libvirtd.virsh, "undefine", name))
        thrave_json("instance", "adopt", name, "--account", account_id)
    found = findings(thrave)
    assert found["libvirt"]["detail"].startswith("QEMU ")
    assert found["overlays"]["outcome"] == "ok"
    assert (found["capture mode"]["outcome"], "the format vmdk" in found["capture mode"]["detail"]) == ("warning", True)
    monkeypatch.setattr(host_checks, "MIN_OVERLAY_SPACE", 1 << 62)
    found = findings(thrave)
    assert found["overlays"]["outcome"] == "failed"
    assert f"{disk.parent}: " in found["overlays"]["detail"]


def findings(thrave):
    """Returns the findings by check."""
    return {one["check"]: one for one in json.loads(thrave("doctor", "--output", "json")[1])["checks"]}


@pytest.mark.parametrize(("setting", "check"), [("capture_mode", "overlays"), ("sysprep_command", "sysprep")])
def test_doctor_fails_for_setting_that_needs_libvirt(thrave, data, account_id, monkeypatch, setting, check):
    monkeypatch.setenv(f"THRAVE_{setting.upper()}", {"capture_mode": "overlay", "sysprep_command": '["x"]'}[setting])
    status, stdout, _ = thrave("doctor", "--output", "json")
    (found,) = [one for one in json.loads(stdout)["checks"] if one["check"] == check]
    assert (status, found["outcome"], "hypervisor = libvirt" in found["detail"]) == (1, "failed", True)
